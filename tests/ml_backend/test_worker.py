"""The worker: in this process, and as a process of its own that is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ml_backend import worker as module
from ml_backend.errors import JobsUnavailableError, SettingsError
from ml_backend.fit import Methods
from ml_backend.jobs import JobQueue, JobStore
from ml_backend.loading import load_base, open_registry
from ml_backend.worker import Worker, run_worker
from tests.ml_backend.servers import FakeLabelStudio
from tests.ml_backend.training import (
    PROJECT,
    fake_adapt,
    fake_judge,
    fill_project,
    small_settings,
)
from tests.ml_backend.versions import add_version

METHODS = Methods(adapt=fake_adapt, judge=fake_judge)
PATIENCE_S = 300  # for what takes a moment


@pytest.fixture
def label_studio():
    with FakeLabelStudio() as server:
        fill_project(server)
        yield server


@pytest.fixture
def settings(tmp_path, label_studio):
    return small_settings(tmp_path, label_studio)


@pytest.fixture
def worker(settings):
    worker = Worker(settings, stop=threading.Event(), methods=METHODS)
    yield worker
    worker.queue.close()


class FakeQueue:
    """Remembers what was put."""

    def __init__(self):
        self.puts = []

    def put(self, job_id, *, delay_s=0.0):
        self.puts.append((job_id, delay_s))

    def clear(self):
        self.puts.clear()

    def close(self):
        pass


def test_a_job_is_done(worker):
    job = worker.jobs.create(PROJECT, "start_training")
    worker.work(job.id)
    assert worker.jobs.get(job.id).state == "promoted"
    worker.work(job.id)  # a message that comes twice
    worker.work(7)  # and one of a database that was deleted
    assert len(worker.jobs.jobs()) == 1


def test_what_an_earlier_worker_left_is_queued_again(worker, settings):
    worker.queue = FakeQueue()
    worker.queue.put(99)
    jobs = worker.jobs
    dead, cancelled, waiting, over = (
        jobs.create(f"{n}.1795194739", "start_training").id for n in (1, 2, 3, 4)
    )
    for job_id in (dead, cancelled, over):
        jobs.start(job_id)
    jobs.cancel(cancelled)
    jobs.finish(over, "failed", "")
    for name in (dead, cancelled, over, "77"):
        (settings.runs_dir / str(name) / "adapt").mkdir(parents=True)

    worker.take_over()

    assert worker.queue.puts == [(dead, 0.0), (waiting, 0.0)]
    assert [jobs.get(n).state for n in (dead, cancelled, over)] == ["queued", "cancelled", "failed"]
    assert [path.name for path in settings.runs_dir.iterdir()] == [str(dead)]


@pytest.mark.parametrize(
    ("annotated_s", "created_s", "delay_s"),
    [
        pytest.param(10, 10, 50, id="somebody-annotated-a-moment-ago"),
        pytest.param(61, 70, None, id="nobody-did-for-a-while"),
        pytest.param(1, 590, 10, id="somebody-always-does"),
        pytest.param(1, 601, None, id="that-is-long-enough"),
    ],
)
def test_a_job_of_many_annotations_waits_for_quiet(
    worker, monkeypatch, annotated_s, created_s, delay_s
):
    worker.queue = FakeQueue()
    job = worker.jobs.create(PROJECT, "annotations")
    now = job.created_at + created_s
    monkeypatch.setattr(JobStore, "last_annotation_at", lambda *_: now - annotated_s)
    monkeypatch.setattr(module.time, "time", lambda: now)
    worker.work(job.id)
    if delay_s is None:
        assert worker.queue.puts == []
        assert worker.jobs.get(job.id).state == "promoted"
    else:
        assert worker.queue.puts == [(job.id, pytest.approx(delay_s))]
        assert worker.jobs.get(job.id).state == "queued"


def test_a_job_that_the_queue_lost_is_put_there_again(worker, monkeypatch, caplog):
    """Of those that wait, what is due for a minute; and only while nothing is done."""
    worker.queue = FakeQueue()
    jobs = worker.jobs
    lost = jobs.create(PROJECT, "start_training")
    debounced = jobs.create("2.1795194739", "annotations")
    jobs.note_annotation("2.1795194739", 1)
    worker.put_lost_again()
    assert worker.queue.puts == []  # they may be there yet
    clock = lost.created_at + 61
    monkeypatch.setattr(module.time, "time", lambda: clock)
    running = jobs.create("3.1795194739", "start_training")
    jobs.start(running.id)
    worker.put_lost_again()
    assert worker.queue.puts == []
    jobs.finish(running.id, "failed", "")
    worker.put_lost_again()
    assert worker.queue.puts == [(lost.id, 0.0)]
    clock = lost.created_at + 125  # a minute to be quiet, and a minute more
    worker.put_lost_again()
    assert worker.queue.puts[1:] == [(lost.id, 0.0), (debounced.id, 0.0)]
    assert f"job {lost.id} was not in the queue any more; it is again" in caplog.text

    def refuse(job_id):
        raise JobsUnavailableError("Redis is away")

    monkeypatch.setattr(worker.queue, "put", refuse)
    worker.put_lost_again()
    assert "Redis is away" in caplog.text


def test_a_worker_looks_for_what_was_lost(settings, monkeypatch):
    monkeypatch.setattr(module, "_LOST_S", 0.05)
    looked = threading.Event()
    monkeypatch.setattr(Worker, "put_lost_again", lambda worker: looked.set())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    nice, threads = os.nice(0), torch.get_num_threads()
    killer = threading.Thread(
        target=lambda: looked.wait(PATIENCE_S) and os.kill(os.getpid(), signal.SIGTERM)
    )
    killer.start()
    try:
        monkeypatch.setattr(os, "nice", lambda _: nice)
        run_worker(settings)
    finally:
        killer.join()
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert looked.is_set()


def test_a_job_that_was_asked_for_waits_for_nobody(worker):
    worker.jobs.note_annotation(PROJECT, 1)
    job = worker.jobs.create(PROJECT, "start_training")
    worker.work(job.id)
    assert worker.jobs.get(job.id).state == "promoted"


def test_a_worker_that_cannot_write_down_what_it_does_ends(settings, monkeypatch):
    stop = threading.Event()
    worker = Worker(settings, stop=stop, methods=METHODS)

    def refuse(*_args, **_options):
        raise JobsUnavailableError("jobs.db")

    job = worker.jobs.create(PROJECT, "start_training")
    monkeypatch.setattr(JobStore, "finish", refuse)
    worker.work(job.id)
    assert str(worker.failure) == "jobs.db"
    assert stop.is_set()
    assert worker.jobs.get(job.id).state in ("running", "judging")
    worker.queue.close()


def test_a_stop_ends_the_job_after_its_step(settings):
    stop = threading.Event()

    def adapt(*args, **options):
        def told(step):
            stop.set()
            options["on_step"](step)

        return fake_adapt(*args, **(options | {"on_step": told}))

    worker = Worker(settings, stop=stop, methods=replace(METHODS, adapt=adapt))
    job = worker.jobs.create(PROJECT, "start_training")
    worker.work(job.id)
    worker.queue.close()
    left = worker.jobs.get(job.id)
    assert (left.state, left.progress["step"]) == ("queued", 1)


class Process:
    """A worker as a process; quick to start, because what it imports is there already."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ml_backend.worker"])

    def __init__(self, settings):
        self.process = self.context.Process(target=run_worker, args=(settings,))
        self.process.start()

    def catches(self, number):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"SigCgt:\s+(\w+)", status)[1], 16) >> (number - 1) & 1

    def end(self, number):
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(PATIENCE_S)
        code = self.process.exitcode
        self.process.close()
        return code


