"""Real HTTP servers on 127.0.0.1 for the tests: any origin, and a small Label Studio.

The fake answers as Label Studio 1.23.2 was measured to: which token opens what, refresh, presign,
local files, and the API calls that `LabelStudioClient` makes.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

LEGACY_TOKEN = "abcdef0123456789abcdef0123456789abcdef01"


def jwt(token_type: str, number: int = 0) -> str:
    """An unsigned token that says of itself what it is, as Label Studio's do."""
    parts = ({"alg": "HS256"}, {"token_type": token_type, "number": number})
    encoded = [
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts
    ]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


@dataclass
class Request:
    method: str
    path: str
    """With the query."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass
class Answer:
    body: bytes | Iterable[bytes] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    """Content-Length is added to a body of bytes, unless it is here."""


def redirect(location: str, status: int = 302) -> Answer:
    return Answer(status=status, headers={"Location": location})


def json_answer(body: object, status: int = 200) -> Answer:
    return Answer(json.dumps(body).encode(), status, {"Content-Type": "application/json"})


Route = Answer | Callable[[Request], Answer]


class Server:
    """An origin of its own; records what it was asked, answers what `routes` says, else 404."""

    def __init__(self, *, certificate: Path | None = None) -> None:
        self.routes: dict[str, Route] = {}
        self.requests: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, self.rfile.read(length))
                outer.requests.append(request)
                answer = outer.answer(request)
                self.send_response(answer.status)
                is_bytes = isinstance(answer.body, bytes)
                length_header = {"Content-Length": str(len(answer.body))} if is_bytes else {}
                for name, value in (length_header | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for chunk in [answer.body] if is_bytes else answer.body:
                        self.wfile.write(chunk)
                        self.wfile.flush()
                except OSError:  # the client hung up, as some tests want it to
                    self.close_connection = True

            do_GET = do_POST = do_PATCH = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:  # a client that hangs up is no news here
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    def answer(self, request: Request) -> Answer:
        route = self.routes.get(urlsplit(request.path).path, Answer(b"Not Found", 404))
        return route(request) if callable(route) else route

    def sent(self, name: str) -> list[str | None]:
        """One header (lower case) of all requests, in order."""
        return [request.headers.get(name) for request in self.requests]

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class FakeLabelStudio(Server):
    """Serves `/data/…` from `routes` to whoever has a token that works, and a little of the API."""

    def __init__(self) -> None:
        super().__init__()
        self.legacy_tokens_enabled = False  # Label Studio's default
        self.personal_access_token = jwt("refresh")
        self.exchanged = 0
        """Access tokens handed out; only the newest one works."""
        self.presigned: dict[str, str] = {}
        """Cloud URI -> the URL that it is redirected to."""
        self.projects: list[dict[str, Any]] = []
        self.tasks: list[dict[str, Any]] = []
        self.backends: list[dict[str, Any]] = []
        self.webhooks: list[dict[str, Any]] = []

    @property
    def access_token(self) -> str:
        return jwt("access", self.exchanged)

    def expire_access_token(self) -> None:
        self.exchanged += 1

    def answer(self, request: Request) -> Answer:
        path = urlsplit(request.path).path
        if path == "/api/token/refresh":
            if json.loads(request.body) != {"refresh": self.personal_access_token}:
                return json_answer({"detail": "Token is invalid", "code": "token_not_valid"}, 401)
            self.exchanged += 1
            return json_answer({"access": self.access_token})
        accepted = [f"Bearer {self.access_token}"] if self.exchanged else []
        if self.legacy_tokens_enabled:
            accepted.append(f"Token {LEGACY_TOKEN}")
        if request.headers.get("authorization") not in accepted:
            return json_answer({"detail": "Authentication credentials were not provided."}, 401)
        if path.startswith("/tasks/") and path.endswith("/presign/"):
            uri = base64.urlsafe_b64decode(request.query["fileuri"][0]).decode()
            target = self.presigned.get(uri)
            return redirect(target, 303) if target else Answer(status=404)
        if path.startswith("/api/") and path not in self.routes:
            return self._api(request, path)
        return super().answer(request)

    def _api(self, request: Request, path: str) -> Answer:
        is_json = request.headers.get("content-type") == "application/json"
        body = json.loads(request.body) if is_json else {}
        match request.method, path.strip("/").split("/")[1:]:
            case "GET", ["version"]:
                return json_answer({"release": "1.23.2"})
            case "GET", ["current-user", "whoami"]:
                return json_answer({"id": 1, "email": "admin@example.com"})
            case "GET", ["projects"]:
                page, size = (int(request.query[name][0]) for name in ("page", "page_size"))
                rows = self.projects[(page - 1) * size : page * size]
                more = f"{self.url}/api/projects/?page={page + 1}"
                following = more if page * size < len(self.projects) else None
                return json_answer({"results": rows, "next": following})
            case "POST", ["projects"]:
                if len(body["title"]) < 3:
                    errors = {"title": ["Ensure this field has at least 3 characters."]}
                    return json_answer({"validation_errors": errors}, 400)
                self.projects.append({"id": len(self.projects) + 1} | body)
                return json_answer(self.projects[-1], 201)
            case "GET", ["projects", project_id]:
                return json_answer(self.projects[int(project_id) - 1])
            case "POST", ["projects", _, "import"]:
                # One file of each field name, as Django's request.FILES.items() gives them.
                names = {
                    line.split(b'name="')[1].split(b'"')[0]
                    for line in request.body.split(b"\r\n")
                    if line.startswith(b"Content-Disposition")
                }
                return json_answer({"task_count": len(names)}, 201)
            case "GET", ["tasks"]:
                return self._tasks({name: values[0] for name, values in request.query.items()})
            case "GET", ["ml"]:
                return json_answer(
                    [
                        row
                        for row in self.backends
                        if [str(row["project"])] == request.query["project"]
                    ]
                )
            case "POST", ["ml"]:
                self.backends.append({"id": len(self.backends) + 1} | body)
                hook = {"url": body["url"] + "/webhook", "headers": {}}
                self.webhooks.append({"id": len(self.webhooks) + 1} | hook)
                return json_answer(self.backends[-1], 201)
            case "PATCH", ["ml", backend_id]:
                if not {"url", "project"} <= body.keys():
                    return json_answer({"detail": "healthcheck_() missing 'url'"}, 500)
                self.backends[int(backend_id) - 1] |= body
                return json_answer(self.backends[int(backend_id) - 1])
            case "GET", ["webhooks"]:
                return json_answer(self.webhooks)
            case "PATCH", ["webhooks", webhook_id]:
                self.webhooks[int(webhook_id) - 1] |= body
                return json_answer(self.webhooks[int(webhook_id) - 1])
        return json_answer({"detail": "Not found."}, 404)

    def _tasks(self, asked: dict[str, str]) -> Answer:
        """As the data manager's list answers to the two filters that are used."""
        # With these, it asks no backend for predictions, and leaves cloud addresses alone.
        assert (asked["review"], asked["resolve_uri"]) == ("true", "false")
        query = json.loads(asked["query"])
        assert query["filters"]["conjunction"] == "and"
        after, *annotated = query["filters"]["items"]
        assert (after["filter"], after["operator"]) == ("filter:tasks:id", "greater")
        for item in annotated:
            assert (item["filter"], item["operator"], item["value"]) == (
                "filter:tasks:total_annotations",
                "greater",
                0,
            )
        assert query["ordering"] == ["tasks:id"]
        rows = [
            row
            for row in sorted(self.tasks, key=lambda row: row["id"])
            if row["project"] == int(asked["project"])
            and row["id"] > after["value"]
            and (not annotated or any(not a["was_cancelled"] for a in row.get("annotations", ())))
        ]
        if asked.get("fields") != "all":
            rows = [{k: v for k, v in row.items() if k != "annotations"} for row in rows]
        return json_answer({"total": len(rows), "tasks": rows[: int(asked["page_size"])]})
