from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from filelock import FileLock
from typer.testing import CliRunner

from ml_backend.cli import app, gunicorn_command
from ml_backend.jobs import JobStore
from ml_backend.registry import Registry
from ml_backend.settings import Settings
from sam_ext.checkpoints import save_checkpoint
from tests.conftest import build_small_sam
from tests.ml_backend.backend import encoded, random_image
from tests.ml_backend.servers import Answer, FakeLabelStudio

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a command with these variables and none of the settings that this machine has."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, **variables: str):
        return CliRunner().invoke(app, list(arguments), env=variables)

    return call


def test_gunicorn_is_started_with_the_settings(tmp_path):
    settings = Settings(data_dir=tmp_path, host="10.0.0.1", port=9191, workers=2, threads=16)
    assert gunicorn_command(settings) == [
        *(sys.executable, "-m", "gunicorn"),
        "--bind=10.0.0.1:9191",
        "--worker-class=gthread",
        "--workers=2",
        "--threads=16",
        "--timeout=0",
        "--graceful-timeout=30",
        "--log-level=info",
        "--no-control-socket",
        "ml_backend.wsgi:application()",
    ]


def test_an_ipv6_address_is_bracketed(tmp_path):
    assert "--bind=[::]:9090" in gunicorn_command(Settings(data_dir=tmp_path, host="::"))


@pytest.mark.parametrize(
    "command", [c.name or c.callback.__name__ for c in app.registered_commands]
)
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_a_wrong_setting_is_one_sentence(run):
    result = run("serve", PORT="none")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.output.startswith("error: PORT must be ")
    assert result.output.endswith(", got 'none'\n")


def test_published_weights_that_may_not_be_downloaded_are_one_sentence(run, tmp_path):
    result = run("serve", SAM_MODEL="vit_b", SAM_OFFLINE="1", DATA_DIR=str(tmp_path))
    assert result.exit_code == 1
    assert result.output.startswith(f"error: {tmp_path}/weights/sam_vit_b_01ec64.pth must be there")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        pytest.param(["--token", "x"], "--url", id="url"),
        pytest.param(["--url", "http://127.0.0.1:1"], "--token", id="token"),
    ],
)
@pytest.mark.parametrize("command", ["connect", "warm", "train"])
def test_it_says_which_of_its_two_needs_is_missing(run, command, given, missing):
    result = run(command, "--project", "1", *given)
    assert result.exit_code == 2
    assert f"{missing} is needed, or its environment variable" in result.output


def test_connect_to_nobody_is_one_sentence(run):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    result = run("connect", "--project", "1", "--url", url, "--token", "x")
    assert result.exit_code == 1
    assert result.output.startswith(f"error: Label Studio must answer at {url}/api/ml/")


@pytest.fixture
def label_studio(monkeypatch):
    monkeypatch.setattr(os, "nice", lambda _: 0)  # there is no way back
    with FakeLabelStudio() as server:
        config = '<View><Image name="image" value="$image"/></View>'
        server.projects = [
            {
                "id": 1,
                "created_at": "1970-01-01T00:00:05Z",
                "label_config": config,
                "task_number": 2,
            }
        ]
        for number in (1, 2):
            path = f"/data/upload/1/{number}.png"
            server.routes[path] = Answer(encoded(random_image(number, size_hw=(40, 56))))
            server.tasks.append({"id": number, "project": 1, "data": {"image": path}})
        yield server


