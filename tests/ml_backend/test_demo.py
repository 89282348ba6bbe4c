from __future__ import annotations

import json
import os
import re
import select
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest

from ml_backend import demo
from ml_backend.demo import Child, DemoConfig, DemoError, create_access_token, run_demo
from tests.ml_backend.servers import Answer, Server, json_answer, redirect

# Stands in for `label-studio start … --port N`: says who it is, and never gets healthy.
FAKE_LABEL_STUDIO = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
here = pathlib.Path(os.environ["LABEL_STUDIO_BASE_DATA_DIR"])
(here / "started.json").write_text(
    json.dumps({{"pid": os.getpid(), "arguments": sys.argv[1:], "environ": dict(os.environ)}})
)
print("waiting for ever", flush=True)
signal.pause()
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def config(tmp_path):
    executable = tmp_path / "label-studio"
    executable.write_text(FAKE_LABEL_STUDIO)
    executable.chmod(0o755)
    return DemoConfig(
        folder=tmp_path / "demo",
        label_studio=executable,
        port=free_port(),
        backend_port=free_port(),
    )


def stopping_after_start(config):
    """Is set, as by Ctrl-C, once the fake Label Studio has written who it is."""
    started = config.folder / "label-studio" / "started.json"

    class Stop(threading.Event):
        def wait(self, timeout=None):
            if started.exists() and started.read_text():
                self.set()
            return super().wait(timeout)

    return Stop()


def run(config):
    """Run the demo until Label Studio is started; returns what was said and what was started."""
    said = []
    run_demo(config, say=said.append, stop=stopping_after_start(config))
    return said, json.loads((config.folder / "label-studio" / "started.json").read_text())


@pytest.mark.parametrize("option", ["--port", "--backend-port"])
def test_a_port_in_use_is_said_before_anything_starts(config, option):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = {"--port": "port", "--backend-port": "backend_port"}
        taken = DemoConfig(
            **{**vars(config), ports[option]: port},
        )
        with pytest.raises(DemoError) as caught:
            run_demo(taken, say=lambda _: None, stop=threading.Event())
    assert str(caught.value) == (
        f"{option} must be a free port, got {port} (another program answers there); stop the "
        f"program that uses it, or choose another port: make demo DEMO_ARGS='{option} {port + 1}'"
    )
    assert not config.folder.exists()


def test_one_port_for_both_is_refused(config):
    same = DemoConfig(**{**vars(config), "backend_port": config.port})
    with pytest.raises(DemoError, match=f"must differ, got {config.port} for both"):
        run_demo(same, say=lambda _: None, stop=threading.Event())


def test_a_missing_label_studio_is_said_with_what_to_do(config):
    config.label_studio.unlink()
    with pytest.raises(DemoError, match="run `make`, which installs it"):
        run_demo(config, say=lambda _: None, stop=threading.Event())


def test_a_stop_while_waiting_ends_what_was_started(config):
    said, started = run(config)
    assert not is_alive(started["pid"])
    assert said[-1] == "Stopped."


def test_label_studio_gets_its_own_home_and_none_of_the_users_variables(config, monkeypatch):
    monkeypatch.setenv("DEBUG", "true")
    monkeypatch.setenv("LABEL_STUDIO_DATABASE", "mine")
    _, started = run(config)
    environ = started["environ"]
    assert environ.keys().isdisjoint({"DEBUG", "LABEL_STUDIO_DATABASE"})
    assert Path(environ["HOME"]) == config.folder / "home"
    assert Path(environ["LABEL_STUDIO_BASE_DATA_DIR"]) == config.folder / "label-studio"
    wanted = {
        "LABEL_STUDIO_USE_DEFAULT_BANNED_SUBNETS": "false",
        "COLLECT_ANALYTICS": "0",
        "LATEST_VERSION_CHECK": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }
    assert {name: environ[name] for name in wanted} == wanted
    assert started["arguments"] == [
        *("start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(config.port))
    ]


def test_the_password_is_made_once_and_for_this_user_only(config):
    _, first = run(config)
    _, second = run(config)
    assert first["environ"]["LABEL_STUDIO_PASSWORD"] == second["environ"]["LABEL_STUDIO_PASSWORD"]
    assert len(first["environ"]["LABEL_STUDIO_PASSWORD"]) >= 12
    assert stat.S_IMODE((config.folder / "demo.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(config.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("text", ["", "{", '{"name": "x"}', "[]"])
def test_a_damaged_memory_is_named(config, text):
    config.folder.mkdir()
    (config.folder / "demo.json").write_text(text)
    with pytest.raises(DemoError, match=re.escape(str(config.folder / "demo.json"))):
        run_demo(config, say=lambda _: None, stop=threading.Event())


def test_a_program_that_ends_by_itself_is_reported_with_its_last_lines(config):
    config.label_studio.write_text(f"#!{sys.executable}\nprint('no such table')\nexit(3)\n")
    with pytest.raises(DemoError) as caught:
        run_demo(config, say=lambda _: None, stop=threading.Event())
    log = config.folder / "logs" / "label-studio.log"
    assert str(caught.value) == (
        f"Label Studio has stopped (exit code 3); the end of {log}:\n    no such table"
    )


def test_what_a_program_has_started_ends_with_it_however_stubborn(tmp_path):
    """Both hold the pipe open for as long as they live."""
    pipe, script = tmp_path / "pipe", tmp_path / "stubborn.py"
    os.mkfifo(pipe)
    script.write_text(f"""
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
os.write(os.open({str(pipe)!r}, os.O_WRONLY), b"x")
signal.pause()
""")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = Child(
        "it",
        [sys.executable, script],
        environ=os.environ,
        log=tmp_path / "log",
        health_url="http://localhost:1",
    )
    started = b""
    while started != b"xx":
        child.require_alive()
        if select.select([reader], [], [], 0.1)[0]:
            started += os.read(reader, 2)
    child.terminate()
    child.wait(timeout_s=0.1)
    has_ended, _, _ = select.select([reader], [], [], 30)
    assert has_ended
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_an_access_token_is_made_as_the_browser_makes_it():
    with Server() as server:
        server.routes["/user/login/"] = lambda request: (
            Answer(headers={"Set-Cookie": "csrftoken=one"})
            if request.method == "GET"
            else redirect("/projects/")
        )
        server.routes["/api/token/"] = json_answer({"token": "a.b.c"}, 201)
        token = create_access_token(server.url, email="admin@example.com", password="secret")
    assert token == "a.b.c"
    _, login, create = server.requests
    assert login.body == b"email=admin%40example.com&password=secret&csrfmiddlewaretoken=one"
    assert create.headers["x-csrftoken"] == "one"


def test_a_refused_log_in_says_what_to_do():
    with Server() as server:
        server.routes["/user/login/"] = Answer(b"wrong password")
        with pytest.raises(DemoError, match="if the password was changed"):
            create_access_token(server.url, email="admin@example.com", password="old")


def test_a_refused_token_says_what_to_do():
    with Server() as server:
        server.routes["/user/login/"] = redirect("/projects/")
        server.routes["/api/token/"] = json_answer({"detail": "You already have a token"}, 409)
        with pytest.raises(DemoError, match=r"status 409: .*You already have a token"):
            create_access_token(server.url, email="admin@example.com", password="secret")


def test_every_sample_image_is_named_with_its_licence():
    readme = (Path(demo.__file__).parent / "samples" / "README.md").read_text()
    rows = re.findall(r"^\| `(\S+\.jpg)` \| .+ \| .+ \|$", readme, re.MULTILINE)
    assert rows == [path.name for path in demo.sample_images()]
    assert 4 <= len(rows) <= 8
