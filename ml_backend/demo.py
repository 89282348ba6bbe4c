"""Label Studio and the backend together on one machine: started, filled, connected, stopped."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import requests

from ml_backend.connect import ProjectClient, basic_auth_of, connect
from ml_backend.errors import BackendError
from ml_backend.settings import load_settings

__all__ = [
    "Child",
    "DemoConfig",
    "DemoError",
    "backend_child",
    "create_access_token",
    "demo_label_config",
    "label_studio_child",
    "run_demo",
    "sample_images",
    "wait_until_healthy",
]

_BACKEND_TITLE = "SAM"
_LABELS = {"Cat": "#e8590c", "Nucleus": "#1971c2"}
_OUTPUT_TAGS = {"brush": "BrushLabels", "polygon": "PolygonLabels"}
_LOG_LINES = 15
_POLL_S = 0.2


class DemoError(BackendError):
    """The demo cannot start or go on; the message says why, and what to do."""


class _StoppedError(Exception):
    """The user asked to stop while something was waited for."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where the demo lives and what it listens on."""

    folder: Path
    """Everything that is kept between two starts; deleting it starts anew."""
    label_studio: Path
    """The `label-studio` executable, of a virtual environment of its own."""
    host: str = "127.0.0.1"
    """Where Label Studio listens; `0.0.0.0` lets other machines in."""
    port: int = 8080
    """Label Studio's port."""
    backend_port: int = 9090
    """The backend's port; it listens on this machine only."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the folder remembers: who may log in, and what was created already."""

    email: str
    password: str
    token: str | None = None
    projects: dict[str, int] = field(default_factory=dict)


class Child:
    """A program in a process group of its own, so that Ctrl-C reaches it through us only."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environ: Mapping[str, str],
        log: Path,
        health_url: str,
    ) -> None:
        """Start the program.

        Args:
            name: How messages call it.
            command: The executable and its arguments.
            environ: Its whole environment.
            log: The file that gets what it prints; replaced.
            health_url: What answers 200 once the program is ready.
        """
        self.name = name
        self.log = log
        self.health_url = health_url
        log.parent.mkdir(parents=True, exist_ok=True)
        output: BinaryIO
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def require_alive(self) -> None:
        """Check that the program runs.

        Raises:
            DemoError: If it has ended; the message has the last lines that it printed.
        """
        code = self._process.poll()
        if code is None:
            return
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        raise DemoError(
            f"{self.name} has stopped (exit code {code}); the end of {self.log}:\n"
            + "\n".join(f"    {line}" for line in lines)
        )

    def is_healthy(self) -> bool:
        """Whether the program answers on its health address."""
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy has no business between here and localhost
                return session.get(self.health_url, timeout=2).status_code == 200
        except requests.RequestException:
            return False

    def terminate(self) -> None:
        """Ask the program and all that it started to end."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self, timeout_s: float = 15.0) -> None:
        """Wait for the end, and end by force what has not by then."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def demo_label_config(output: str) -> str:
    """A labelling config for smart keypoints and smart rectangles.

    Args:
        output: What the answers are: `brush` or `polygon`.
    """
    labels = "".join(f'<Label value="{name}" background="{c}"/>' for name, c in _LABELS.items())
    smart = labels.replace("/>", ' smart="true"/>')
    tag = _OUTPUT_TAGS[output]
    # smart="false": the output tag would be offered as a smart tool that never asks the backend.
    return f"""<View>
  <View style="display: flex; flex-wrap: wrap; column-gap: 3em">
    <View>
      <Header size="5" value="SAM: click"/>
      <KeyPointLabels name="kp" toName="image" smart="true" smartOnly="true">
        {smart}
      </KeyPointLabels>
    </View>
    <View>
      <Header size="5" value="SAM: drag a box"/>
      <RectangleLabels name="box" toName="image" smart="true" smartOnly="true">
        {smart}
      </RectangleLabels>
    </View>
    <View>
      <Header size="5" value="{output.capitalize()} by hand"/>
      <{tag} name="mask" toName="image" smart="false">{labels}</{tag}>
    </View>
  </View>
  <Image name="image" value="$image" zoom="true" zoomControl="true"/>
