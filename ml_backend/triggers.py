"""What Label Studio's events start: a training job, or nothing yet.

An event's body holds secrets and whole masks; nothing of it is logged. Label Studio waits for one
second, and an annotator's Save with it: nothing is loaded here, and Label Studio is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_backend.errors import BadRequestError, JobExistsError, JobsUnavailableError
from ml_backend.jobs import Job, JobQueue, JobStore, Trigger
from ml_backend.label_studio import project_name
from ml_backend.settings import Settings

__all__ = ["handle_event", "start_job"]

_ANNOTATED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")


def handle_event(
    event: str, data: Mapping[str, Any], *, jobs: JobStore, queue: JobQueue, settings: Settings
) -> dict[str, Any]:
    """Take note of an event.

    Args:
        event: The event's name, `action` of the body.
        data: The body.
        jobs: Where a job is noted.
        queue: What wakes the worker.
        settings: After how many annotations a job is due.

    Returns:
        `{"job": <its number>}` if a job was queued, which is what Label Studio reads; else `{}`.

    Raises:
        BadRequestError: If the body lacks the project, or the annotation.
        JobExistsError: If training was asked for, and the project has a job under way.
        JobsUnavailableError: If the job could not be queued; it is noted as failed.
    """
    if event == "START_TRAINING":
        job = start_job(_project_in(data), "start_training", jobs=jobs, queue=queue)
        return {"job": job.id}
    if event in _ANNOTATED and settings.train_every:
        due = _annotated(_project_in(data), data, jobs=jobs, queue=queue, settings=settings)
        return {} if due is None else {"job": due.id}
    return {}


def start_job(
    project: str, trigger: Trigger, *, jobs: JobStore, queue: JobQueue, delay_s: float = 0.0
) -> Job:
    """Note a job and queue it.

    Args:
        project: The project as Label Studio names it.
        trigger: What asks for it.
        jobs: Where it is noted.
        queue: What wakes the worker.
        delay_s: It begins no sooner.

    Raises:
        JobExistsError: If the project has a job under way.
        JobsUnavailableError: If it could not be queued; it is noted as failed.
    """
    job = jobs.create(project, trigger)
    try:
        queue.put(job.id, delay_s=delay_s)
    except JobsUnavailableError as error:
        jobs.finish(job.id, "failed", str(error))
        raise
    return job


def _annotated(
    project: str,
    data: Mapping[str, Any],
    *,
    jobs: JobStore,
    queue: JobQueue,
    settings: Settings,
) -> Job | None:
    annotation = data.get("annotation")
    number = annotation.get("id") if isinstance(annotation, Mapping) else None
    if not isinstance(annotation, Mapping) or not isinstance(number, int):
        raise BadRequestError(
            "annotation must be an object with a number as its id, got something else; send the "
            "event as Label Studio does"
        )
    if annotation.get("was_cancelled"):
        return None
    noted = jobs.note_annotation(project, number)
    if noted < settings.train_every:
        return None
    delay_s = settings.train_debounce_s
    try:
        return start_job(project, "annotations", jobs=jobs, queue=queue, delay_s=delay_s)
    except JobExistsError:  # another annotator's was faster
        return None


def _project_in(data: Mapping[str, Any]) -> str:
    project = data.get("project")
    if not isinstance(project, Mapping):
        raise BadRequestError(
            "project must be the project as Label Studio describes it, got something else; send "
            "the event as Label Studio does"
        )
    return project_name(project)
