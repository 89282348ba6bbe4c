"""Label Studio's side of the wire: where it is, which token opens it, what its API is asked.

Everything that is sent to Label Studio goes through `LabelStudioClient`, except the image files,
which `images.py` streams with the addresses and the authorization that this module hands out.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from ml_backend.errors import BadRequestError, LabelStudioError

__all__ = [
    "LabelStudioClient",
    "LabelStudioUnreachableError",
    "Origin",
    "ca_bundle",
    "origin_of",
    "project_name",
    "project_number",
]

_API_TIMEOUT_S = (3.05, 30.0)  # to connect; between two bytes
_IMPORT_TIMEOUT_S = (3.05, 300.0)
_REFRESH_TIMEOUT_S = (3.05, 10.0)  # an annotator's click waits for this one
_ACCESS_TOKEN_S = 240.0  # Label Studio's access tokens live 300 s
_GATEWAY_ERRORS = (502, 503, 504)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class LabelStudioUnreachableError(LabelStudioError):
    """Label Studio did not answer, or only a proxy before it, as opposed to refusing."""


class Origin(NamedTuple):
    """Who is talked to: tokens never leave the origin they belong to."""

    scheme: str
    host: str
    port: int


def origin_of(url: str) -> Origin:
    """Scheme, host (lower case, ASCII) and port of a URL; the port is the scheme's when not said.

    Raises:
        ValueError: If the URL is not http or https, has no host, or has a port that is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS:
        raise ValueError(f"scheme must be http or https, got {parts.scheme!r}")
    if not parts.hostname:
        raise ValueError("host must not be empty")
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode()
    return Origin(parts.scheme, host, parts.port or _DEFAULT_PORTS[parts.scheme])


def project_name(project: Mapping[str, Any]) -> str:
    """Name a project as Label Studio does in /setup and /predict: its number, and when it was made.

    The number alone would confuse the projects of two Label Studios.

    Args:
        project: The project as its API or a webhook describes it: `id` and `created_at` are read.

    Returns:
        Such as `1.1795194739`; the second part is in seconds since 1970.

    Raises:
        BadRequestError: If one of them is missing, or is none.
    """
    number, created_at = project.get("id"), project.get("created_at")
    if type(number) is not int or number < 0:
        raise BadRequestError(
            f"project.id must be a number, got {type(number).__name__}; send the project as Label "
            "Studio describes it"
        )
    try:
        created = datetime.fromisoformat(str(created_at).replace("Z", "+00:00"))
        return f"{number}.{int(created.timestamp())}"
    except (ValueError, OverflowError) as error:
        raise BadRequestError(
            f"project.created_at must be a time such as 2026-11-20T17:12:19Z, got "
            f"{str(created_at)[:60]!r}; send the project as Label Studio describes it"
        ) from error


def project_number(name: str) -> int | None:
    """Give the number in a project's name, which Label Studio's API wants; None if it has none."""
    number = name.partition(".")[0]
    return int(number) if number.isdecimal() else None


def ca_bundle() -> str:
    """The certificates that https is checked against.

    `REQUESTS_CA_BUNDLE`, the variable all of requests' users know, names a company's own.
    """
    return os.environ.get("REQUESTS_CA_BUNDLE") or str(DEFAULT_CA_BUNDLE_PATH)