</View>"""


def sample_images() -> list[Path]:
    """The images that come with the package."""
    return sorted((Path(__file__).parent / "samples" / "images").glob("*.jpg"))


def label_studio_child(
    executable: Path, folder: Path, *, host: str, port: int, email: str, password: str
) -> Child:
    """Start Label Studio on SQLite, without any call to the outside.

    Args:
        executable: `label-studio`.
        folder: Gets its data, its home and its log.
        host: Where it listens.
        port: Must be free: Label Studio would silently take the next one.
        email: The administrator, created at the first start.
        password: The administrator's password at the first start.
    """
    data, home = folder / "label-studio", folder / "home"
    data.mkdir(parents=True, exist_ok=True)
    # label_studio_sdk reads files under ~/.local/share/label-studio as if they were this one's.
    home.mkdir(exist_ok=True)
    # Label Studio reads its settings under bare names too (HOST, PORT, DEBUG): it gets only these.
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    environ = kept | {
        "HOME": str(home.resolve()),
        "LABEL_STUDIO_BASE_DATA_DIR": str(data.resolve()),
        "LABEL_STUDIO_USERNAME": email,
        "LABEL_STUDIO_PASSWORD": password,
        "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "0",
        "LATEST_VERSION_CHECK": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "PYTHONUNBUFFERED": "1",
    }
    return Child(
        "Label Studio",
        [executable, "start", "--no-browser", "--internal-host", host, "--port", str(port)],
        environ=environ,
        log=folder / "logs" / "label-studio.log",
        health_url=f"http://localhost:{port}/health",
    )


def backend_child(
    folder: Path, *, port: int, label_studio_url: str, token: str, environ: Mapping[str, str]
) -> Child:
    """Start the backend as `sam-ml-backend serve` does, for this machine only.

    Args:
        folder: Gets its data and its log.
        port: Where it listens.
        label_studio_url: Label Studio's address.
        token: What opens it.
        environ: Further settings; those above win.
    """
    settings = {
        "DATA_DIR": str((folder / "backend").resolve()),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "LABEL_STUDIO_URL": label_studio_url,
        "LABEL_STUDIO_API_KEY": token,
    }
    return Child(
        "The backend",
        [sys.executable, "-m", "ml_backend.cli", "serve"],
        environ={**environ, **settings},
        log=folder / "logs" / "backend.log",
        health_url=f"http://127.0.0.1:{port}/health",
    )


def wait_until_healthy(children: Sequence[Child], *, stop: threading.Event) -> None:
    """Wait until all answer on their health address.

    Raises:
        DemoError: If one of them ends before it does.
    """
    waiting = list(children)
    while waiting:
        for child in children:
            child.require_alive()
        waiting = [child for child in waiting if not child.is_healthy()]
        if waiting and stop.wait(_POLL_S):
            raise _StoppedError


def create_access_token(url: str, *, email: str, password: str) -> str:
    """Log in as the browser does and create the user's personal access token.

    Raises:
        DemoError: If the log-in or the token is refused.
    """
    login_url = f"{url}/user/login/"
    with requests.Session() as session:
        session.trust_env = False
        session.get(login_url, timeout=30)
        form = {
            "email": email,
            "password": password,
            "csrfmiddlewaretoken": session.cookies.get("csrftoken", ""),
        }
        answer = session.post(login_url, data=form, timeout=30, allow_redirects=False)
        if not answer.is_redirect:
            raise DemoError(
                f"the log-in of {email} at {login_url} must be accepted, got status "
                f"{answer.status_code}; if the password was changed, delete the demo's folder"
            )
        headers = {"X-CSRFToken": session.cookies.get("csrftoken", "")}
        answer = session.post(f"{url}/api/token/", headers=headers, timeout=30)
    if not answer.ok:
        raise DemoError(
            f"{url}/api/token/ must create an access token for {email}, got status "
            f"{answer.status_code}: {answer.text[:200]}; delete the demo's folder to start anew"
        )
    return str(answer.json()["token"])


def run_demo(config: DemoConfig, *, say: Callable[[str], None], stop: threading.Event) -> None:
    """Run the demo until it is stopped; the second start keeps and repeats nothing.

    Args:
        config: Where and on which ports.
        say: Gets a line for the user.
        stop: Set from a signal handler: everything is stopped and the function returns.

    Raises:
        DemoError: If a port is in use, Label Studio is not installed, or a program ends by itself.
        BackendError: If a setting is wrong, or Label Studio refuses a step.
    """
    if not config.label_studio.is_file():
        raise DemoError(
            f"--label-studio must be Label Studio's executable, got {config.label_studio}, which "
            "is no file; run `make`, which installs it"
        )
    if config.port == config.backend_port:
        raise DemoError(f"--port and --backend-port must differ, got {config.port} for both")
    _require_free_port("--port", config.host, config.port)
    _require_free_port("--backend-port", "127.0.0.1", config.backend_port)
    settings = load_settings()

    config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = _read_state(config.folder)
    children: list[Child] = []
    try:
        url = f"http://localhost:{config.port}"
        first = "" if state.token else " (the first start takes about a minute)"
        say(f"Starting Label Studio at {url}{first}")
        children.append(
            label_studio_child(
                config.label_studio,
                config.folder,
                host=config.host,
                port=config.port,
                email=state.email,
                password=state.password,
            )
        )
        if state.token is None:
            wait_until_healthy(children, stop=stop)
            token = create_access_token(url, email=state.email, password=state.password)
            state = _write_state(config.folder, replace(state, token=token))
        assert state.token is not None
        backend_url = f"http://127.0.0.1:{config.backend_port}"
        say(f"Starting the backend at {backend_url} with {settings.sam_model}")
        children.append(
            backend_child(
                config.folder,
                port=config.backend_port,
                label_studio_url=url,
                token=state.token,
                environ=os.environ,
            )
        )
        wait_until_healthy(children, stop=stop)
        client = ProjectClient(url, state.token)
        state = _fill(client, config.folder, state)
        for project_id in state.projects.values():
            connect(
                client,
                project_id,
                backend_url,
                title=_BACKEND_TITLE,
                basic_auth=basic_auth_of(settings),
            )
        say(_summary(config, state, url=url))
        while not stop.wait(1.0):
            for child in children:
                child.require_alive()
    except _StoppedError:
        pass
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
    say("Stopped.")


def _fill(client: ProjectClient, folder: Path, state: _State) -> _State:
    """Create the projects that are missing, each with the sample images, and remember them."""
    existing = {project["id"]: project for project in client.list_projects()}
    projects = {
        output: project_id
        for output, project_id in state.projects.items()
        if project_id in existing
    }
    for output in _OUTPUT_TAGS:
        if output in projects:
            continue
        # A start that was interrupted may have left it without being remembered.
        title = f"SAM demo: {output}"
        found = [project for project in existing.values() if project["title"] == title]
        project = found[0] if found else client.create_project(title, demo_label_config(output))
        if not project.get("task_number"):
            client.import_files(project["id"], sample_images())
        projects[output] = project["id"]
    return _write_state(folder, replace(state, projects=projects))


def _summary(config: DemoConfig, state: _State, *, url: str) -> str:
    projects = "\n".join(
        f"  {output + ' project':<17}{url}/projects/{project_id}/data"
        for output, project_id in state.projects.items()
    )
    return f"""
