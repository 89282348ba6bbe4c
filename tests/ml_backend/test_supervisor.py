"""Two small programs that are kept running together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
FOR_EVER = "while :; do sleep 0.02; done"


@pytest.fixture
def supervise(tmp_path):
    """Starts a supervisor of two shell programs, in a folder of their own."""
    processes = []

    def call(server: str, worker: str, **policy: float):
        code = (
            "import logging, sys; logging.basicConfig();"
            "from ml_backend.supervisor import RestartPolicy, supervise;"
            f"sys.exit(supervise({['sh', '-c', server]}, {['sh', '-c', worker]}, "
            f"policy=RestartPolicy(**{policy})))"
        )
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environ, stderr=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield call
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def on_term(then: str) -> str:
    return f"trap '{then}' TERM INT; "


def test_the_servers_end_is_the_end_and_the_worker_is_told(supervise, tmp_path):
    worker = on_term("touch told; exit 0") + "touch works; " + FOR_EVER
    process = supervise("while [ ! -e works ]; do sleep 0.02; done; exit 7", worker)
    assert process.wait(PATIENCE_S) == 7
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_on_to_both(supervise, tmp_path, number):
    server = on_term("touch server-told; exit 3") + "touch serves; " + FOR_EVER
    worker = on_term("touch worker-told; exit 0") + "touch works; " + FOR_EVER
    process = supervise(server, worker)
    for name in ("serves", "works"):
        wait_for(tmp_path / name)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 3
    assert (tmp_path / "server-told").exists()
    assert (tmp_path / "worker-told").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of this")
def test_both_are_told_when_the_supervisor_is_killed(supervise, tmp_path):
    server = on_term("touch server-told; exit 3") + "touch serves; " + FOR_EVER
    worker = on_term("touch worker-told; exit 0") + "touch works; " + FOR_EVER
    process = supervise(server, worker)
    for name in ("serves", "works"):
        wait_for(tmp_path / name)
    process.kill()
    for name in ("server-told", "worker-told"):
        wait_for(tmp_path / name)


def test_a_worker_that_dies_comes_back_later_and_later(supervise, tmp_path):
    worker = "echo run >> runs; [ $(wc -l < runs) -ge 5 ] && touch enough; exit 9"
    server = "while [ ! -e enough ]; do sleep 0.02; done; exit 0"
    process = supervise(server, worker, first_pause_s=0.01, longest_pause_s=0.04)
    _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert b"the worker has ended (exit code 9); it is started again in 0.01 s" in log
    pauses = re.findall(r"started again in ([\d.]+) s", log.decode())
    assert [float(pause) for pause in pauses[:4]] == [0.01, 0.02, 0.04, 0.04]


def test_the_pauses_begin_anew_after_a_sound_life(supervise, tmp_path):
    worker = "echo run >> runs; [ $(wc -l < runs) -ge 4 ] && touch enough; exit 9"
    server = "while [ ! -e enough ]; do sleep 0.02; done; exit 0"
    process = supervise(server, worker, first_pause_s=0.01, sound_after_s=0.0)
    _, log = process.communicate(timeout=PATIENCE_S)
    assert set(re.findall(r"again in ([\d.]+) s", log.decode())) == {"0.01"}


def test_a_worker_that_does_not_listen_is_killed(supervise, tmp_path):
    worker = "trap '' TERM; echo $$ > works; " + FOR_EVER
    process = supervise("while [ ! -e works ]; do sleep 0.02; done; exit 0", worker, grace_s=0.1)
    assert process.wait(PATIENCE_S) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "works").read_text()), 0)


def test_a_server_that_was_killed_is_told_as_a_shell_does(supervise):
    assert supervise("kill -9 $$", FOR_EVER, grace_s=5.0).wait(PATIENCE_S) == 137