def test_warm_says_what_came_of_it_and_fails_if_one_image_did(run, tmp_path, label_studio):
    path = tmp_path / "small.safetensors"
    save_checkpoint(build_small_sam(), path, metadata={})
    variables = {"SAM_MODEL": str(path), "DATA_DIR": str(tmp_path)}
    address = ("--url", label_studio.url, "--token", label_studio.personal_access_token)

    result = run("warm", "--project", "1", *address, **variables)
    assert result.exit_code == 0, result.output
    assert "2/2" in result.output
    assert f"2 embedded, 0 were there, 0 failed, in {tmp_path}/embeddings" in result.output

    label_studio.tasks[0]["data"]["image"] = "/data/upload/1/gone.png"
    result = run("warm", "--project", "1", *address, **variables)
    assert result.exit_code == 1
    assert "0 embedded, 1 were there, 1 failed" in result.output
    assert "task 1: fetch: '/data/upload/1/gone.png' must be" in result.output

    result = run("warm", "--project", "1", *address, **variables, EMBEDDING_DISK_BYTES="60000")
    assert "EMBEDDING_DISK_BYTES must be at least" not in result.output


def test_versions_and_rollback_say_what_is_served(run, tmp_path):
    registry = Registry(tmp_path / "projects", keep=9)
    (tmp_path / "adapter").write_bytes(b"adapter")
    versions = registry.project("1.5")
    names = [
        versions.add(tmp_path / "adapter", {"model": "tiny", "method": method}).model_version
        for method in ("wesam", "lora", "sam-adapter")
    ]
    versions.activate(1)
    versions.activate(3)
    variables = {"DATA_DIR": str(tmp_path), "COLUMNS": "200"}

    def shown() -> list[list[str]]:
        result = run("versions", "--project", "1", **variables)
        assert result.exit_code == 0
        assert "project 1.5" in result.output
        rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
        return [[cell.strip() for cell in (row[2], row[3], row[5])] for row in rows]

    assert shown() == [
        ["the base model", "", ""],
        [names[0], "wesam", "rollback returns to it"],
        [names[1], "lora", ""],
        [names[2], "sam-adapter", "active"],
    ]
    result = run("rollback", "--project", "1.5", **variables)
    assert result.output == f"Project 1.5 is served by {names[0]} again.\n"
    assert shown()[:2] == [
        ["the base model", "", "rollback returns to it"],
        [names[0], "wesam", "active"],
    ]
    result = run("rollback", "--project", "1", **variables)
    assert result.output == "Project 1.5 is served by the base model again.\n"
    assert shown()[0] == ["the base model", "", "active"]
    result = run("rollback", "--project", "1", **variables)
    assert result.exit_code == 1
    assert "there is nothing to roll back" in result.output
    for command in ("versions", "rollback"):
        result = run(command, "--project", "7", **variables)
        assert result.output.startswith("error: project must name one project that has versions")


def test_the_doctor_shows_a_table_and_fails_when_something_does(run, tmp_path):
    result = run("doctor", SAM_MODEL="nothing.pth", DATA_DIR=str(tmp_path), COLUMNS="300")
    assert result.exit_code == 1
    rows = [line for line in result.output.splitlines() if "weights" in line]
    assert len(rows) == 1
    assert "failure" in rows[0]
    assert "got 'nothing.pth'" in rows[0]


def test_the_doctor_is_content_with_warnings(run, tmp_path):
    path = tmp_path / "small[x].safetensors"  # no markup of the table's
    save_checkpoint(build_small_sam(), path, metadata={})
    result = run("doctor", SAM_MODEL=str(path), DATA_DIR=str(tmp_path), COLUMNS="300")
    assert result.exit_code == 0
    assert "small[x].safetensors" in result.output


class Served:
    """`serve` as a process of its own."""

    def __init__(self, folder: Path, **variables: str) -> None:
        model = folder / "small.safetensors"
        save_checkpoint(build_small_sam(), model, metadata={})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environ = {
            **os.environ,
            "SAM_MODEL": str(model),
            "DATA_DIR": str(folder / "data"),
            "HOST": "127.0.0.1",
            "PORT": str(port),
            **variables,
        }
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ml_backend.cli", "serve"],
                cwd=ROOT,
                env=environ,
                stdout=output,
                stderr=output,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        while text not in self.log:
            assert self.process.poll() is None, self.log
            time.sleep(0.05)


