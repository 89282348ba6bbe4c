"""The `sam-ml-backend` command. What it does not need at once it imports when asked to run it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from ml_backend.errors import BackendError
from ml_backend.settings import Settings, TrainMethod, load_settings
from sam_ext.config import MODELS
from sam_ext.errors import SamExtError

__all__ = ["app", "gunicorn_command"]

app = typer.Typer(
    help="SAM as a Label Studio ML backend. Settings are environment variables: see the README.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_NICENESS = 10  # of what annotators must not notice beside the service
_GRACEFUL_TIMEOUT_S = 30  # for predictions under way when the service is stopped

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="LABEL_STUDIO_URL", help="Label Studio as reached from here."),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="LABEL_STUDIO_API_KEY",
        help="A personal access token (Account & Settings). Better set than typed.",
        show_envvar=True,
    ),
]
BackendUrlOption = Annotated[
    str | None,
    typer.Option(
        "--backend-url",
        help="The backend as Label Studio reaches it; http://localhost:$PORT if not given.",
    ),
]

VersionedProjectOption = Annotated[
    str,
    typer.Option("--project", help="The number in the project's address, or 1.1795194739 in full."),
]


@contextmanager
def _errors_as_one_sentence() -> Iterator[None]:
    try:
        yield
    except (BackendError, SamExtError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def _address_and_token(url: str | None, token: str | None) -> tuple[str, str]:
    if url is None or token is None:
        missing = "--url" if url is None else "--token"
        raise typer.BadParameter(f"{missing} is needed, or its environment variable")
    return url, token


@app.command()
def serve() -> None:
    """Answer Label Studio's requests, with the worker that trains beside it."""
    from ml_backend.supervisor import supervise

    with _errors_as_one_sentence():
        settings = load_settings()
        if settings.sam_model in MODELS and settings.sam_model != "tiny":
            _download(settings)
    command = gunicorn_command(settings)
    if not settings.worker:
        os.execv(command[0], command)
    _log_to_stderr(settings)
    raise typer.Exit(supervise(command, [sys.executable, "-m", "ml_backend.cli", "worker"]))


@app.command()
def worker() -> None:
    """Train what is queued; `serve` runs one, unless WORKER is false."""
    from ml_backend.worker import run_worker

    with _errors_as_one_sentence():
        settings = load_settings()
        _log_to_stderr(settings)
        run_worker(settings)


def _log_to_stderr(settings: Settings) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for package in ("ml_backend", "sam_ext"):
        logging.getLogger(package).setLevel(settings.log_level.upper())


@app.command()
def train(
    project: Annotated[int, typer.Option("--project", help="The number in the project's address.")],
    url: UrlOption = None,
    token: TokenOption = None,
    method: Annotated[
        TrainMethod | None,
        typer.Option(help="How; if not given, as the project's Model page or TRAIN_METHOD says."),
    ] = None,
) -> None:
    """Queue a training of a project, as its Start Training button does."""
    from ml_backend.connections import Connections
    from ml_backend.jobs import JobQueue, JobStore, has_worker
    from ml_backend.label_studio import LabelStudioClient, project_name
    from ml_backend.triggers import start_job

    url, token = _address_and_token(url, token)
    with _errors_as_one_sentence():
        settings = load_settings()
        name = project_name(LabelStudioClient(url, token).get_project(project))
        jobs, queue = JobStore(settings.data_dir), JobQueue(settings)
        chosen = method or Connections(settings).method_for(name)
        job = start_job(name, "command", chosen, jobs=jobs, queue=queue)
        queue.close()
    where = settings.data_dir.resolve()
    typer.echo(f"Job {job.id} is queued in {where}: a training of project {name}, method {chosen}.")
    if not has_worker(settings.data_dir):
        typer.echo(
            f"No worker runs on {where}: start one with `serve` or `worker`, or set DATA_DIR to "
            "the service's folder",
            err=True,
        )


def _download(settings: Settings) -> None:
    """Have the published weights here before several workers want them; check them in any case."""
    from sam_ext.checkpoints import find_checkpoint

    find_checkpoint(
        settings.sam_model,
        weights_dir=settings.weights_dir,
        mirror_url=settings.sam_weights_url,
        offline=settings.sam_offline,
        progress=True,
    )


def gunicorn_command(settings: Settings) -> list[str]:
    """The command line that serves with these settings."""
    from gunicorn.config import make_settings  # type: ignore[import-untyped]  # it has no types

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    command = [
        *(sys.executable, "-m", "gunicorn"),
        f"--bind={host}:{settings.port}",
        "--worker-class=gthread",
        f"--workers={settings.workers}",
        f"--threads={settings.threads}",
        # A worker that loads a large model is not a worker that hangs.
        "--timeout=0",
        f"--graceful-timeout={_GRACEFUL_TIMEOUT_S}",
        f"--log-level={settings.log_level}",
    ]
    if "control_socket_disable" in make_settings():  # a socket in HOME, which may be read-only
        command.append("--no-control-socket")
    return [*command, "ml_backend.wsgi:application()"]