def wait_until(condition, process=None):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        if process is not None:
            assert process.process.is_alive()
        time.sleep(0.005)


def queued_job(settings):
    jobs, queue = JobStore(settings.data_dir), JobQueue(settings)
    job = jobs.create(PROJECT, "start_training")
    queue.put(job.id)
    queue.close()
    return jobs, job.id


def test_a_worker_that_is_killed_at_any_moment_goes_on_and_breaks_nothing(
    tmp_path, label_studio, settings
):
    settings = small_settings(tmp_path, label_studio, train_steps=45, train_margin=0.0)
    registry = open_registry(settings)
    versions = registry.project(PROJECT)
    add_version(registry, PROJECT, load_base(settings), tmp_path / "adapter")
    versions.activate(1)
    jobs, job_id = queued_job(settings)

    def require_whole():
        active = versions.active()
        active.check()
        assert active.number in ((1, 2) if jobs.get(job_id).is_finished else (1,))
        for version in versions.versions():
            version.check()
        numbers = {path.name for path in (versions.versions()[0].folder.parent).iterdir()}
        assert {name for name in numbers if not name.startswith(".")} <= {"1", "2"}

    def reached(moment):
        job = jobs.get(job_id)
        if job.is_finished or moment == "at once":
            return True
        if isinstance(moment, int):
            return job.progress.get("step", 0) >= moment and job.state != "queued"
        return moment in (job.state, job.progress.get("phase"))

    rng = random.Random(0)
    # No three in a row without a step: a job that never makes one is given up, as it should be.
    moments = ["at once", "running", 2, "loading the images", 21, 24, 41, 44, 45, "judging"]
    for moment in moments:
        process = Process(settings)
        wait_until(lambda moment=moment: reached(moment), process)
        time.sleep(rng.uniform(0, 0.1))
        process.end(signal.SIGKILL)
        require_whole()

    process = Process(settings)
    wait_until(lambda: jobs.get(job_id).is_finished, process)
    wait_until(
        lambda: process.catches(signal.SIGTERM), process
    )  # the job may have been over before
    time.sleep(0.5)  # the queue's own handlers come first
    assert process.end(signal.SIGTERM) == 0
    require_whole()
    job = jobs.get(job_id)
    assert job.state in ("promoted", "rejected"), job.reason
    assert job.progress["steps"] == 45
    assert [version.number for version in versions.versions()] == [1, 2]
    assert versions.active().number == (2 if job.state == "promoted" else 1)
    assert not list(settings.runs_dir.iterdir())


def test_sigterm_ends_the_worker_in_the_middle_of_a_job_that_can_go_on(tmp_path, label_studio):
    settings = small_settings(tmp_path, label_studio, train_steps=10_000)
    jobs, job_id = queued_job(settings)
    process = Process(settings)
    wait_until(lambda: jobs.get(job_id).progress.get("step", 0) >= 2, process)
    assert process.end(signal.SIGTERM) == 0
    job = jobs.get(job_id)
    assert job.state == "queued"
    assert job.progress["step"] < 10_000
    jobs.cancel(job_id)


def test_a_second_worker_is_refused(settings):
    jobs, job_id = queued_job(settings)
    process = Process(settings)
    wait_until(lambda: jobs.get(job_id).state != "queued", process)
    with pytest.raises(SettingsError) as caught:
        run_worker(settings)
    assert str(caught.value) == (
        f"DATA_DIR must have one worker, but in {settings.data_dir} another one runs; stop it, or "
        "set WORKER=false where the service is started"
    )
    process.end(signal.SIGTERM)


def test_a_folder_that_cannot_be_made_is_one_sentence(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="DATA_DIR must be a folder that can be written to"):
        run_worker(settings.model_copy(update={"data_dir": tmp_path / "file" / "data"}))