@pytest.fixture
def serve(tmp_path):
    started = []

    def call(**variables: str) -> Served:
        started.append(Served(tmp_path, **variables))
        return started[-1]

    yield call
    for served in started:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
        served.process.wait(60)


def test_serve_without_a_worker_becomes_gunicorn_and_ends_when_told_to(serve):
    served = serve(WORKER="false")
    served.wait_for("Booting worker")
    health = requests.get(f"{served.url}/health", timeout=120).json()
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    assert health["status"] == "UP"
    assert f"Listening at: {served.url} ({served.process.pid})" in served.log
    assert "the worker waits" not in served.log


def test_serve_runs_a_worker_beside_gunicorn_brings_it_back_and_ends_both(serve):
    served = serve()
    served.wait_for("the worker waits for jobs")
    (number,) = re.findall(r"the worker waits for jobs \(process (\d+)\)", served.log)
    os.kill(int(number), signal.SIGKILL)
    served.wait_for("the worker has ended (exit code -9); it is started again in 1 s")
    served.wait_for("Booting worker")
    assert requests.get(f"{served.url}/health", timeout=120).json()["status"] == "UP"
    while len(numbers := re.findall(r"waits for jobs \(process (\d+)\)", served.log)) < 2:
        assert served.process.poll() is None, served.log
        time.sleep(0.05)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(numbers[1]), 0)


def test_a_second_worker_is_one_sentence(run, tmp_path):
    (tmp_path / "data").mkdir()
    with FileLock(tmp_path / "data" / "worker.lock"):
        result = run("worker", DATA_DIR=str(tmp_path / "data"))
    assert result.exit_code == 1
    assert result.output.startswith(f"error: DATA_DIR must have one worker, but in {tmp_path}/data")


def test_train_queues_a_job_once(run, tmp_path, label_studio):
    label_studio.projects[0]["created_at"] = "2026-11-20T17:12:19.284185Z"
    address = ("--url", label_studio.url, "--token", label_studio.personal_access_token)
    result = run("train", "--project", "1", *address, DATA_DIR=str(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.output == (
        f"Job 1 is queued in {tmp_path}: a training of project 1.1795194739, method auto.\n"
        f"No worker runs on {tmp_path}: start one with `serve` or `worker`, or set DATA_DIR to the "
        "service's folder\n"
    )
    (job,) = JobStore(tmp_path).jobs()
    assert (job.project, job.trigger, job.method) == ("1.1795194739", "command", "auto")

    result = run("train", "--project", "1", *address, DATA_DIR=str(tmp_path))
    assert result.exit_code == 1
    assert result.output.startswith("error: project 1.1795194739 must have no other job under way")


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        pytest.param(["--method", "sam-adapter"], "sam-adapter", id="as-asked"),
        pytest.param([], "wesam", id="as-the-model-page-says"),
    ],
)
def test_train_is_told_how(run, tmp_path, label_studio, arguments, method):
    label_studio.projects[0]["created_at"] = "2026-11-20T17:12:19.284185Z"
    (tmp_path / "connections").mkdir()
    known = {"hostname": label_studio.url, "access_token": "", "train_method": "wesam"}
    (tmp_path / "connections" / "1.1795194739.json").write_text(json.dumps(known))
    address = ("--url", label_studio.url, "--token", label_studio.personal_access_token)
    variables = {"DATA_DIR": str(tmp_path), "TRAIN_METHOD": "lora"}
    with FileLock(tmp_path / "worker.lock"):
        result = run("train", "--project", "1", *arguments, *address, **variables)
    assert result.exit_code == 0, result.output
    assert "No worker" not in result.output
    assert JobStore(tmp_path).get(1).method == method


def test_a_method_that_is_none_is_refused(run):
    result = run("train", "--project", "1", "--method", "dora", "--url", "http://x", "--token", "x")
    assert result.exit_code == 2
    assert "'dora' is not one of" in result.output
    assert "sam-adapter" in result.output