Ready.
  {"Label Studio":<17}{url}
  {"user":<17}{state.email}
  {"password":<17}{state.password}
{projects}
  {"status page":<17}http://127.0.0.1:{config.backend_port}
  {"logs":<17}{config.folder / "logs"}

Open a task, switch Auto-Annotation on, choose keypoint or rectangle under Auto-Detect (the lowest
tool), choose a label, and click or drag.
Ctrl-C stops everything; what you do stays in {config.folder}."""


def _require_free_port(option: str, host: str, port: int) -> None:
    reason = "another program answers there"
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            # Without it, what is left of the last start's connections would block the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, port))
            except OSError as error:
                reason = str(error.strerror)
            else:
                return
    raise DemoError(
        f"{option} must be a free port, got {port} ({reason}); stop the program that uses it, or "
        f"choose another port: make demo DEMO_ARGS='{option} {port + 1}'"
    )


def _read_state(folder: Path) -> _State:
    path = folder / "demo.json"
    if path.exists():
        try:
            return _State(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise DemoError(
                f"{path} must be what an earlier start wrote, got something else ({error}); "
                f"delete {folder} to start anew"
            ) from error
    return _write_state(
        folder, _State(email="admin@example.com", password=secrets.token_urlsafe(12))
    )


def _write_state(folder: Path, state: _State) -> _State:
    """Write what is remembered, for the user's eyes only."""
    path = folder / "demo.json"
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(state), file, indent=2)
    temporary.replace(path)
    return state
