"""Training jobs: what is asked for and what became of it, and the queue that wakes the worker.

`jobs.db` says what a job is; the queue only says that one is due. So nothing is lost with the
queue, and a message that comes twice, or for a job that is over, does nothing.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from huey import RedisHuey, SqliteHuey
from huey.exceptions import HueyException
from redis.exceptions import RedisError

from ml_backend.errors import JobExistsError, JobNotFoundError, JobsUnavailableError
from ml_backend.settings import Settings, TrainMethod

__all__ = [
    "UNFINISHED",
    "Job",
    "JobQueue",
    "JobState",
    "JobStore",
    "Trigger",
    "has_worker",
    "worker_lock",
]

JobState = Literal["queued", "running", "judging", "promoted", "rejected", "failed", "cancelled"]
Trigger = Literal["start_training", "annotations", "command"]

UNFINISHED: tuple[JobState, ...] = ("queued", "running", "judging")
"""The states of a job that something will still happen to."""

_BUSY_S = 5.0
_STALLED_ATTEMPTS = 3
_IDLE_POLL_S = 2.0  # a queue in a file is looked at, it does not call

_QUEUE_ERRORS = (HueyException, OSError, RedisError, sqlite3.Error)
_AWAY_S = 60.0

_METHOD_COLUMN = "method TEXT NOT NULL DEFAULT 'auto'"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    project TEXT NOT NULL,
    trigger TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0,
    progress TEXT NOT NULL DEFAULT '{{}}',
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    version INTEGER,
    best_step INTEGER NOT NULL DEFAULT 0,
    step_at_start INTEGER NOT NULL DEFAULT 0,
    stalled INTEGER NOT NULL DEFAULT 0,
    {_METHOD_COLUMN}
);
CREATE UNIQUE INDEX IF NOT EXISTS one_unfinished ON jobs (project) WHERE state IN {UNFINISHED};
CREATE TABLE IF NOT EXISTS annotations (
    project TEXT NOT NULL,
    annotation INTEGER NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (project, annotation)
);
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of one project. Times are seconds since 1970."""

    id: int
    project: str
    """The project as Label Studio names it: `1.1795194739`."""
    trigger: Trigger
    """What asked for it: the button, a number of annotations, or the command line."""
    method: TrainMethod
    """How it was asked to be done; `progress` says what `auto` came to."""
    state: JobState
    reason: str
    """Why it ended as it did, one sentence; empty before."""
    created_at: float
    started_at: float | None
    """When it was first begun."""
    finished_at: float | None
    attempt: int
    """How often it was begun; more than once after the worker was stopped in the middle."""
    progress: dict[str, Any] = field(default_factory=dict)
    """`phase` in words, `method` and `method_reason`, `step`, `steps`, `losses` by name, `mean_iou`
    as averaged over the last steps, `eta_s`, `curve` with the losses and `mean_iou` of some of the
    steps, then `judged` and `to_judge`, images; what is not known yet is not there."""
    cancel_requested: bool
    version: int | None
    """The version that it made, also where that one was not promoted."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state not in UNFINISHED


class JobStore:
    """All jobs, in `DATA_DIR/jobs.db`; safe from several threads and processes."""

    def __init__(self, data_dir: Path) -> None:
        """Open the store, and create it at the first time.

        Raises:
            JobsUnavailableError: If it cannot be read and written.
        """
        data_dir.mkdir(parents=True, exist_ok=True)
        self._path = data_dir / "jobs.db"
        self._lock = threading.Lock()
        # Kept open: the last one that closes the file writes all of it to the disk.
        self._database = sqlite3.connect(self._path, timeout=_BUSY_S, check_same_thread=False)
        weakref.finalize(self, self._database.close)
        self._database.row_factory = sqlite3.Row
        with FileLock(data_dir / "jobs.lock"), self._connection() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")  # safe with that journal
            connection.executescript(_SCHEMA)
            columns = connection.execute("PRAGMA table_info(jobs)").fetchall()
            if "method" not in {column["name"] for column in columns}:  # of an earlier version
                connection.execute(f"ALTER TABLE jobs ADD COLUMN {_METHOD_COLUMN}")

    def create(self, project: str, trigger: Trigger, method: TrainMethod = "auto") -> Job:
        """Note a new job, queued.

        Raises:
            JobExistsError: If the project has a job that is not finished.
        """
        with self._connection() as connection:
            try:
                number = connection.execute(
                    "INSERT INTO jobs (project, trigger, method, state, created_at) "
                    "VALUES (?, ?, ?, 'queued', ?)",
                    (project, trigger, method, time.time()),
                ).lastrowid
            except sqlite3.IntegrityError:
                number = None
        if number is not None:
            return self.get(number)
        running = self.unfinished(project)
        if running is None:  # it ended just now
            return self.create(project, trigger, method)
        raise JobExistsError(
            f"project {project} must have no other job under way, got job {running.id} "
            f"({running.state}); wait for its end, or cancel it",
            job_id=running.id,
        )

    def get(self, job_id: int) -> Job:
        """Look a job up.

        Raises:
            JobNotFoundError: If there is none of that number.
        """
        found = self._select("WHERE id = ?", job_id)
        if not found:
            raise JobNotFoundError(f"job must be the number of a job, got {job_id}")
        return found[0]

    def jobs(self, project: str | None = None, *, limit: int = 50) -> list[Job]:
        """List jobs, the newest first.

        Args:
            project: Only those of this project.
            limit: At most so many.
        """
        if project is None:
            return self._select("ORDER BY id DESC LIMIT ?", limit)
        return self._select("WHERE project = ? ORDER BY id DESC LIMIT ?", project, limit)

    def unfinished(self, project: str) -> Job | None:
        """Give the project's job that is not finished; there is one at most."""
        found = self._select(f"WHERE project = ? AND state IN {UNFINISHED}", project)
        return found[0] if found else None

    def queued(self) -> list[Job]:
        """List the jobs that wait for the worker, the oldest first."""
        return self._select("WHERE state = 'queued' ORDER BY id")

    def under_way(self) -> list[Job]:
        """List the jobs that the worker is at."""
        return self._select("WHERE state IN ('running', 'judging') ORDER BY id")

    def cancel(self, job_id: int) -> Job:
        """Ask for a job's end: at once if it waits, after its step if it runs, else no change.

        Raises:
            JobNotFoundError: If there is no such job.
        """
        self._write(
            "UPDATE jobs SET state = 'cancelled', reason = 'cancelled before it began', "
            "finished_at = ?, cancel_requested = 1 WHERE id = ? AND state = 'queued'",
            time.time(),
            job_id,
        )
        self._write(
            f"UPDATE jobs SET cancel_requested = 1 WHERE id = ? AND state IN {UNFINISHED}", job_id
        )
        return self.get(job_id)

    def start(self, job_id: int) -> Job | None:
        """Begin a queued job, or begin it again; None if it is not queued any more."""
        began = self._write(
            "UPDATE jobs SET state = 'running', attempt = attempt + 1, step_at_start = best_step, "
            "started_at = coalesce(started_at, ?) WHERE id = ? AND state = 'queued'",
            time.time(),
            job_id,
        )
        return self.get(job_id) if began else None

    def report(
        self, job_id: int, progress: Mapping[str, Any], *, state: JobState = "running"
    ) -> bool:
        """Note how far a job is.

        Args:
            job_id: The job.
            progress: Replaces what it said before.
            state: `running` or `judging`.

        Returns:
            Whether the job is to go on: False once it was cancelled.
        """
        self._write(
            "UPDATE jobs SET progress = ?, state = ?, best_step = max(best_step, ?) "
            f"WHERE id = ? AND state IN {UNFINISHED}",
            json.dumps(progress),
            state,
            int(progress.get("step", 0)),
            job_id,
        )
        job = self.get(job_id)
        return not job.cancel_requested and not job.is_finished

    def finish(
        self, job_id: int, state: JobState, reason: str, *, version: int | None = None
    ) -> Job:
        """Note a job's end; a job that is finished stays as it is.

        Args:
            job_id: The job.
            state: `promoted`, `rejected`, `failed` or `cancelled`.
            reason: Why, one sentence.
            version: The version that it made.
        """
        self._write(
            "UPDATE jobs SET state = ?, reason = ?, version = ?, finished_at = ? "
            f"WHERE id = ? AND state IN {UNFINISHED}",
            state,
            reason,
            version,
            time.time(),
            job_id,
        )
        return self.get(job_id)

    def requeue(self, job_id: int) -> None:
        """Let a job that runs wait again: the worker was told to stop, and will go on with it."""
        self._write(
            "UPDATE jobs SET state = 'queued' WHERE id = ? AND state IN ('running', 'judging')",
            job_id,
        )

    def recover(self) -> list[Job]:
        """Take care of what a dead worker left; for a worker's start, when no other one runs.

        A job that was running waits again, unless it was to be cancelled, or three attempts ended
        like this without a step of progress.

        Returns:
            The jobs that were found running, as they are now.
        """
        left = self.under_way()
        for job in left:
            self._write(
                "UPDATE jobs SET stalled = CASE WHEN best_step > step_at_start THEN 0 "
                "ELSE stalled + 1 END WHERE id = ?",
                job.id,
            )
            if job.cancel_requested:
                self.finish(job.id, "cancelled", "cancelled; the worker had died meanwhile")
            elif self._stalled(job.id) >= _STALLED_ATTEMPTS:
                self.finish(
                    job.id,
                    "failed",
                    f"the worker must live through a step of the job, but died in "
                    f"{_STALLED_ATTEMPTS} attempts without one; look for the cause in its log "
                    "(often too little memory)",
                )
            else:
                self.requeue(job.id)
        return [self.get(job.id) for job in left]

    def note_annotation(self, project: str, annotation_id: int) -> int:
        """Remember that an annotation was made or changed.

        Returns:
            How many different ones that was since the last training began.
        """
        with self._connection() as connection:
            connection.execute(
                "INSERT INTO annotations VALUES (?, ?, ?) "
                "ON CONFLICT DO UPDATE SET seen_at = excluded.seen_at",
                (project, annotation_id, time.time()),
            )
            row = connection.execute(
                "SELECT count(*) AS number FROM annotations WHERE project = ?", (project,)
            ).fetchone()
        return int(row["number"])

    def last_annotation_at(self, project: str) -> float | None:
        """Tell when the newest of the noted annotations was; None without any."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT max(seen_at) AS newest FROM annotations WHERE project = ?", (project,)
            ).fetchone()
        newest: float | None = row["newest"]
        return newest

    def forget_annotations(self, project: str) -> None:
        """Count from zero: a training begins, with all annotations that there are."""
        self._write("DELETE FROM annotations WHERE project = ?", project)

    def _stalled(self, job_id: int) -> int:
        with self._connection() as connection:
            row = connection.execute("SELECT stalled FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return int(row["stalled"])

    def _select(self, clause: str, *values: object) -> list[Job]:
        with self._connection() as connection:
            rows = connection.execute(f"SELECT * FROM jobs {clause}", values).fetchall()
        return [_job(row) for row in rows]

    def _write(self, statement: str, *values: object) -> int:
        with self._connection() as connection:
            return connection.execute(statement, values).rowcount

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock, self._database:
                yield self._database
        except sqlite3.Error as error:
            raise JobsUnavailableError(
                f"{self._path} must be a database that can be read and written, got: {error}; "
                "free the disk, or check who may write there",
                is_locked="locked" in str(error),
            ) from error


def worker_lock(data_dir: Path) -> FileLock:
    """Make the lock that the one worker of a `DATA_DIR` holds; it is not taken."""
    return FileLock(data_dir / "worker.lock")


def has_worker(data_dir: Path) -> bool:
    """Say whether a worker runs on a `DATA_DIR`, on this machine."""
    lock = worker_lock(data_dir)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        project=row["project"],
        trigger=row["trigger"],
        method=row["method"],
        state=row["state"],
        reason=row["reason"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempt=row["attempt"],
        progress=json.loads(row["progress"]),
        cancel_requested=bool(row["cancel_requested"]),
        version=row["version"],
    )


class JobQueue:
    """Brings the numbers of jobs that are due to the worker: through a file, or through Redis."""

    def __init__(self, settings: Settings) -> None:
        """Open the queue that the settings name; Redis is not asked for anything yet."""
        url = settings.queue_url
        if url is not None:
            self._huey = RedisHuey("sam-jobs", results=False, url=url.get_secret_value())
        else:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
            path = settings.data_dir / "queue.db"
            self._huey = SqliteHuey("sam-jobs", results=False, filename=str(path))
        self._run: Callable[[int], None] | None = None
        self._task = self._huey.task(name="run")(self._call)

    def put(self, job_id: int, *, delay_s: float = 0.0) -> None:
        """Say that a job is due, now or later.

        Raises:
            JobsUnavailableError: If the queue does not take it.
        """
        with self._queue_errors():
            self._task.schedule(args=(job_id,), delay=delay_s)

    def clear(self) -> None:
        """Forget what is in the queue.

        Raises:
            JobsUnavailableError: If the queue does not answer.
        """
        with self._queue_errors():
            self._huey.flush()

    @contextmanager
    def consumed(self, run: Callable[[int], None]) -> Iterator[None]:
        """Call `run` with the number of each job that is due, one at a time, in a thread.

        Leaving waits for the call under way. It has to be the main thread that enters, and signals
        are to be handled by who does.
        """
        self._run = run
        consumer = self._huey.create_consumer(workers=1, periodic=False, max_delay=_IDLE_POLL_S)
        away = _AwayFilter()
        loggers = [logging.getLogger(f"huey.consumer.{name}") for name in ("Worker", "Scheduler")]
        for logger in loggers:
            logger.addFilter(away)
        consumer.start()
        try:
            yield
        finally:
            consumer.stop(graceful=True)
            for logger in loggers:
                logger.removeFilter(away)

    def close(self) -> None:
        """Let go of the file, or of Redis; a later use opens it again."""
        self._huey.storage.close()

    def _call(self, job_id: int) -> None:
        assert self._run is not None  # only `consumed` takes anything out
        self._run(job_id)

    @contextmanager
    def _queue_errors(self) -> Iterator[None]:
        try:
            yield
        except _QUEUE_ERRORS as error:
            raise JobsUnavailableError(
                f"the job queue must take and give, got: {error}; check QUEUE_URL, or that "
                "DATA_DIR can be written to"
            ) from error


class _AwayFilter(logging.Filter):
    """Says in a sentence a minute that the queue is away; huey logs a traceback every second."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at = -_AWAY_S

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten what is about the queue, or leave it out; anything else stays."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, _QUEUE_ERRORS):
            return True
        if record.created - self._said_at < _AWAY_S:
            return False
        self._said_at = record.created
        record.msg, record.args = "the job queue is away (%s); jobs wait until it is back", (error,)
        record.exc_info = record.exc_text = None
        return True
