"""Keeps the service and its worker running together: `serve` is these two processes."""

from __future__ import annotations

import ctypes
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RestartPolicy", "supervise"]

_log = logging.getLogger(__name__)

_POLL_S = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """When a worker that has ended is started again, and how long it may take to end."""

    first_pause_s: float = 1.0
    """Before the first restart; each further one waits twice as long."""
    longest_pause_s: float = 60.0
    sound_after_s: float = 60.0
    """A worker that lived so long was no failure at the start: the pauses begin anew."""
    grace_s: float = 30.0
    """A worker that has not ended by then, when the service has, is killed."""


def supervise(
    server: Sequence[str], worker: Sequence[str], *, policy: RestartPolicy | None = None
) -> int:
    """Run both until the server ends; it has to be called in the main thread.

    SIGTERM and SIGINT go on to both, SIGHUP as SIGTERM. On Linux both get SIGTERM also if this
    process is killed, so that neither keeps its port or its lock.

    Args:
        server: The command line of what serves.
        worker: That of what trains; started again when it ends.
        policy: When.

    Returns:
        The server's exit code, as a shell has it: 128 and the number of the signal that ended it.
    """
    return _Supervisor(server, worker, policy or RestartPolicy()).run()


class _Supervisor:
    def __init__(self, server: Sequence[str], worker: Sequence[str], policy: RestartPolicy) -> None:
        self._policy = policy
        self._worker_command = worker
        self._received: list[int] = []
        self._is_stopping = False
        self._pause_s = policy.first_pause_s
        self._restart_at: float | None = None
        for number in _SIGNALS:
            signal.signal(number, lambda received, _frame: self._received.append(received))
        self._server = _start(server)
        self._start_worker()

    def run(self) -> int:
        """Wait for the server's end, and then for the worker's."""
        try:
            while (code := self._server.poll()) is None:
                self._forward()
                self._look_after_worker()
                time.sleep(_POLL_S)
        finally:
            self._end_worker()
        return code if code >= 0 else 128 - code

    def _forward(self) -> None:
        while self._received:
            number = self._received.pop(0)
            self._is_stopping = True
            for child in (self._server, self._worker):
                # gunicorn would take SIGHUP for the wish to start anew.
                child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _start_worker(self) -> None:
        self._worker = _start(self._worker_command)
        self._worker_since = time.monotonic()

    def _look_after_worker(self) -> None:
        code = self._worker.poll()
        if code is None or self._is_stopping:
            return
        now = time.monotonic()
        if self._restart_at is None:
            if now - self._worker_since >= self._policy.sound_after_s:
                self._pause_s = self._policy.first_pause_s
            _log.warning(
                "the worker has ended (exit code %d); it is started again in %g s",
                code,
                self._pause_s,
            )
            self._restart_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._policy.longest_pause_s)
        elif now >= self._restart_at:
            self._restart_at = None
            self._start_worker()

    def _end_worker(self) -> None:
        self._worker.terminate()
        try:
            self._worker.wait(self._policy.grace_s)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one."""
    if sys.platform != "linux":
        return subprocess.Popen(command)
    library = ctypes.CDLL(None)  # loaded before the fork: after it there is no time for locks
    return subprocess.Popen(
        command, preexec_fn=lambda: library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    )