@app.command()
def connect(
    project: Annotated[int, typer.Option("--project", help="The number in the project's address.")],
    url: UrlOption = None,
    token: TokenOption = None,
    backend_url: BackendUrlOption = None,
    title: Annotated[str, typer.Option(help="The model's name in Label Studio.")] = "SAM",
) -> None:
    """Connect the backend to a Label Studio project, for interactive use."""
    from ml_backend import connect as connecting

    url, token = _address_and_token(url, token)
    with _errors_as_one_sentence():
        settings = load_settings()
        client = connecting.ProjectClient(url, token)
        backend = connecting.connect(
            client,
            project,
            backend_url or f"http://localhost:{settings.port}",
            title=title,
            basic_auth=connecting.basic_auth_of(settings),
        )
    typer.echo(
        f"{backend['title']} at {backend['url']} is connected to project {project} "
        f"({backend['model_version']}), for interactive use."
    )


@app.command()
def warm(
    project: Annotated[int, typer.Option("--project", help="The number in the project's address.")],
    url: UrlOption = None,
    token: TokenOption = None,
) -> None:
    """Embed all images of a project ahead of its annotators; resumes, and lists what failed."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ml_backend.label_studio import LabelStudioClient
    from ml_backend.loading import load_models, open_registry, open_store
    from ml_backend.warm import warm_project

    url, token = _address_and_token(url, token)
    os.nice(_NICENESS)
    columns = ("Embedding", BarColumn(), MofNCompleteColumn(), "tasks", TimeRemainingColumn())
    with _errors_as_one_sentence(), Progress(*columns) as bars:
        settings = load_settings()
        store = open_store(settings)
        bar = bars.add_task("warm", total=None)
        report = warm_project(
            LabelStudioClient(url, token),
            project,
            settings=settings,
            models=load_models(settings, registry=open_registry(settings), store=store),
            store=store,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    typer.echo(
        f"{report.embedded} embedded, {report.already_there} were there, "
        f"{len(report.failures)} failed, in {settings.embeddings_dir.resolve()}"
    )
    for failure in report.failures:
        typer.echo(failure, err=True)
    if report.nbytes > settings.embedding_disk_bytes:
        typer.echo(
            f"EMBEDDING_DISK_BYTES must be at least {report.nbytes} to hold this project, got "
            f"{settings.embedding_disk_bytes}: the first ones are gone again",
            err=True,
        )
    raise typer.Exit(1 if report.failures else 0)


@app.command()
def versions(project: VersionedProjectOption) -> None:
    """List a project's trained versions, and which one is served."""
    from rich.console import Console
    from rich.table import Table

    from ml_backend.loading import open_registry

    with _errors_as_one_sentence():
        found = open_registry(load_settings()).find_project(project)
        activated = found.activated()
        rows = [(0, "the base model", "", "")]
        for version in found.versions():
            added = datetime.fromtimestamp(version.created_at).strftime("%Y-%m-%d %H:%M")
            method = str(version.manifest.get("method", ""))
            rows.append((version.number, version.model_version, method, added))
    states = dict.fromkeys([number or 0 for number in activated[-2:-1]], "rollback returns to it")
    states[activated[-1] or 0] = "active"
    table = Table("number", "version", "method", "added", "", title=f"project {found.name}")
    for number, name, method, added in rows:
        table.add_row(str(number or ""), _escape(name), _escape(method), added, states.get(number))
    Console().print(table)


@app.command()
def rollback(project: VersionedProjectOption) -> None:
    """Have a project served again by what it was served by before."""
    from ml_backend.loading import open_registry

    with _errors_as_one_sentence():
        found = open_registry(load_settings()).find_project(project)
        version = found.rollback()
    name = "the base model" if version is None else version.model_version
    typer.echo(f"Project {found.name} is served by {name} again.")


@app.command()
def doctor(
    url: UrlOption = None,
    token: TokenOption = None,
    project: Annotated[
        int | None, typer.Option(help="A project whose config and connection to check.")
    ] = None,
    backend_url: BackendUrlOption = None,
) -> None:
    """Check weights, device, backend, Label Studio, token and project; exit 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    from ml_backend.doctor import diagnose

    with _errors_as_one_sentence():
        settings = load_settings()
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    table = Table("check", "", "found")
    failed = False
    for finding in diagnose(
        settings,
        label_studio_url=url,
        token=token,
        project_id=project,
        backend_url=backend_url or f"http://localhost:{settings.port}",
    ):
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.check, state, _escape(finding.detail))
        failed = failed or finding.state == "failure"
    Console().print(table)
    raise typer.Exit(1 if failed else 0)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def demo(
    label_studio: Annotated[
        Path, typer.Option(help="Label Studio's executable, of a virtual environment of its own.")
    ] = Path(".venv-labelstudio/bin/label-studio"),
    folder: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path(".demo"),
    host: Annotated[
        str, typer.Option(help="Where Label Studio listens; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Label Studio's port.")] = 8080,
    backend_port: Annotated[int, typer.Option(help="The backend's port.")] = 9090,
) -> None:
    """Run Label Studio and the backend with sample projects, until Ctrl-C."""
    from ml_backend.demo import DemoConfig, run_demo

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    config = DemoConfig(
        folder=folder, label_studio=label_studio, host=host, port=port, backend_port=backend_port
    )
    with _errors_as_one_sentence():
        run_demo(config, say=typer.echo, stop=stop)


if __name__ == "__main__":
    app()
