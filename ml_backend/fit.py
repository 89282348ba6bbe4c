"""One training job: labels and images in, a version out that is served if it is better.

    snapshot   the annotated tasks as they are now, kept for going on after a stop
    choose     by what the labels are, or as it was asked for, how to learn from them
    adapt      the base model learns from three quarters of them, and keeps how far it is
    judge      on the others, against what is served and against the base model
    publish    the version is added whole, and activated if it is better

Whatever fails before the last step leaves the project as it was.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from ml_backend.convert.supervision import (
    SupervisedObject,
    choose_annotation,
    supervision_of,
)
from ml_backend.errors import (
    BackendError,
    ImageError,
    ImageFetchError,
    JobsUnavailableError,
    LabelStudioError,
)
from ml_backend.images import ImageLoader, LoadedImage
from ml_backend.jobs import Job, JobState, JobStore
from ml_backend.label_config import ImageTag, LabelConfig, parse_label_config
from ml_backend.label_studio import (
    LabelStudioClient,
    LabelStudioUnreachableError,
    project_name,
    project_number,
)
from ml_backend.loading import (
    ba_sam_config,
    load_base,
    load_plugin,
    load_version,
    make_predictor,
    model_name,
)
from ml_backend.registry import ProjectVersions, Registry, Version
from ml_backend.settings import Settings
from sam_ext.adapters import AdapterMethod, save_adapter
from sam_ext.errors import CheckpointError, SamExtError
from sam_ext.interactive import (
    CropPolicy,
    answer_prompts,
    default_crops,
    default_refine,
    embed_once,
)
from sam_ext.judging import Judgement, judge
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.metrics import tight_box
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam, training_plugin
from sam_ext.training.choice import choose_method
from sam_ext.training.finetune import PROMPT_FREE_CHANCE, FinetuneConfig, finetune
from sam_ext.training.steps import TrainingStep
from sam_ext.training.wesam import WesamConfig, adapt

__all__ = ["Methods", "is_held_out", "run_job", "split_tasks"]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_RETRIES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)  # an update of Label Studio takes about a minute
_HELD_OUT_SHARE = 0.25
_HELD_OUT_LEAST = 2
_JUDGED_IMAGES = 32
_JUDGED_OBJECTS = 20  # of one image
_LEFT_OUT_KEPT = 100
_MASK_BYTES = 2**30  # of all masks in memory; the others are learnt from as boxes
_PICTURES = 6
_PICTURE_SIDE = 640
_PICTURE_OBJECTS = 40
_CURVE_POINTS = 200
_IOU_SHARE = 0.1  # of a new step in the average over the last ones
_LITTLE_DISK_BYTES = 2**24
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Methods:
    """What a job is done with; tests put simpler ones in their place."""

    adapt: Callable[..., Sam] = adapt
    finetune: Callable[..., Sam] = finetune
    judge: Callable[..., Judgement] = judge
    sleep: Callable[[float], None] = time.sleep


class _EndError(Exception):
    """The job is over."""

    def __init__(self, state: JobState, reason: str) -> None:
        super().__init__(reason)
        self.state: JobState = state


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a job learns."""

    method: AdapterMethod
    reason: str
    """Why that one, part of a sentence."""
    config: WesamConfig | FinetuneConfig
    prompt_free_label: str | None = None
    """What is learnt to be found without a prompt; None if nothing is."""


