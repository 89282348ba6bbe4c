"""What recorded events start."""

from __future__ import annotations

import inspect

import pytest

from ml_backend import triggers
from ml_backend.errors import BadRequestError, JobExistsError, JobsUnavailableError
from ml_backend.jobs import JobStore
from ml_backend.settings import Settings
from ml_backend.triggers import handle_event, start_job
from tests.ml_backend.backend import payload

CREATED, UPDATED, DELETED, START, OF_PROJECT, OF_TASKS, SKIPPED = map(str, range(30, 37))
# How each project is to be trained.
METHODS = {"1.1795194739": "lora", "5.1795196074": "sam-adapter"}


class FakeQueue:
    """Remembers what was put."""

    def __init__(self):
        self.puts = []
        self.error = None

    def put(self, job_id, *, delay_s=0.0):
        if self.error:
            raise self.error
        self.puts.append((job_id, delay_s))


@pytest.fixture
def jobs(tmp_path):
    return JobStore(tmp_path)


@pytest.fixture
def queue():
    return FakeQueue()


@pytest.fixture
def send(jobs, queue, tmp_path):
    def call(number, *, annotation=None, **settings):
        body = payload(number)
        if annotation is not None:
            body["annotation"] = annotation
        return handle_event(
            body["action"],
            body,
            jobs=jobs,
            queue=queue,
            settings=Settings(data_dir=tmp_path, **settings),
            method_for=METHODS.__getitem__,
        )

    return call


def test_start_training_queues_a_job_and_names_it(send, jobs, queue):
    assert send(START) == {"job": 1}
    job = jobs.get(1)
    assert (job.project, job.trigger, job.state) == ("1.1795194739", "start_training", "queued")
    assert job.method == "lora"
    assert queue.puts == [(1, 0.0)]


def test_a_second_start_training_is_refused_and_names_the_first(send, jobs, queue):
    send(START)
    with pytest.raises(JobExistsError, match="got job 1 "):
        send(START)
    assert len(queue.puts) == len(jobs.jobs()) == 1


@pytest.mark.parametrize("number", [CREATED, UPDATED, DELETED, OF_PROJECT, OF_TASKS, SKIPPED])
def test_by_default_nothing_else_does_anything(send, jobs, number):
    assert send(number) == {}
    assert jobs.jobs() == []


@pytest.mark.parametrize("number", [DELETED, OF_PROJECT, OF_TASKS])
def test_only_annotations_are_counted(send, jobs, number):
    assert send(number, train_every=1) == {}
    assert jobs.jobs() == []


def test_every_so_many_annotations_are_a_job_that_waits_for_quiet(send, jobs, queue):
    often = {"train_every": 3, "train_debounce_s": 45}
    body = payload(CREATED)["annotation"]
    for number in (1, 2, 2, 1):
        assert send(CREATED, annotation=body | {"id": number}, **often) == {}
    assert send(UPDATED, annotation=body | {"id": 3}, **often) == {}  # of another project
    assert send(CREATED, annotation=body | {"id": 9}, **often) == {"job": 1}
    assert jobs.get(1).trigger == "annotations"
    assert jobs.get(1).project == "5.1795196074"
    assert jobs.get(1).method == "sam-adapter"
    assert queue.puts == [(1, 45.0)]
    assert send(CREATED, annotation=body | {"id": 10}, **often) == {}  # the job takes it along

    jobs.start(1)
    jobs.forget_annotations("5.1795196074")
    for number in (11, 12, 13):
        assert send(CREATED, annotation=body | {"id": number}, **often) == {}  # it still runs
    jobs.finish(1, "rejected", "")
    assert send(CREATED, annotation=body | {"id": 14}, **often) == {"job": 2}


def test_a_skipped_task_does_not_count(send, jobs):
    assert send(SKIPPED, train_every=1) == {}
    assert jobs.jobs() == []


def test_a_job_that_cannot_be_queued_has_failed_and_blocks_no_other(send, jobs, queue):
    queue.error = JobsUnavailableError("the job queue must take and give")
    with pytest.raises(JobsUnavailableError):
        send(START)
    assert (jobs.get(1).state, jobs.get(1).reason) == ("failed", "the job queue must take and give")
    queue.error = None
    assert send(START) == {"job": 2}


def test_the_command_line_starts_a_job_too(jobs, queue):
    job = start_job("1.1795194739", "command", "wesam", jobs=jobs, queue=queue)
    assert (job.trigger, job.method, queue.puts) == ("command", "wesam", [(1, 0.0)])


@pytest.mark.parametrize(
    ("event", "body", "message"),
    [
        pytest.param(
            "START_TRAINING",
            {},
            "project must be the project as Label Studio describes it, got something else; send "
            "the event as Label Studio does",
            id="no-project",
        ),
        pytest.param(
            "START_TRAINING",
            {"project": {"id": "../1", "created_at": "2026-11-20T17:12:19Z"}},
            "project.id must be a number, got str; send the project as Label Studio describes it",
            id="no-number",
        ),
        pytest.param(
            "START_TRAINING",
            {"project": {"id": 1, "created_at": "yesterday"}},
            "project.created_at must be a time such as 2026-11-20T17:12:19Z, got 'yesterday'; send "
            "the project as Label Studio describes it",
            id="no-time",
        ),
        pytest.param(
            "ANNOTATION_CREATED",
            {"project": {"id": 1, "created_at": "2026-11-20T17:12:19Z"}, "annotation": [1]},
            "annotation must be an object with a number as its id, got something else; send the "
            "event as Label Studio does",
            id="no-annotation",
        ),
    ],
)
def test_what_label_studio_never_sends_is_refused(jobs, queue, tmp_path, event, body, message):
    settings = Settings(data_dir=tmp_path, train_every=1)
    with pytest.raises(BadRequestError) as caught:
        handle_event(
            event, body, jobs=jobs, queue=queue, settings=settings, method_for=lambda _: "auto"
        )
    assert str(caught.value) == message
    assert jobs.jobs() == []


def test_no_event_needs_label_studio_or_a_model():
    """Label Studio waits one second, and an annotator's Save with it."""
    source = inspect.getsource(triggers)
    for slow in ("torch", "sam_ext", "requests", "LabelStudioClient", "_log"):
        assert slow not in source
    assert "client" not in inspect.signature(handle_event).parameters