class LabelStudioClient:
    """One Label Studio with one token; safe from several threads.

    Neither proxies nor `.netrc` are used: both could send the token to somebody else.
    """

    def __init__(
        self, base_url: str, token: str | None, *, announced_url: str | None = None
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            base_url: Label Studio as this process reaches it, with its path if it has one.
            token: A legacy token, a personal access token (exchanged when needed) or an access
                token; None sends none.
            announced_url: The host name that /setup announced, when it is not `base_url`. Label
                Studio writes it into tasks (`http://localhost:8080/data/local-files/…`) although
                it may mean something else, or nothing, where this process runs.

        Raises:
            LabelStudioError: If `base_url` is not an http(s) address.
        """
        try:
            self.origin = origin_of(base_url)
        except ValueError as error:
            raise LabelStudioError(
                f"Label Studio's address must be like http://host:8080, got {base_url!r} "
                f"({error}); set LABEL_STUDIO_URL"
            ) from error
        parts = urlsplit(base_url)
        self.base_url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip(
            "/"
        )
        self.token = token or None
        self._announced = announced_url
        self._refresh_lock = threading.Lock()
        self._access: tuple[str, float] | None = None  # the header, when it goes stale (monotonic)

    def url_of(self, address: str) -> str | None:
        """Where this Label Studio serves an address that stands in a task.

        Args:
            address: A path (`/data/upload/1/a.png`) or a URL.

        Returns:
            The URL to ask, or None if the address is not Label Studio's.
        """
        root = urlsplit(self.base_url).path
        if address.startswith("/") and not address.startswith("//"):
            under_root = root and address.startswith(f"{root}/")
            return urljoin(self.base_url, address) if under_root else self.base_url + address
        if self._is_under(address, self.base_url):
            return address
        if self._announced and self._is_under(address, self._announced):
            announced, asked = urlsplit(self._announced), urlsplit(address)
            path = asked.path.removeprefix(announced.path.rstrip("/"))
            return self.base_url + path + (f"?{asked.query}" if asked.query else "")
        return None

    @staticmethod
    def _is_under(address: str, base_url: str) -> bool:
        try:
            return origin_of(address) == origin_of(base_url)
        except ValueError:
            return False

    def presign_url(self, task_id: int, uri: str) -> str:
        """Where Label Studio redirects to, or hands out, the cloud file that a task names."""
        encoded = base64.urlsafe_b64encode(uri.encode()).decode()
        return f"{self.base_url}/tasks/{task_id}/presign/?fileuri={encoded}"

    def authorization(self, url: str, *, refused: str | None = None) -> str | None:
        """The Authorization header for one URL.

        Args:
            url: What is about to be asked.
            refused: The header that this URL has just answered 401 to: it is not handed out
                again if it can be renewed.

        Returns:
            The header, or None if the URL is not of Label Studio's origin or there is no token.

        Raises:
            LabelStudioUnreachableError: If a personal access token could not be exchanged because
                Label Studio did not answer.
            LabelStudioError: If Label Studio refused to exchange the personal access token.
        """
        if self.token is None or origin_of(url) != self.origin:
            return None
        kind = _jwt_type(self.token)
        if kind is None:
            return f"Token {self.token}"
        if kind != "refresh":
            return f"Bearer {self.token}"
        with self._refresh_lock:
            if self._access is not None:
                header, stale_at = self._access
                if header != refused and time.monotonic() < stale_at:
                    return header
            self._access = None
            header = f"Bearer {self._exchange(self.token)}"
            self._access = header, time.monotonic() + _ACCESS_TOKEN_S
            return header

    def _exchange(self, refresh_token: str) -> str:
        response = self._send(
            "POST",
            "/api/token/refresh",
            authorization=None,
            timeout=_REFRESH_TIMEOUT_S,
            json={"refresh": refresh_token},
        )
        access = _json_of(response).get("access") if response.ok else None
        if not isinstance(access, str):
            raise LabelStudioError(
                f"token: {self.base_url} must exchange the personal access token, got status "
                f"{response.status_code}{_detail_of(response)}; make a new one (Account & Settings "
                "> Personal Access Token) and set LABEL_STUDIO_API_KEY to it"
            )
        return access

    def whoami(self) -> dict[str, Any]:
        """The user that the token stands for (`id`, `email`, …).

        Raises:
            LabelStudioError: As every method below: Label Studio refused, or did not answer.
        """
        return self._call("GET", "/api/current-user/whoami")

    def version(self) -> str:
        """Label Studio's release, such as `1.23.2`."""
        return str(self._call("GET", "/api/version/").get("release", "unknown"))

    def list_projects(self) -> list[dict[str, Any]]:
        """All projects that the token's user sees, each with `id`, `title`, `label_config`."""
        return list(self._pages("/api/projects/"))

    def get_project(self, project_id: int) -> dict[str, Any]:
        """One project with `id`, `title`, `label_config`."""
        return self._call("GET", f"/api/projects/{project_id}/")

    def create_project(self, title: str, label_config: str) -> dict[str, Any]:
        """Create a project; Label Studio wants titles of three characters and more."""
        body = {"title": title, "label_config": label_config}
        return self._call("POST", "/api/projects/", json=body)

    def import_files(self, project_id: int, paths: Sequence[Path]) -> dict[str, Any]:
        """Upload image files, one task each; the answer has `task_count`."""
        with ExitStack() as opened:
            # Label Studio keeps one file of each field name.
            files = {
                f"file_{index}": (path.name, opened.enter_context(path.open("rb")))
                for index, path in enumerate(paths)
            }
            path = f"/api/projects/{project_id}/import"
            return self._call("POST", path, files=files, timeout=_IMPORT_TIMEOUT_S)

    def list_tasks(
        self, project_id: int, *, after: int = 0, limit: int = 100, annotated: bool = False
    ) -> list[dict[str, Any]]:
        """A project's tasks by their ids, each with `id` and `data` as /predict has it.

        Args:
            project_id: The project.
            after: Only tasks with a larger id.
            limit: At most so many.
            annotated: Only those that were annotated and not skipped only, with `annotations`.
        """
        above = {"operator": "greater", "type": "Number"}
        items = [above | {"filter": "filter:tasks:id", "value": after}]
        if annotated:
            items.append(above | {"filter": "filter:tasks:total_annotations", "value": 0})
        filters = {"conjunction": "and", "items": items}
        params = {
            "project": project_id,
            "page_size": limit,
            "query": json.dumps({"filters": filters, "ordering": ["tasks:id"]}),
            # `s3://…` stays as it is; it is opened by the task's id.
            "resolve_uri": "false",
            # Otherwise some projects have the tasks predicted first: by this backend.
            "review": "true",
        } | ({"fields": "all"} if annotated else {})
        tasks: list[dict[str, Any]] = self._call("GET", "/api/tasks/", params=params)["tasks"]
        return tasks

    def annotated_tasks(self, project_id: int, *, page_size: int = 50) -> Iterator[dict[str, Any]]:
        """All tasks of a project that were annotated and not skipped only, by their ids.

        Args:
            project_id: The project.
            page_size: So many are asked for at a time; each comes with all its masks.

        Returns:
            Each task as `list_tasks` has it, with its `annotations`.
        """
        after = 0
        while tasks := self.list_tasks(project_id, after=after, limit=page_size, annotated=True):
            yield from tasks
            after = tasks[-1]["id"]

    def connect_backend(
        self,
        project_id: int,
        url: str,
        title: str,
        *,
        basic_auth: tuple[str, str] | None = None,
    ) -> dict[str, Any]:
        """Connect an ML backend to a project, for interactive use; a second time updates it.

        Args:
            project_id: The project.
            url: The backend as Label Studio reaches it.
            title: Its name on the project's Model page.
            basic_auth: User and password that the backend asks for. Label Studio does not send
                them with annotation webhooks by itself, so they are put into the webhooks' headers.

        Returns:
            The backend as Label Studio describes it (`id`, `state`, `error_message`, …).

        Raises:
            LabelStudioError: If Label Studio refused, by default also because the backend's
                address is a local one.
        """
        body: dict[str, Any] = {
            "project": project_id,
            "url": url,
            "title": title,
            "is_interactive": True,
            "auth_method": "NONE",
        }
        if basic_auth:
            user, password = basic_auth
            auth = {"basic_auth_user": user, "basic_auth_pass": password}
            body |= {"auth_method": "BASIC_AUTH"} | auth
        known = self._call_list("GET", "/api/ml/", params={"project": project_id})
        ids = [row["id"] for row in known if str(row["url"]).rstrip("/") == url.rstrip("/")]
        try:
            if ids:
                backend = self._call("PATCH", f"/api/ml/{ids[0]}", json=body)
            else:
                backend = self._call("POST", "/api/ml/", json=body)
        except LabelStudioError as error:
            if "reserved network address" not in str(error):
                raise
            raise LabelStudioError(
                f"{error}; start Label Studio with LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS=false, "
                "it refuses backends at local addresses by default"
            ) from error
        if basic_auth:
            pair = base64.b64encode(":".join(basic_auth).encode()).decode()
            headers = {"headers": {"Authorization": f"Basic {pair}"}}
            for webhook in self._call_list("GET", "/api/webhooks/", params={"project": project_id}):
                if str(webhook["url"]).rstrip("/") == f"{url.rstrip('/')}/webhook":
                    self._call("PATCH", f"/api/webhooks/{webhook['id']}/", json=headers)
        return backend

    def _pages(self, path: str) -> Iterator[dict[str, Any]]:
        page = 1
        while True:
            answer = self._call("GET", path, params={"page": page, "page_size": 100})
            yield from answer["results"]
            if not answer.get("next"):
                return
            page += 1

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self._answer(method, path, **options)
        if not isinstance(answer, dict):
            raise LabelStudioError(
                f"{method} {self.base_url}{path} must answer with a JSON object, got "
                f"{type(answer).__name__}; check that LABEL_STUDIO_URL is Label Studio"
            )
        return answer

    def _call_list(self, method: str, path: str, **options: Any) -> list[dict[str, Any]]:
        answer = self._answer(method, path, **options)
        if not isinstance(answer, list):
            raise LabelStudioError(
                f"{method} {self.base_url}{path} must answer with a JSON list, got "
                f"{type(answer).__name__}; check that LABEL_STUDIO_URL is Label Studio"
            )
        return answer

    def _answer(self, method: str, path: str, **options: Any) -> object:
        header = self.authorization(self.base_url)
        response = self._send(method, path, authorization=header, **options)
        if response.status_code == 401 and header is not None and "files" not in options:
            renewed = self.authorization(self.base_url, refused=header)
            if renewed != header:
                response = self._send(method, path, authorization=renewed, **options)
        asked, status = f"{method} {self.base_url}{path}", response.status_code
        if status == 401:
            raise LabelStudioError(
                f"token: {asked} must accept the token, got status 401{_detail_of(response)}; set "
                "LABEL_STUDIO_API_KEY to a personal access token (Account & Settings), legacy "
                "tokens are off by default"
            )
        if response.is_redirect:
            raise LabelStudioError(
                f"{asked} must answer itself, got a redirect to "
                f"{_without_query(response.headers['Location'])}; set LABEL_STUDIO_URL to where "
                "Label Studio really is"
            )
        if not response.ok:
            kind = LabelStudioUnreachableError if status in _GATEWAY_ERRORS else LabelStudioError
            raise kind(f"{asked} must answer 2xx, got status {status}{_detail_of(response)}")
        try:
            answer: object = response.json()
        except ValueError as error:
            raise LabelStudioError(
                f"{asked} must answer with JSON, got {response.text[:60]!r}; check that "
                "LABEL_STUDIO_URL is Label Studio"
            ) from error
        return answer

    def _send(
        self,
        method: str,
        path: str,
        *,
        authorization: str | None,
        timeout: tuple[float, float] = _API_TIMEOUT_S,
        **options: Any,
    ) -> requests.Response:
        headers = {"Accept": "application/json"}
        if authorization is not None:
            headers["Authorization"] = authorization
        try:
            with requests.Session() as session:
                session.trust_env = False
                # A redirect is never followed: it would carry the token, or a body with it, along.
                return session.request(
                    method,
                    self.base_url + path,
                    headers=headers,
                    timeout=timeout,
                    allow_redirects=False,
                    verify=ca_bundle(),
                    **options,
                )
        except requests.RequestException as error:
            raise LabelStudioUnreachableError(
                f"Label Studio must answer at {self.base_url}{path}, got {_reason(error)}; check "
                "that it runs and that LABEL_STUDIO_URL is its address from here"
            ) from error


def _jwt_type(token: str) -> str | None:
    """What a JWT says it is for (`refresh`, `access`), or None if the token is no JWT."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    return str(claims.get("token_type")) if isinstance(claims, dict) else None


def _json_of(response: requests.Response) -> Mapping[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _detail_of(response: requests.Response) -> str:
    """What Label Studio gives as its reason, as an appendix to a sentence."""
    body = _json_of(response)
    detail = body.get("validation_errors") or body.get("detail")
    return f" ({str(detail)[:300]})" if detail else ""


def _without_query(url: str) -> str:
    """A URL as it may stand in a log: queries are where signatures are."""
    return url.partition("?")[0]


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return "a certificate that does not check (REQUESTS_CA_BUNDLE names your own authority's)"
    return "no connection" if isinstance(error, requests.ConnectionError) else str(error)