class _StopError(Exception):
    """The worker was told to stop; the job goes on when it is back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _TaskImage:
    """One image of an annotated task, with what is known of it."""

    name: str
    task_id: int
    read: Callable[[], NDArray[np.uint8]]
    objects: tuple[SupervisedObject, ...]
    """None of them if it was submitted with nothing on it: there is nothing to label."""


def run_job(
    job_id: int,
    *,
    settings: Settings,
    jobs: JobStore,
    registry: Registry,
    images: ImageLoader,
    client_for: Callable[[Mapping[str, Any]], LabelStudioClient | None],
    should_stop: Callable[[], bool] = lambda: False,
    methods: Methods | None = None,
) -> Job:
    """Do a queued job, or go on with one that was stopped in the middle.

    Args:
        job_id: The job; one that is not queued is left alone.
        settings: The service's.
        jobs: Where the job stands, and how far it is.
        registry: Gets the version.
        images: Loads the tasks' images.
        client_for: Gives a project's Label Studio.
        should_stop: Asked after each step; then the job waits again, and can go on.
        methods: What it is done with, if not with `sam_ext`.

    Returns:
        The job as it is now: finished, or queued again after a stop.

    Raises:
        JobsUnavailableError: If what became of the job cannot be written down, or somebody else
            holds the database; it is running then, and the next worker goes on with it.
    """
    job = jobs.start(job_id)
    if job is None:
        return jobs.get(job_id)
    run = _Run(
        job,
        settings=settings,
        jobs=jobs,
        registry=registry,
        images=images,
        client_for=client_for,
        should_stop=should_stop,
        methods=methods or Methods(),
    )
    number: int | None = None
    try:
        version = run.version()
        number = version.number
        state, reason = run.publish(version)
    except _StopError:
        jobs.requeue(job.id)
        _log.info("job %d waits: the worker was told to stop", job.id)
        return jobs.get(job.id)
    except _EndError as end:
        state, reason = end.state, str(end)
    except Exception as error:  # a job must end with its reason
        if isinstance(error, JobsUnavailableError) and error.is_locked:
            raise  # what was learnt is kept, and the next worker goes on with it
        state, reason = "failed", _reason(error, settings)
        if not isinstance(error, BackendError | SamExtError):
            _log.exception("job %d", job.id)
    shutil.rmtree(run.folder, ignore_errors=True)  # first: it may be what fills the disk
    _log.info("job %d of project %s: %s: %s", job.id, job.project, state, reason)
    return jobs.finish(job.id, state, reason, version=number)


def is_held_out(project: str, task_id: int) -> bool:
    """Say whether a task is for judging by its name alone, the same for ever."""
    return _draw(project, task_id) < _HELD_OUT_SHARE


def split_tasks(project: str, task_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Part tasks for learning from tasks for judging.

    About a quarter is for judging, between a fifth (and two) and a third: `is_held_out` says which,
    and where those are too few or too many, the same drawing does. So a task that was learnt from
    is hardly ever judged by later on.

    Returns:
        The ids for learning and those for judging, both ascending.
    """
    drawn = sorted(task_ids, key=lambda task_id: (_draw(project, task_id), task_id))
    wanted = sum(is_held_out(project, task_id) for task_id in task_ids)
    number = max(min(wanted, len(drawn) // 3), len(drawn) // 5, _HELD_OUT_LEAST)
    return sorted(drawn[number:]), sorted(drawn[:number])


def _draw(project: str, task_id: int) -> float:
    digest = hashlib.sha256(f"{project} {task_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class _Run:
    """The steps of one job."""

    def __init__(
        self,
        job: Job,
        *,
        settings: Settings,
        jobs: JobStore,
        registry: Registry,
        images: ImageLoader,
        client_for: Callable[[Mapping[str, Any]], LabelStudioClient | None],
        should_stop: Callable[[], bool],
        methods: Methods,
    ) -> None:
        self.folder: Path = settings.runs_dir / str(job.id)
        self._job = job
        self._settings = settings
        self._jobs = jobs
        self._registry = registry
        self._images = images
        self._client_for = client_for
        self._should_stop = should_stop
        self._methods = methods
        self._progress: dict[str, Any] = dict(job.progress)
        self._state: Literal["running", "judging"] = "running"

    @property
    def _versions(self) -> ProjectVersions:
        return self._registry.project(self._job.project)

    def version(self) -> Version:
        """Make the job's version, judged and not yet served; or find it, made before a stop."""
        made = [v for v in self._versions.versions() if v.manifest.get("job") == self._identity]
        if made:
            return made[0]
        self._check()
        self.folder.mkdir(parents=True, exist_ok=True)
        client, number = self._connect()
        snapshot = self._read_snapshot() or self._take_snapshot(client, number)
        config = parse_label_config(snapshot["label_config"])
        annotated = self._annotated_images(snapshot, config)
        labelled = [image for image in annotated if image.objects]
        learnt_from, judged_by = self._split(labelled, snapshot)

        sam = load_base(self._settings)
        plugin = load_plugin(sam, self._settings)
        base = make_predictor(sam, self._settings, plugin)
        crops = default_crops(base.image_size) if self._settings.sam_crops else None
        way = self._way(labelled, learnt_from, base)
        self._progress |= {"method": way.method, "method_reason": way.reason}
        is_prompt_free = way.prompt_free_label is not None
        pictured = judged_by
        if is_prompt_free:
            without, held_out = self._split_empty(annotated)
            learnt_from, judged_by = learnt_from + without, judged_by + held_out[: len(judged_by)]
        self._say("learning")
        adapted = self._adapt(sam, _labelled(learnt_from), way, plugin)
        adapter = self.folder / "adapter.safetensors"
        save_adapter(adapted, adapter, base=sam, method=way.method, prompt_free=is_prompt_free)
        del adapted
        self._require_config(client, number, config)

        self._state = "judging"
        self._say("judging")
        # What is judged is what would be served: the file, read as the service reads it.
        candidate = load_version(sam, adapter, self._settings, plugin)
        served, served_label = self._served(sam, plugin) or (base, None)
        labels = {"candidate": way.prompt_free_label, "active": served_label}
        judgement = self._methods.judge(
            {"candidate": candidate, "active": served, "base": base},
            _labelled(judged_by),
            crops=crops,
            margin=self._settings.train_margin,
            seed=_SEED,
            most_objects=_JUDGED_OBJECTS,
            prompt_free={name: label for name, label in labels.items() if label is not None},
            on_progress=self._on_judged,
        )
        pictures = _pictures(served, candidate, pictured, crops=crops, check=self._check)
        self._require_config(client, number, config)
        self._check()
        return self._add(
            adapter,
            judgement,
            pictures,
            {
                "method": way.method,
                "method_asked": self._job.method,
                "method_reason": way.reason,
                "prompt_free": {"label": way.prompt_free_label} if is_prompt_free else None,
                "base": weights_fingerprint(sam),
                "config": json.loads(json.dumps(dataclasses.asdict(way.config), default=str)),
                "learnt_from": sorted({image.task_id for image in learnt_from}),
                "judged_by": sorted({image.task_id for image in judged_by}),
                "objects": sum(len(image.objects) for image in learnt_from),
                "left_out": snapshot["left_out"][:_LEFT_OUT_KEPT],
            },
        )

    def _adapt(
        self,
        sam: Sam,
        images: Sequence[LabelledImage],
        way: _Way,
        plugin: StableSam | None,
    ) -> Sam:
        run_dir = self.folder / "adapt"
        adapt_here = partial(
            self._methods.adapt if way.method == "wesam" else self._methods.finetune,
            sam,
            images,
            way.config,
            run_dir=run_dir,
            on_step=self._on_step,
            stable_sam=training_plugin(plugin),
        )
        if run_dir.exists():
            try:
                return adapt_here()
            except CheckpointError as error:  # settings were changed, or an image is gone
                _log.warning("job %d begins anew: %s", self._job.id, error)
                shutil.rmtree(run_dir)
        return adapt_here()

    def publish(self, version: Version) -> tuple[JobState, str]:
        """Have the version served if it was judged better."""
        sentence = str(version.manifest["sentence"])
        if not version.manifest["promoted"]:
            return "rejected", sentence
        self._versions.activate(version.number)
        return "promoted", sentence

    @property
    def _identity(self) -> dict[str, Any]:
        # With the time: `jobs.db` may have been deleted, and the numbers begin again.
        return {"id": self._job.id, "created_at": self._job.created_at}

    def _add(
        self,
        adapter: Path,
        judgement: Judgement,
        pictures: Mapping[str, tuple[int, bytes]],
        details: Mapping[str, Any],
    ) -> Version:
        manifest = {
            "model": model_name(self._settings),
            "job": self._identity,
            "trigger": self._job.trigger,
            "promoted": judgement.promoted,
            "sentence": judgement.sentence,
            "software": installed_version("sam-ml-backend"),
            "pictures": {name: task_id for name, (task_id, _) in pictures.items()},
            **details,
        }
        files: dict[str, Path | bytes] = {
            "judgement.json": _json(dataclasses.asdict(judgement)),
            "curves.json": _json(self._progress.get("curve", [])),
        }
        for name, (_, picture) in pictures.items():
            files[name] = picture
        return self._versions.add(adapter, manifest, files)

    def _connect(self) -> tuple[LabelStudioClient, int]:
        client = self._client_for({"project": self._job.project})
        number = project_number(self._job.project)
        if client is None or number is None:
            raise _EndError(
                "failed",
                f"the Label Studio of project {self._job.project} must be known, got no address; "
                "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or save the model's connection in "
                "Label Studio again",
            )
        return client, number

    def _project(self, client: LabelStudioClient, number: int) -> dict[str, Any]:
        project = self._patiently(lambda: client.get_project(number))
        if (name := project_name(project)) != self._job.project:
            raise _EndError(
                "failed",
                f"project {number} of {client.base_url} must be {self._job.project}, got {name}: "
                "it is another Label Studio; set LABEL_STUDIO_URL to the one that asked",
            )
        return project

    def _require_config(self, client: LabelStudioClient, number: int, config: LabelConfig) -> None:
        """Refuse to go on if the labels mean something else by now; colours may change.

        Without Label Studio nobody can change them: hours of learning are not thrown away for that.
        """
        try:
            now = parse_label_config(str(self._project(client, number)["label_config"]))
        except LabelStudioUnreachableError as error:
            _log.warning("job %d goes on with the config that it knows: %s", self._job.id, error)
            return
        if now != config:
            raise _EndError(
                "rejected",
                "the labelling config must stay as it is while a job runs, but was changed; start "
                "the training again",
            )

    def _read_snapshot(self) -> dict[str, Any] | None:
        try:
            snapshot: dict[str, Any] = json.loads((self.folder / "snapshot.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return snapshot

    def _take_snapshot(self, client: LabelStudioClient, number: int) -> dict[str, Any]:
        self._say("reading the labels")
        label_config = str(self._project(client, number)["label_config"])
        tags = parse_label_config(label_config).images
        self._jobs.forget_annotations(self._job.project)

        def fetch() -> list[dict[str, Any]]:
            tasks = []
            for task in client.annotated_tasks(number):
                self._check()
                annotation = choose_annotation(task)
                if annotation is not None:
                    data = {tag.value_key: task["data"].get(tag.value_key) for tag in tags}
                    kept = {name: annotation.get(name) for name in ("id", "result", "ground_truth")}
                    tasks.append({"id": task["id"], "data": data, "annotation": kept})
            return tasks

        tasks = self._patiently(fetch)
        snapshot = {"label_config": label_config, "tasks": tasks, "left_out": []}
        self._write_snapshot(snapshot)
        return snapshot

    def _write_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        path = self.folder / "snapshot.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(snapshot))
        temporary.replace(path)

    def _annotated_images(self, snapshot: dict[str, Any], config: LabelConfig) -> list[_TaskImage]:
        """Load the images, and read what the labels say of them; one that fails is left out."""
        annotated, left_out, mask_bytes = [], [], 0
        self._say("loading the images")
        for task in snapshot["tasks"]:
            for tag, item_index, one in _addresses(task, config.images, self._job.project):
                self._check()
                try:
                    image = self._load(one, tag.value_key)
                except ImageError as error:
                    left_out.append(f"task {task['id']}: {error}")
                    continue
                supervision = supervision_of(
                    task["annotation"],
                    config,
                    image_name=tag.name,
                    size_hw=image.size_hw,
                    item_index=item_index,
                )
                left_out += [f"task {task['id']}: {reason}" for reason in supervision.left_out]
                objects = []
                for found in supervision.objects:
                    if found.mask is not None:
                        mask_bytes += found.mask.size
                        if mask_bytes > _MASK_BYTES:
                            found = _without_mask(found)
                    objects.append(found)
                if objects or task["annotation"]["result"] == []:
                    name = f"task {task['id']} {tag.name} {item_index or 0}"
                    annotated.append(
                        _TaskImage(
                            name=name,
                            task_id=task["id"],
                            read=self._reader(one, tag.value_key, image),
                            objects=tuple(objects),
                        )
                    )
        for reason in left_out:
            _log.info("job %d leaves out: %s", self._job.id, reason)
        snapshot["left_out"] = left_out
        return annotated

    def _split(
        self, labelled: Sequence[_TaskImage], snapshot: Mapping[str, Any]
    ) -> tuple[list[_TaskImage], list[_TaskImage]]:
        task_ids = sorted({image.task_id for image in labelled})
        least = self._settings.train_min_tasks
        if len(task_ids) < least:
            left_out = snapshot["left_out"]
            more = (
                f"; {len(left_out)} things were left out, first: {left_out[0]}" if left_out else ""
            )
            raise _EndError(
                "rejected",
                f"a training must have at least {least} tasks with labels, got {len(task_ids)}: "
                f"{least - len(task_ids)} are missing{more}",
            )
        learnt_from, judged_by = split_tasks(self._job.project, task_ids)
        judged_by = sorted(judged_by, key=lambda task_id: _draw(self._job.project, task_id))
        judged = set(judged_by[:_JUDGED_IMAGES])
        return (
            [image for image in labelled if image.task_id in set(learnt_from)],
            [image for image in labelled if image.task_id in judged][:_JUDGED_IMAGES],
        )

    def _split_empty(
        self, annotated: Sequence[_TaskImage]
    ) -> tuple[list[_TaskImage], list[_TaskImage]]:
        """Part the images of nothing in those for learning and those for judging."""
        empty = [image for image in annotated if not image.objects]
        held_out = [image for image in empty if is_held_out(self._job.project, image.task_id)]
        return [image for image in empty if image not in held_out], held_out

    def _reader(
        self, task: Mapping[str, Any], value_key: str, image: LoadedImage
    ) -> Callable[[], NDArray[np.uint8]]:
        content_hash, address = image.content_hash, image.uri

        def read() -> NDArray[np.uint8]:
            self._check()  # before the first step, all images are looked at
            loaded = self._load(task, value_key)
            if loaded.content_hash != content_hash:
                raise _EndError(
                    "rejected",
                    f"the image of task {task['id']} must stay as it is while a job runs, but "
                    f"{address[:100]!r} was changed; start the training again",
                )
            return loaded.pixels

        return read

    def _load(self, task: Mapping[str, Any], value_key: str) -> LoadedImage:
        return self._patiently(lambda: self._images.load(task, value_key))

    def _way(
        self, labelled: Sequence[_TaskImage], learnt_from: Sequence[_TaskImage], base: Predictor
    ) -> _Way:
        """Choose how to learn, as it was asked for, or by what the labels are.

        Raises:
            _EndError: If it was asked for full masks to be learnt from, and there are none.
        """
        objects = [one for image in learnt_from for one in image.objects]
        masks = sum(one.mask is not None for one in objects)
        complete = [all(one.mask is not None for one in image.objects) for image in learnt_from]
        asked = self._job.method
        if asked == "auto":
            method, reason = choose_method(
                images=len(learnt_from), objects=len(objects), masks=masks
            )
        elif asked != "wesam" and not masks:
            raise _EndError(
                "rejected",
                f"the method {asked} must have full masks to learn from, got none in "
                f"{len(learnt_from)} images: brush or outline some objects, or train with wesam",
            )
        else:
            method = asked
            reason = f"it was asked for; {masks} of {len(objects)} objects have a full mask"
        shared: dict[str, Any] = {
            "steps": self._settings.train_steps or None,
            "ba_sam": ba_sam_config(self._settings, base.image_size),
            "precision": self._settings.sam_precision,
            "gradient_checkpointing": base.image_size >= 1024,
            "seed": _SEED,
        } | ({} if self._settings.sam_crops else {"crop_chance": 0.0})
        if method == "wesam":
            config = WesamConfig(policy=base.policy, **shared)
            return _Way(method=method, reason=reason, config=config)
        labels = {one.label for image in labelled for one in image.objects}
        can_find = len(labels) == 1 and 2 * sum(complete) >= len(complete)
        return _Way(
            method=method,
            reason=reason,
            config=FinetuneConfig(
                method=method,
                policies=(base.policy,),
                prompt_free_chance=PROMPT_FREE_CHANCE if can_find else 0.0,
                **shared,
            ),
            prompt_free_label=labels.pop() if can_find else None,
        )

    def _served(self, sam: Sam, plugin: StableSam | None) -> tuple[Predictor, str | None] | None:
        """Give what the project is served with, and what that finds without prompts.

        None for the base model, also if the version cannot be loaded.
        """
        try:
            active = self._versions.active()
            if active is None:
                return None
            active.check()
            predictor = load_version(sam, active.adapter, self._settings, plugin)
        except (BackendError, SamExtError) as error:
            _log.warning("job %d judges against the base model alone: %s", self._job.id, error)
            return None
        return predictor, active.prompt_free_label

    def _on_step(self, step: TrainingStep) -> None:
        losses = {name: _finite(value) for name, value in step.losses.items()}
        earlier = [one for one in self._progress.get("curve", []) if one["step"] < step.step]
        if len(earlier) >= _CURVE_POINTS:
            earlier = earlier[::2]
        gap = earlier[-1]["step"] - earlier[-2]["step"] if len(earlier) > 1 else 1
        is_due = not earlier or step.step - earlier[-1]["step"] >= gap or step.step == step.steps
        # A step looks at one image: averaged over steps, the IoU says how far the training is.
        average = self._progress.get("mean_iou", step.mean_iou)
        average += _IOU_SHARE * (step.mean_iou - average)
        point = {"step": step.step, "mean_iou": average, **losses}
        self._progress |= {
            "step": step.step,
            "steps": step.steps,
            "losses": losses,
            "mean_iou": average,
            "eta_s": _finite(step.eta_s),
            "curve": [*earlier, point] if is_due else earlier,
        }
        self._check()

    def _on_judged(self, done: int, total: int) -> None:
        self._progress |= {"judged": done, "to_judge": total, "eta_s": None}
        self._check()

    def _say(self, phase: str) -> None:
        self._progress["phase"] = phase
        self._check()

    def _check(self) -> None:
        """Write down how far the job is.

        Raises:
            _EndError: If it was cancelled.
            _StopError: If the worker is to stop.
        """
        if not self._jobs.report(self._job.id, self._progress, state=self._state):
            raise _EndError("cancelled", "cancelled by a person")
        if self._should_stop():
            raise _StopError

    def _patiently(self, call: Callable[[], _T]) -> _T:
        """Ask again, for more than a minute, if Label Studio does not answer at all."""
        for pause_s in _RETRIES_S:
            try:
                return call()
            except LabelStudioUnreachableError as error:
                reason: Exception = error
            except ImageFetchError as error:
                if self._label_studio_answers():
                    raise
                reason = error
            _log.warning("job %d waits %.0f s: %s", self._job.id, pause_s, reason)
            until = time.monotonic() + pause_s
            while (left := until - time.monotonic()) > 0:
                self._check()
                self._methods.sleep(min(left, 0.5))
        return call()

    def _label_studio_answers(self) -> bool:
        client, _ = self._connect()
        try:
            client.version()
        except LabelStudioUnreachableError:
            return False
        except LabelStudioError:
            return True
        return True


def _addresses(
    task: Mapping[str, Any], tags: Sequence[ImageTag], project: str
) -> Iterator[tuple[ImageTag, int | None, dict[str, Any]]]:
    """Take a task apart: one address each, also of a list of images."""
    for tag in tags:
        addresses = task["data"].get(tag.value_key)
        if tag.is_list and isinstance(addresses, list):
            for index, address in enumerate(addresses):
                data = {tag.value_key: address}
                yield tag, index, {"id": task["id"], "data": data, "project": project}
        else:
            yield tag, None, {"id": task["id"], "data": task["data"], "project": project}


def _without_mask(one: SupervisedObject) -> SupervisedObject:
    """Keep an object's box in place of its mask."""
    assert one.mask is not None
    box = one.box_xyxy if one.box_xyxy is not None else tight_box(one.mask)
    return dataclasses.replace(one, mask=None, box_xyxy=box)


def _labelled(images: Sequence[_TaskImage]) -> list[LabelledImage]:
    """Describe images to `sam_ext`."""
    return [
        LabelledImage(
            name=image.name,
            read=image.read,
            objects=tuple(
                LabelledObject(
                    label=one.label,
                    box_xyxy=one.box_xyxy,
                    point_coords=one.point_coords,
                    point_labels=one.point_labels,
                    mask=one.mask,
                )
                for one in image.objects
            ),
        )
        for image in images
    ]


def _pictures(
    before: Predictor,
    after: Predictor,
    images: Sequence[_TaskImage],
    *,
    crops: CropPolicy | None,
    check: Callable[[], None],
) -> dict[str, tuple[int, bytes]]:
    """Draw what the served model and the new one make of some of the judged images.

    Returns:
        JPEG files by name, each with the number of its task.
    """
    pictures = {}
    for index, image in enumerate(images[:_PICTURES]):
        pixels = image.read()
        prompts = [
            ObjectPrompt(
                point_coords=one.point_coords,
                point_labels=one.point_labels,
                box_xyxy=tight_box(one.mask) if one.mask is not None else one.box_xyxy,
            )
            for one in image.objects[:_PICTURE_OBJECTS]
        ]
        for name, predictor in (("before", before), ("after", after)):
            check()
            masks = _masks(predictor, pixels, prompts, crops=crops)
            pictures[f"{name}-{index + 1}.jpg"] = image.task_id, _picture(pixels, masks)
    return pictures


def _masks(
    predictor: Predictor,
    pixels: NDArray[np.uint8],
    prompts: Sequence[ObjectPrompt],
    *,
    crops: CropPolicy | None,
) -> list[NDArray[np.bool_]]:
    answers = answer_prompts(
        predictor,
        prompts,
        image_hw=(pixels.shape[0], pixels.shape[1]),
        embed=embed_once(predictor, pixels),
        crops=crops,
        refine=default_refine(predictor.image_size),
    )
    return [answer.mask for answer in answers]


def _picture(pixels: NDArray[np.uint8], masks: Sequence[NDArray[np.bool_]]) -> bytes:
    height, width = pixels.shape[:2]
    scale = min(1.0, _PICTURE_SIDE / max(height, width))
    size_wh = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
    for index, mask in enumerate(masks):
        colour = cv2.cvtColor(
            np.array([[[index * 67 % 180, 220, 255]]], np.uint8), cv2.COLOR_HSV2RGB
        )
        small = cv2.resize(mask.astype(np.uint8), size_wh, interpolation=cv2.INTER_AREA)
        canvas[small > 0] = (canvas[small > 0] * 0.6 + colour[0, 0] * 0.4).astype(np.uint8)
        outlines, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, outlines, -1, colour[0, 0].tolist(), 1)
    _, file = cv2.imencode(".jpg", cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR))
    return bytes(file)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reason(error: Exception, settings: Settings) -> str:
    """Say in a sentence what went wrong."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or _free_bytes(settings.data_dir) < _LITTLE_DISK_BYTES:
        return (
            f"DATA_DIR must have room for a training, but {settings.data_dir} is full; free the "
            "disk, and start again"
        )
    if isinstance(error, BackendError | SamExtError):
        return str(error)
    is_memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    if is_memory or "can't allocate memory" in str(error):
        return (
            "a training must fit into the memory, but there was too little; choose a smaller "
            "model or SAM_RESOLUTION, or another SAM_DEVICE"
        )
    return (
        f"the training failed in a way it does not know ({type(error).__name__}: {error}); look "
        "for it in the worker's log"
    )


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return _LITTLE_DISK_BYTES
