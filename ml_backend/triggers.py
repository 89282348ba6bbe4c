"""What Label Studio's events start: a training job, or nothing yet.

An event's body holds secrets and whole masks; nothing of it is logged. Label Studio waits for one
second, and an annotator's Save with it: nothing is loaded here, and Label Studio is not asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_backend.errors import BadRequestError, JobExistsError, JobsUnavailableError
from ml_backend.jobs import Job, JobQueue, JobStore, Trigger
from ml_backend.label_studio import project_name
from ml_backend.settings import Settings, TrainMethod

__all__ = ["handle_event", "start_job"]

_ANNOTATED = ("ANNOTATION_CREATED", "ANNOTATION_UPDATED")


def handle_event(
    event: str,
    data: Mapping[str, Any],
    *,
    jobs: JobStore,
    queue: JobQueue,
    settings: Settings,
    method_for: Callable[[str], TrainMethod],
) -> dict[str, Any]:
    """Take note of an event.

    Args:
        event: The event's name, `action` of the body.
        data: The body.
        jobs: Where a job is noted.
        queue: What wakes the worker.
        settings: After how many annotations a job is due.
        method_for: Says how a project is to be trained.

    Returns:
        `{"job": <its number>}` if a job was queued, which is what Label Studio reads; else `{}`.

    Raises:
        BadRequestError: If the body lacks the project, or the annotation.
        JobExistsError: If training was asked for, and the project has a job under way.
        JobsUnavailableError: If the job could not be queued; it is noted as failed.
    """
    if event == "START_TRAINING":
        project = _project_in(data)
        method = method_for(project)
        return {"job": start_job(project, "start_training", method, jobs=jobs, queue=queue).id}
    if event in _ANNOTATED and settings.train_every:
        project = _project_in(data)
        if _is_due(project, data, jobs=jobs, settings=settings):
            method, delay_s = method_for(project), settings.train_debounce_s
            # Otherwise another annotator's was faster.
            with contextlib.suppress(JobExistsError):
                job = start_job(
                    project, "annotations", method, jobs=jobs, queue=queue, delay_s=delay_s
                )
                return {"job": job.id}
    return {}


def start_job(
    project: str,
    trigger: Trigger,
    method: TrainMethod,
    *,
    jobs: JobStore,
    queue: JobQueue,
    delay_s: float = 0.0,
) -> Job:
    """Note a job and queue it.

    Args:
        project: The project as Label Studio names it.
        trigger: What asks for it.
        method: How it is to be done.
        jobs: Where it is noted.
        queue: What wakes the worker.
        delay_s: It begins no sooner.

    Raises:
        JobExistsError: If the project has a job under way.
        JobsUnavailableError: If it could not be queued; it is noted as failed.
    """
    job = jobs.create(project, trigger, method)
    try:
        queue.put(job.id, delay_s=delay_s)
    except JobsUnavailableError as error:
        jobs.finish(job.id, "failed", str(error))
        raise
    return job


def _is_due(project: str, data: Mapping[str, Any], *, jobs: JobStore, settings: Settings) -> bool:
    """Count an annotation, and say whether there are enough of them now."""
    annotation = data.get("annotation")
    number = annotation.get("id") if isinstance(annotation, Mapping) else None
    if not isinstance(annotation, Mapping) or not isinstance(number, int):
        raise BadRequestError(
            "annotation must be an object with a number as its id, got something else; send the "
            "event as Label Studio does"
        )
    if annotation.get("was_cancelled"):
        return False
    return jobs.note_annotation(project, number) >= settings.train_every


def _project_in(data: Mapping[str, Any]) -> str:
    project = data.get("project")
    if not isinstance(project, Mapping):
        raise BadRequestError(
            "project must be the project as Label Studio describes it, got something else; send "
            "the event as Label Studio does"
        )
    return project_name(project)
