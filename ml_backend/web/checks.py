"""What the status page knows of Label Studio: asked in the background, never while it is shown."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from ml_backend.connect import ProjectClient
from ml_backend.doctor import Finding, check_label_config, check_label_studio
from ml_backend.errors import BackendError, JobsUnavailableError
from ml_backend.label_studio import LabelStudioClient, project_name, project_number
from ml_backend.model import Service
from ml_backend.registry import is_project_name
from ml_backend.settings import Settings

__all__ = ["Checked", "Checker", "ProjectFinding", "announced_hosts", "check", "known_projects"]

_log = logging.getLogger(__name__)

_EVERY_S = 60.0
_PROJECTS = 50  # that Label Studio is asked about


@dataclass(frozen=True, kw_only=True)
class ProjectFinding:
    """A finding and the project that it is about, if it is about one."""

    project: str | None
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was found, and when, in seconds since 1970."""

    findings: tuple[ProjectFinding, ...] = ()
    titles: dict[str, str] = field(default_factory=dict)
    """Of the projects that Label Studio knows."""
    at: float


class Checker:
    """Looks again when it is asked and what it knows is older than a minute; asking never waits."""

    def __init__(
        self,
        look: Callable[[], Checked],
        *,
        start: Callable[[Callable[[], None]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin without knowing anything.

        Args:
            look: Looks; may take long.
            start: Starts it in the background, if not in a thread.
            clock: Tells the seconds.
        """
        self._look = look
        self._start = start or _start_thread
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_at: float | None = None
        self._is_looking = False
        self._checked: Checked | None = None

    def latest(self) -> Checked | None:
        """Give what was found last; None before anything was."""
        with self._lock:
            is_old = self._looked_at is None or self._clock() - self._looked_at >= _EVERY_S
            is_due = is_old and not self._is_looking
            self._is_looking |= is_due
        if is_due:
            self._start(self._look_now)
        return self._checked

    def _look_now(self) -> None:
        try:
            self._checked = self._look()
        except Exception:  # noqa: BLE001  # of a thread, where nobody else would see it
            _log.exception("the status page's checks")
        finally:
            with self._lock:
                self._looked_at, self._is_looking = self._clock(), False


def known_projects(service: Service) -> list[str]:
    """Name the projects that were announced, trained, or have a job."""
    names = {*announced_hosts(service.settings), *service.registry.names()}
    with suppress(JobsUnavailableError):
        names |= {job.project for job in service.jobs.jobs()}
    return sorted(names, key=lambda name: (project_number(name) or 0, name))


def announced_hosts(settings: Settings) -> dict[str, str | None]:
    """Tell where each project's Label Studio said that people find it; without any password."""
    hosts: dict[str, str | None] = {}
    for path in sorted(settings.connections_dir.glob("*.json")):
        if is_project_name(path.stem):
            try:
                hostname = json.loads(path.read_text())["hostname"]
                hosts[path.stem] = LabelStudioClient(hostname, None).base_url
            except (OSError, ValueError, KeyError, TypeError, AttributeError, BackendError):
                hosts[path.stem] = None
    return hosts


def check(service: Service) -> Checked:
    """Ask each Label Studio whether it answers and knows the token, and about the projects."""
    findings: list[ProjectFinding] = []
    titles: dict[str, str] = {}
    for client, names in _label_studios(service, findings):
        found = _findings(partial(check_label_studio, client))
        findings += [ProjectFinding(project=None, finding=one) for one in found]
        if any(one.state == "failure" for one in found):
            continue
        for name in names:
            about = _findings(
                partial(_check_project, client, name, titles=titles, settings=service.settings)
            )
            findings += [ProjectFinding(project=name, finding=one) for one in about]
    return Checked(findings=tuple(findings), titles=titles, at=time.time())


def _label_studios(
    service: Service, findings: list[ProjectFinding]
) -> list[tuple[ProjectClient, list[str]]]:
    """Part the projects by Label Studio and token; says where one has none."""
    found: dict[tuple[str, str | None], list[str]] = {}
    settings = service.settings
    if settings.label_studio_url is not None:
        key = settings.label_studio_api_key
        if key is not None:
            found[settings.label_studio_url.rstrip("/"), key.get_secret_value()] = []
    for name in known_projects(service)[-_PROJECTS:]:
        try:
            client = service.client_for({"project": name})
        except BackendError as error:
            findings.append(_failure(name, str(error)))
            continue
        if client is None:
            findings.append(
                _failure(
                    name,
                    "its Label Studio is not known; set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, "
                    "or save the model's connection in Label Studio again",
                )
            )
            continue
        found.setdefault((client.base_url, client.token), []).append(name)
    return [(ProjectClient(url, token), names) for (url, token), names in found.items()]


def _check_project(
    client: ProjectClient, name: str, *, titles: dict[str, str], settings: Settings
) -> Iterable[Finding]:
    number = project_number(name)
    if number is None:
        return
    project = client.get_project(number)
    if (other := project_name(project)) != name:
        yield Finding(
            check="project",
            state="warning",
            detail=f"project {number} of {client.base_url} is {other} now, not {name}: it was "
            "deleted and made anew, or it is on another Label Studio",
        )
        return
    titles[name] = str(project.get("title") or "")
    yield from check_label_config(str(project.get("label_config")), settings=settings)


def _findings(look: Callable[[], Iterable[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        for one in look():
            found.append(one)
    except BackendError as error:
        found.append(Finding(check="Label Studio", state="failure", detail=str(error)))
    return found


def _failure(name: str, detail: str) -> ProjectFinding:
    return ProjectFinding(
        project=name, finding=Finding(check="Label Studio", state="failure", detail=detail)
    )


def _start_thread(look: Callable[[], None]) -> None:
    threading.Thread(target=look, name="status page checks", daemon=True).start()
