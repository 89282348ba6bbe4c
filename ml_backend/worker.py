"""The process that trains: takes jobs from the queue, one at a time, beside the service."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time

import torch
from filelock import FileLock, Timeout

from ml_backend.connections import Connections
from ml_backend.errors import JobNotFoundError, JobsUnavailableError, SettingsError
from ml_backend.fit import Methods, run_job
from ml_backend.images import ImageLoader
from ml_backend.jobs import Job, JobQueue, JobStore, worker_lock
from ml_backend.loading import open_registry
from ml_backend.settings import Settings

__all__ = ["Worker", "run_worker"]

_log = logging.getLogger(__name__)

_NICENESS = 5  # clicks come first, but a training is no idle pastime
_POLL_S = 0.2
_LOST_S = 60.0  # a job that is due for so long while nothing is done is no more in the queue
_LONGEST_DEBOUNCE = 10  # times TRAIN_DEBOUNCE_S: somebody is always annotating


def run_worker(settings: Settings) -> None:
    """Train what is queued, until SIGTERM or SIGINT; then a running job ends with its step.

    It takes half of the cores, at lower priority. It has to be called in the main thread.

    Raises:
        SettingsError: If `DATA_DIR` cannot be written to, or has a worker that runs.
        JobsUnavailableError: If the jobs' database or queue cannot be read or written.
    """
    stop = threading.Event()
    lock = _lock(settings)
    try:
        os.nice(_NICENESS)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
        worker = Worker(settings, stop=stop)
        worker.take_over()
        with worker.queue.consumed(worker.work):
            # The queue's own handlers would leave the job, or wait for all of it.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            _log.info("the worker waits for jobs (process %d)", os.getpid())
            looked_at = time.monotonic()
            while not stop.is_set():
                time.sleep(_POLL_S)
                if time.monotonic() - looked_at >= _LOST_S:
                    worker.put_lost_again()
                    looked_at = time.monotonic()
        worker.queue.close()
    finally:
        lock.release()
    if worker.failure is not None:
        raise worker.failure


def _lock(settings: Settings) -> FileLock:
    lock = worker_lock(settings.data_dir)
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SettingsError(
            f"DATA_DIR must have one worker, but in {settings.data_dir} another one runs; stop it, "
            "or set WORKER=false where the service is started"
        ) from error
    except OSError as error:
        raise SettingsError(
            f"DATA_DIR must be a folder that can be written to, got {settings.data_dir} "
            f"({error.strerror}); create it for this user, or set another one"
        ) from error
    return lock


class Worker:
    """What a worker does with jobs; the process and its signals are `run_worker`'s."""

    def __init__(
        self,
        settings: Settings,
        *,
        stop: threading.Event,
        methods: Methods | None = None,
    ) -> None:
        """Open everything that jobs need; no model is loaded before there is a job.

        Args:
            settings: The service's.
            stop: Set from outside to end the job under way after its step; set from here if
                there is no going on.
            methods: What jobs are done with, if not with `sam_ext`.
        """
        self.jobs = JobStore(settings.data_dir)
        self.queue = JobQueue(settings)
        self.failure: JobsUnavailableError | None = None
        """Why it stopped by itself."""
        self._settings = settings
        self._stop = stop
        self._methods = methods
        self._registry = open_registry(settings)
        self._connections = Connections(settings)
        self._images = ImageLoader(settings, self._connections.client_for)

    def take_over(self) -> None:
        """See to what an earlier worker left: jobs it died in, runs of jobs that are over.

        The queue is filled anew: what was in it may have been lost with that worker.

        Raises:
            JobsUnavailableError: If the jobs' database or queue cannot be read or written.
        """
        for job in self.jobs.recover():
            _log.warning("job %d was left by a worker that died; it is %s now", job.id, job.state)
        waiting = {str(job.id) for job in self.jobs.queued()}
        if self._settings.runs_dir.is_dir():
            for folder in self._settings.runs_dir.iterdir():
                if folder.name not in waiting:
                    shutil.rmtree(folder, ignore_errors=True)
        self.queue.clear()
        for job in self.jobs.queued():
            self.queue.put(job.id)

    def put_lost_again(self) -> None:
        """Queue again what is due for long while nothing is done: a Redis may forget what it had.

        A job that comes out of the queue twice is done once.
        """
        try:
            if self.jobs.under_way():
                return
            for job in self.jobs.queued():
                if time.time() - self._due_at(job) >= _LOST_S:
                    _log.warning("job %d was not in the queue any more; it is again", job.id)
                    self.queue.put(job.id)
        except JobsUnavailableError as error:
            _log.warning("%s", error)

    def work(self, job_id: int) -> None:
        """Do a job, or put it off as long as people annotate."""
        try:
            job = self.jobs.get(job_id)
            if (delay_s := self._due_at(job) - time.time()) > 0:
                self.queue.put(job.id, delay_s=delay_s)
                return
            run_job(
                job_id,
                settings=self._settings,
                jobs=self.jobs,
                registry=self._registry,
                images=self._images,
                client_for=self._connections.client_for,
                should_stop=self._stop.is_set,
                methods=self._methods,
            )
        except JobNotFoundError as error:
            _log.warning("%s: the queue is older than the jobs", error)
        except JobsUnavailableError as error:
            # Nothing can be written down; the next worker finds the job as it was last known.
            self.failure = error
            self._stop.set()
        finally:
            torch.cuda.empty_cache()  # the service may be on the same card; nothing without one

    def _due_at(self, job: Job) -> float:
        """When a job is to begin, in seconds since 1970."""
        if job.trigger != "annotations" or job.attempt:
            return job.created_at
        pause_s = self._settings.train_debounce_s
        quiet_at = (self.jobs.last_annotation_at(job.project) or 0.0) + pause_s
        return max(min(quiet_at, job.created_at + _LONGEST_DEBOUNCE * pause_s), job.created_at)
