"""Gathers what the status page shows, and puts it into words; nothing here waits for anybody."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ml_backend.errors import BackendError, JobsUnavailableError, RegistryError
from ml_backend.jobs import Job, JobStore
from ml_backend.label_studio import project_number
from ml_backend.loading import ba_sam_config
from ml_backend.model import Service
from ml_backend.registry import ProjectVersions, Version
from ml_backend.web.charts import Chart, iou_chart, loss_chart, progress_chart
from ml_backend.web.checks import Checked, ProjectFinding, announced_hosts, known_projects
from ml_backend.web.recent_errors import RecentError
from sam_ext.image_encoder import resolve_precision

__all__ = [
    "Fact",
    "JobView",
    "Overview",
    "Picture",
    "PictureRow",
    "ProjectView",
    "ScoreRow",
    "VersionView",
    "ago",
    "duration",
    "find_picture",
    "overview",
]

_JOBS = 6
_OPEN_PROJECTS = 4
_WAIT_S = 20.0  # a worker that is there takes a job sooner
_PICTURE = re.compile(r"(before|after)-(\d{1,4})\.(jpg|png)")
_TYPES = {"jpg": "image/jpeg", "png": "image/png"}
_STATES = {
    "queued": "waiting",
    "running": "training",
    "judging": "judging",
    "promoted": "promoted",
    "rejected": "not promoted",
    "failed": "failed",
    "cancelled": "cancelled",
}
_TRIGGERS = {
    "start_training": "Start Training was pressed",
    "annotations": "enough new annotations",
    "command": "the command line",
}
_METHODS = {
    "auto": "auto, by what the labels are",
    "wesam": "WeSAM",
    "sam-adapter": "SAM-Adapter",
    "lora": "LoRA",
}
_PROMPTS = {
    "tight box": "exact box",
    "jittered box": "sloppy box",
    "point": "one click",
    "nothing": "no prompt",
}
_MEASURES = {
    "iou": "overlap with the true mask",
    "union iou": "overlap of all that is found with all true masks",
    "left empty": "share of empty images left empty",
    "box agreement": "overlap with the drawn box",
    "point agreement": "agreement with the drawn points",
}
_PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_MODELS = {"candidate": "this version", "active": "served before", "base": "base model"}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing about the service."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job in words."""

    job: Job
    state: str
    trigger: str
    phase: str
    done: float | None
    """0..1; None where nothing is counted."""
    counted: str
    """`step 40 of 200`."""
    eta: str
    losses: tuple[tuple[str, float], ...]
    charts: tuple[Chart, ...]
    method: str
    """How it is done, and why that way."""
    hint: str
    """What to do if it does not begin."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A file of a version's report."""

    name: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class PictureRow:
    """One held-out task, before and after."""

    task_id: int
    url: str | None
    """Where the task is in Label Studio."""
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """What was measured with one kind of prompt on one label: a mean by model, None where none."""

    name: str
    label: str
    measure: str
    objects: int
    values: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class VersionView:
    """A version in words."""

    version: Version
    state: str
    """`serving`, `promoted` or `not promoted`."""
    data: str
    method: str
    """How it was made, and why that way; empty where it was not written down."""
    prompt_free: str
    """What it finds without a prompt, in a sentence; empty if it needs prompts."""
    sentence: str
    means: tuple[tuple[str, float], ...]
    scores: tuple[ScoreRow, ...]
    pictures: tuple[PictureRow, ...]
    charts: tuple[Chart, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ProjectView:
    """A project in words."""

    name: str
    title: str
    address: str | None
    """Label Studio, as a person finds it."""
    url: str | None
    """The project there."""
    served: str
    active: Version | None
    since: float | None
    earlier: str | None
    """What Roll back goes to; None if there is nothing."""
    problems: tuple[str, ...]
    job: JobView | None
    past: tuple[JobView, ...]
    versions: tuple[VersionView, ...]
    chart: Chart | None
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All of the page."""

    facts: tuple[Fact, ...]
    base_version: str
    waiting: int
    max_waiting: int
    projects: tuple[ProjectView, ...]
    problems: tuple[str, ...]
    findings: tuple[ProjectFinding, ...]
    checked_at: float | None
    errors: tuple[RecentError, ...]
    processes: int
    now: float


@dataclass(frozen=True, kw_only=True)
class _Report:
    """The files of a version that never change, read once."""

    means: Mapping[str, float]
    scores: tuple[ScoreRow, ...]
    charts: tuple[Chart, ...]


def overview(
    service: Service, *, checked: Checked | None, errors: Sequence[RecentError]
) -> Overview:
    """Gather everything; what cannot be read is a problem that the page shows.

    Args:
        service: What is served.
        checked: What is known of Label Studio.
        errors: The last errors, the newest first.
    """
    now = time.time()
    problems = []
    try:
        service.jobs.jobs(limit=1)
    except JobsUnavailableError as error:
        problems.append(str(error))
    hosts = announced_hosts(service.settings)
    titles = {} if checked is None else checked.titles
    projects = [
        _project(service, name, host=hosts.get(name), title=titles.get(name, ""), now=now)
        for name in known_projects(service)
    ]
    projects.sort(key=_last_activity, reverse=True)
    return Overview(
        facts=_facts(service),
        base_version=service.models.base.model_version,
        waiting=service.engine.waiting,
        max_waiting=service.settings.max_waiting,
        projects=tuple(
            replace(project, is_open=index < _OPEN_PROJECTS)
            for index, project in enumerate(projects)
        ),
        problems=tuple(problems),
        findings=() if checked is None else checked.findings,
        checked_at=None if checked is None else checked.at,
        errors=tuple(errors),
        processes=service.settings.workers,
        now=now,
    )


def find_picture(service: Service, project: str, number: int, name: str) -> tuple[Path, str] | None:
    """Find a picture of a version's report; None if the version has none of that name.

    Args:
        service: What is served.
        project: The project's name, as a request gave it.
        number: The version's number.
        name: The file's name, as a request gave it.

    Returns:
        The file and its type.
    """
    match = _PICTURE.fullmatch(name)
    try:
        version = service.registry.project(project).find(number)
    except RegistryError:
        return None
    if match is None or name not in _pictures_of(version):
        return None
    return version.folder / name, _TYPES[match[3]]


def duration(seconds: float) -> str:
    """Say how long something is: `35 s`, `4 min`, `1 h 10 min`, `3 days`."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days = round(hours / 24)
    return "1 day" if days == 1 else f"{days} days"


def ago(at: float, now: float) -> str:
    """Say how long ago something was."""
    return "just now" if now - at < 5 else f"{duration(now - at)} ago"


def _facts(service: Service) -> tuple[Fact, ...]:
    settings, predictor = service.settings, service.models.base.predictor
    ba_sam = ba_sam_config(settings, predictor.image_size) is not None
    dtype = resolve_precision(predictor.device, settings.sam_precision)
    on = [
        name
        for name, is_on in (
            ("BA-SAM", ba_sam),
            ("Stable-SAM", predictor.stable_sam is not None),
            ("colours", predictor.colours is not None),
            ("crops", settings.sam_crops),
            ("prefetching", settings.sam_prefetch > 0),
            ("automatic masks", settings.sam_automatic),
        )
        if is_on
    ]
    every = settings.train_every
    return (
        Fact(
            name="Model",
            value=Path(settings.sam_model).stem,
            detail=service.models.base.model_version,
        ),
        Fact(
            name="Device",
            value="graphics card"
            if predictor.device.type == "cuda"
            else predictor.device.type.upper(),
            detail=f"{predictor.device}, {_PRECISIONS[dtype]}",
        ),
        Fact(
            name="Switched on",
            value=", ".join(on) or "nothing",
            detail=f"images at {predictor.policy.mode} size",
        ),
        Fact(
            name="Training",
            value=f"every {every} annotations" if every else "when asked to",
            detail=f"from {settings.train_min_tasks} annotated tasks on; method: "
            f"{_METHODS[settings.train_method]}",
        ),
    )


def _project(
    service: Service, name: str, *, host: str | None, title: str, now: float
) -> ProjectView:
    project = service.registry.project(name)
    problems = []
    if (problem := service.models.errors.get(name)) is not None:
        problems.append(problem)
    active, activated = None, []
    try:
        active, activated = project.active(), project.activated()
    except RegistryError as error:
        problems.append(str(error))
    address = host or _address_of(service, name)
    number = project_number(name)
    url = f"{address}/projects/{number}" if address and number is not None else None
    versions = project.versions()
    jobs = [_job(one, now, service) for one in _jobs(service.jobs, name)]
    running = next((one for one in jobs if not one.job.is_finished), None)
    earlier = activated[-2] if len(activated) > 1 else None
    base = service.models.base.model_version
    return ProjectView(
        name=name,
        title=title,
        address=address,
        url=url,
        served=active.model_version if active is not None else base,
        active=active,
        since=_changed_at(project),
        earlier=None
        if len(activated) < 2
        else ("the base model" if earlier is None else f"v{earlier}"),
        problems=tuple(dict.fromkeys(problems)),
        job=running,
        past=tuple(one for one in jobs if one.job.is_finished),
        versions=tuple(_version(one, active, url) for one in reversed(versions)),
        chart=iou_chart(
            [
                (one.number, bool(one.manifest.get("promoted")), _report(one).means)
                for one in versions
            ]
        ),
        is_open=False,
    )


def _last_activity(project: ProjectView) -> tuple[bool, bool, float]:
    times = [one.job.created_at for one in project.past]
    times += [one.version.created_at for one in project.versions[:1]]
    is_running = project.job is not None and project.job.job.state != "queued"
    return is_running, project.job is not None, max(times, default=0.0)


def _address_of(service: Service, name: str) -> str | None:
    try:
        client = service.client_for({"project": name})
    except (BackendError, OSError, ValueError):
        return None
    return None if client is None else client.base_url


def _changed_at(project: ProjectVersions) -> float | None:
    try:
        at = json.loads(project.pointer())["at"]
    except (RegistryError, ValueError, KeyError, TypeError):
        return None
    return at if isinstance(at, float) else None


def _jobs(store: JobStore, name: str) -> list[Job]:
    try:
        return store.jobs(name, limit=_JOBS)
    except JobsUnavailableError:
        return []


def _job(job: Job, now: float, service: Service) -> JobView:
    progress = job.progress
    step, steps = progress.get("step", 0), progress.get("steps")
    judged, to_judge = progress.get("judged", 0), progress.get("to_judge")
    done, counted = None, ""
    if job.state == "judging" and to_judge:
        done, counted = judged / to_judge, f"{judged} of {to_judge} held-out images"
    elif steps and job.state != "judging":
        done, counted = step / steps, f"step {step} of {steps}"
    eta_s = progress.get("eta_s")
    is_running = job.state in ("running", "judging")
    losses = progress.get("losses") or {}
    return JobView(
        job=job,
        state="cancelling" if job.cancel_requested and not job.is_finished else _STATES[job.state],
        trigger=_TRIGGERS[job.trigger],
        phase=str(progress.get("phase", "")) if is_running else "",
        done=done,
        counted=counted,
        eta=f"about {duration(eta_s)} left" if is_running and eta_s else "",
        losses=tuple((name, value) for name, value in losses.items() if value is not None),
        charts=_charts(progress.get("curve")) if is_running else (),
        method=_method({"method": job.method, **progress}),
        hint=_hint(job, now, service),
    )


def _hint(job: Job, now: float, service: Service) -> str:
    """Say why a job waits; a worker does one at a time."""
    if job.state != "queued":
        return ""
    others = [one for one in service.jobs.jobs() if one.state in ("running", "judging")]
    if others:
        return f"It waits for job {others[0].id}: one training runs at a time."
    debounce_s = service.settings.train_debounce_s if job.trigger == "annotations" else 0.0
    if job.trigger == "annotations" and now - job.created_at < debounce_s + _WAIT_S:
        return f"It begins when nobody has annotated for {duration(debounce_s)}."
    if now - job.created_at < debounce_s + _WAIT_S:
        return "It begins in a moment."
    return (
        "No worker has taken it yet. If none runs, start one: sam-ml-backend worker (serve has one "
        "beside it unless WORKER=false)."
    )


def _version(version: Version, active: Version | None, url: str | None) -> VersionView:
    manifest = version.manifest
    report = _report(version)
    is_active = active is not None and active.number == version.number
    kept = "promoted" if manifest.get("promoted") else "not promoted"
    means = [(_MODELS[name], report.means[name]) for name in _MODELS if name in report.means]
    return VersionView(
        version=version,
        state="serving" if is_active else kept,
        data=_data(manifest),
        method=_method(manifest),
        prompt_free=_prompt_free(version),
        sentence=str(manifest.get("sentence", "")),
        means=tuple(means),
        scores=report.scores,
        pictures=_picture_rows(version, url),
        charts=report.charts,
        left_out=tuple(str(one) for one in manifest.get("left_out") or ()),
    )


def _data(manifest: Mapping[str, Any]) -> str:
    learnt, judged = (len(manifest.get(name) or ()) for name in ("learnt_from", "judged_by"))
    if not learnt:
        return ""
    objects = manifest.get("objects")
    with_objects = f" with {objects} objects" if objects else ""
    return f"learnt from {learnt} tasks{with_objects}, judged on {judged} others"


def _method(said: Mapping[str, Any]) -> str:
    """Say how a job is done or a version was made, as progress and manifest have it."""
    method, reason = str(said.get("method", "")), str(said.get("method_reason", ""))
    name = _METHODS.get(method, method)
    return f"{name}: {reason}" if name and reason else name


def _prompt_free(version: Version) -> str:
    label = version.prompt_free_label
    if label is None:
        return ""
    return f"It finds {label or 'what was labelled'} without a prompt."


def _pictures_of(version: Version) -> Mapping[str, Any]:
    pictures = version.manifest.get("pictures")
    return pictures if isinstance(pictures, Mapping) else {}


def _picture_rows(version: Version, url: str | None) -> tuple[PictureRow, ...]:
    rows: dict[int, dict[str, tuple[str, Any]]] = {}
    for name, task_id in _pictures_of(version).items():
        if (match := _PICTURE.fullmatch(name)) is not None:
            rows.setdefault(int(match[2]), {})[match[1]] = name, task_id
    found = []
    for _, row in sorted(rows.items()):
        task_id = next(iter(row.values()))[1]
        pictures = [
            Picture(name=row[when][0], caption=when) for when in ("before", "after") if when in row
        ]
        task_url = f"{url}/data?task={task_id}" if url and isinstance(task_id, int) else None
        found.append(PictureRow(task_id=task_id, url=task_url, pictures=tuple(pictures)))
    return tuple(found)


def _report(version: Version) -> _Report:
    return _read_report(version.folder, str(version.manifest["adapter_sha256"]))


@lru_cache(maxsize=256)
def _read_report(folder: Path, _digest: str) -> _Report:
    """Read a version's report; `_digest` tells it from another one that was in the folder once."""
    judgement, curve = _json(folder / "judgement.json"), _json(folder / "curves.json")
    means = judgement.get("means") if isinstance(judgement, dict) else None
    rows = judgement.get("rows") if isinstance(judgement, dict) else None
    known = means.items() if isinstance(means, dict) else ()
    return _Report(
        means={name: value for name, value in known if _is_share(value)},
        scores=_scores(rows if isinstance(rows, list) else []),
        charts=_charts(curve),
    )


def _charts(curve: object) -> tuple[Chart, ...]:
    """Draw what a training told of its steps."""
    return tuple(one for one in (loss_chart(curve), progress_chart(curve)) if one is not None)


def _scores(rows: Sequence[object]) -> tuple[ScoreRow, ...]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if isinstance(row, dict) and _is_share(row.get("value")):
            key = str(row.get("label")), str(row.get("prompt")), str(row.get("measure"))
            found.setdefault(key, {})[str(row.get("model"))] = row
    labels = [label for label, *_ in found]
    if len(set(labels)) == 2 and "all" in labels:  # one label is the same as all
        found = {key: models for key, models in found.items() if key[0] == "all"}
    return tuple(
        ScoreRow(
            name=_PROMPTS.get(prompt, prompt),
            label=label,
            measure=_MEASURES.get(measure, measure),
            objects=int(next(iter(models.values())).get("objects") or 0),
            values=tuple(models[one]["value"] if one in models else None for one in _MODELS),
        )
        for (label, prompt, measure), models in found.items()
    )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _json(path: Path) -> object:
    try:
        found: object = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found
