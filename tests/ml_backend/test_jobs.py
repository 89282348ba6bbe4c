"""The store of jobs, as several processes see it, and the queue."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from ml_backend import jobs as module
from ml_backend.errors import JobExistsError, JobNotFoundError, JobsUnavailableError
from ml_backend.jobs import JobQueue, JobStore
from ml_backend.settings import Settings
from tests.conftest import skip_for_want_of

PROJECT, OTHER = "1.1795194739", "2.1795194739"


@pytest.fixture
def jobs(tmp_path):
    return JobStore(tmp_path)


def test_a_job_from_beginning_to_end(jobs, tmp_path):
    created = jobs.create(PROJECT, "start_training")
    assert (created.state, created.attempt, created.reason) == ("queued", 0, "")
    assert (created.started_at, created.finished_at, created.version) == (None, None, None)
    assert created.progress == {}
    assert not created.is_finished

    started = jobs.start(created.id)
    assert (started.state, started.attempt) == ("running", 1)
    progress = {"step": 3, "steps": 9, "losses": {"dice": 0.5}, "eta_s": 1.5}
    assert jobs.report(created.id, progress)
    assert jobs.report(created.id, progress, state="judging")
    seen = JobStore(tmp_path).get(created.id)  # as another process sees it
    assert (seen.state, seen.progress) == ("judging", progress)

    ended = jobs.finish(created.id, "promoted", "It is better.", version=4)
    assert (ended.state, ended.reason, ended.version) == ("promoted", "It is better.", 4)
    assert ended.is_finished
    assert created.created_at <= ended.started_at <= ended.finished_at <= time.time()
    assert jobs.finish(created.id, "failed", "too late") == ended
    assert not jobs.report(created.id, {"step": 4})
    assert jobs.start(created.id) is None


def test_a_job_says_how_it_is_to_be_done(jobs):
    assert jobs.create(PROJECT, "command", "lora").method == "lora"
    assert jobs.create(OTHER, "start_training").method == "auto"


def test_jobs_of_an_earlier_version_are_kept(tmp_path):
    JobStore(tmp_path).create(PROJECT, "start_training")
    with sqlite3.connect(tmp_path / "jobs.db") as database:
        database.execute("ALTER TABLE jobs DROP COLUMN method")
    database.close()
    jobs = JobStore(tmp_path)
    assert jobs.get(1).method == "auto"
    assert jobs.create(OTHER, "command", "wesam").method == "wesam"


def test_a_project_has_one_job_at_a_time(jobs):
    first = jobs.create(PROJECT, "start_training")
    with pytest.raises(JobExistsError) as caught:
        jobs.create(PROJECT, "annotations")
    assert caught.value.job_id == first.id
    assert caught.value.status == 409
    assert str(caught.value) == (
        "project 1.1795194739 must have no other job under way, got job 1 (queued); wait for its "
        "end, or cancel it"
    )
    assert jobs.create(OTHER, "start_training").id == 2
    jobs.finish(first.id, "failed", "why not")
    assert jobs.create(PROJECT, "command").id == 3
    assert [job.id for job in jobs.jobs()] == [3, 2, 1]
    assert [job.id for job in jobs.jobs(PROJECT)] == [3, 1]
    assert [job.id for job in jobs.jobs(limit=1)] == [3]
    assert [job.id for job in jobs.queued()] == [2, 3]


def test_of_many_at_once_one_is_made(tmp_path):
    barrier = threading.Barrier(8)

    def create(_):
        store = JobStore(tmp_path)
        barrier.wait()
        try:
            return store.create(PROJECT, "start_training").id
        except JobExistsError as error:
            return -error.job_id

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(create, range(8))) == [-1] * 7 + [1]


def test_no_such_job(jobs):
    for call in (jobs.get, jobs.cancel):
        with pytest.raises(JobNotFoundError) as caught:
            call(7)
        assert caught.value.status == 404
        assert str(caught.value) == "job must be the number of a job, got 7"


def test_a_job_that_waits_is_cancelled_at_once(jobs):
    job = jobs.cancel(jobs.create(PROJECT, "start_training").id)
    assert (job.state, job.reason) == ("cancelled", "cancelled before it began")
    assert job.finished_at is not None
    assert jobs.start(job.id) is None


def test_a_job_that_runs_is_told(jobs):
    job = jobs.start(jobs.create(PROJECT, "start_training").id)
    assert jobs.report(job.id, {"step": 1})
    assert jobs.cancel(job.id).state == "running"
    assert not jobs.report(job.id, {"step": 2})
    jobs.finish(job.id, "cancelled", "")
    assert jobs.cancel(job.id).state == "cancelled"


def test_a_job_of_a_stopped_worker_waits_and_goes_on(jobs):
    job = jobs.start(jobs.create(PROJECT, "start_training").id)
    jobs.report(job.id, {"step": 5})
    jobs.requeue(job.id)
    assert jobs.recover() == []
    again = jobs.start(job.id)
    assert (again.attempt, again.started_at) == (2, job.started_at)
    assert again.progress == {"step": 5}


def die(jobs, job_id, *, at):
    jobs.start(job_id)
    if at:
        jobs.report(job_id, {"step": at})
    (job,) = jobs.recover()
    return job


def test_a_job_of_a_dead_worker_waits_as_long_as_it_comes_further(jobs):
    job_id = jobs.create(PROJECT, "start_training").id
    for step in (20, 20, 19, 21, 3, 0):
        assert die(jobs, job_id, at=step).state == "queued"
    job = die(jobs, job_id, at=21)
    assert job.state == "failed"
    assert job.reason == (
        "the worker must live through a step of the job, but died in 3 attempts without one; look "
        "for the cause in its log (often too little memory)"
    )
    assert job.attempt == 7


def test_a_job_that_was_to_be_cancelled_is_when_its_worker_dies(jobs):
    job = jobs.start(jobs.create(PROJECT, "start_training").id)
    jobs.cancel(job.id)
    (job,) = jobs.recover()
    assert job.state == "cancelled"


def test_annotations_are_counted_once_each_and_by_project(jobs):
    assert [jobs.note_annotation(PROJECT, number) for number in (5, 6, 5, 7)] == [1, 2, 2, 3]
    assert jobs.note_annotation(OTHER, 5) == 1
    assert jobs.last_annotation_at(PROJECT) <= time.time()
    jobs.forget_annotations(PROJECT)
    assert jobs.last_annotation_at(PROJECT) is None
    assert jobs.note_annotation(PROJECT, 5) == 1
    assert jobs.note_annotation(OTHER, 6) == 2


def test_a_database_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "jobs.db").write_bytes(b"no database" * 100)
    with pytest.raises(JobsUnavailableError) as caught:
        JobStore(tmp_path)
    assert caught.value.status == 503
    assert str(caught.value) == (
        f"{tmp_path}/jobs.db must be a database that can be read and written, got: file is not a "
        "database; free the disk, or check who may write there"
    )


@contextmanager
def redis_at(socket):
    """Run a Redis of its own at a socket."""
    server = shutil.which("redis-server")
    if server is None:
        skip_for_want_of("redis-server is not installed")
    process = subprocess.Popen(
        [server, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", socket.parent],
        stdout=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 30
        while not socket.exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    with redis_at(socket):
        yield f"unix://{socket}"


@pytest.fixture(params=["file", "redis"])
def queue_settings(request, tmp_path):
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    return Settings(data_dir=tmp_path, queue_url=url)


@pytest.fixture
def queue(queue_settings):
    queue = JobQueue(queue_settings)
    yield queue
    queue.clear()
    queue.close()


def consume(queue, number):
    """Take so many jobs out."""
    got, done = [], threading.Event()

    def run(job_id):
        got.append(job_id)
        if len(got) == number:
            done.set()

    with queue.consumed(run):
        assert done.wait(30)
    return got


def test_jobs_come_out_in_their_order_also_in_another_process(queue, queue_settings):
    for number in (3, 1, 2):
        queue.put(number)
    other = JobQueue(queue_settings)
    assert consume(other, 3) == [3, 1, 2]
    other.close()


def test_a_job_that_is_put_off_comes_later(queue):
    queue.put(1, delay_s=0.2)
    queue.put(2)
    assert consume(queue, 2) == [2, 1]


def test_a_cleared_queue_holds_nothing(queue):
    queue.put(1, delay_s=0.1)
    queue.put(2)
    queue.clear()
    queue.put(3)
    assert consume(queue, 1) == [3]


def test_leaving_waits_for_the_call_under_way(queue):
    began, may_end, ended = threading.Event(), threading.Event(), []

    def run(job_id):
        began.set()
        assert may_end.wait(30)
        ended.append(job_id)

    queue.put(1)
    with queue.consumed(run):
        assert began.wait(30)
        threading.Timer(0.05, may_end.set).start()
    assert ended == [1]


def test_a_redis_that_is_away_is_one_sentence(tmp_path, monkeypatch):
    import socket

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    settings = Settings(data_dir=tmp_path, queue_url=f"redis://:secret@127.0.0.1:{port}/0")
    queue = JobQueue(settings)
    for call in (lambda: queue.put(1), queue.clear):
        with pytest.raises(
            JobsUnavailableError, match="the job queue must take and give"
        ) as caught:
            call()
        assert "QUEUE_URL" in str(caught.value)
        assert "secret" not in str(caught.value)
    assert not (tmp_path / "queue.db").exists()


def test_a_redis_that_goes_is_a_sentence_in_the_log_and_taken_up_when_it_is_back(
    tmp_path_factory, caplog
):
    folder = tmp_path_factory.mktemp("redis")
    queue = JobQueue(Settings(data_dir=folder, queue_url=f"unix://{folder / 'redis.sock'}"))
    got, done = [], threading.Event()

    def run(job_id):
        got.append(job_id)
        done.set()

    def said():
        return [one for one in caplog.records if one.name.startswith("huey") and one.levelno >= 40]

    with ExitStack() as stack:
        with redis_at(folder / "redis.sock"):
            queue.put(1)
            stack.enter_context(queue.consumed(run))
            assert done.wait(30)
            done.clear()
        until = time.monotonic() + 30
        while not said():
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(2)  # of which each would be two more tracebacks
        with redis_at(folder / "redis.sock"):
            queue.put(2)
            assert done.wait(30)
            queue.clear()
    assert got == [1, 2]
    [record] = said()
    assert "the job queue is away" in record.getMessage()
    assert "jobs wait until it is back" in record.getMessage()
    assert "Traceback" not in caplog.text
    queue.close()


def test_other_failures_of_the_consumer_keep_their_traceback():
    record = logging.LogRecord("huey", logging.ERROR, "x.py", 1, "reading", (), None)
    record.exc_info = (KeyError, KeyError("job"), None)
    assert module._AwayFilter().filter(record)
    assert record.getMessage() == "reading"
    assert record.exc_info[0] is KeyError


def test_the_states_that_block_are_those_that_can_still_change():
    assert module.UNFINISHED == ("queued", "running", "judging")
