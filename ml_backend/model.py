"""Label Studio's tasks and drawings to predictions: SAM behind label-studio-ml's base class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np
from label_studio_ml.model import LabelStudioMLBase

from ml_backend.convert.prompts import (
    PromptedObject,
    StoredPrompts,
    find_size_mismatch,
    objects_from_annotation,
    objects_from_regions,
)
from ml_backend.convert.regions import regions_from_mask
from ml_backend.engine import Engine
from ml_backend.errors import (
    BackendError,
    BadRequestError,
    ImageAddressError,
    LabelConfigError,
    OverloadedError,
)
from ml_backend.images import ImageLoader, LoadedImage
from ml_backend.jobs import JobQueue, JobStore
from ml_backend.label_config import LabelConfig, parse_label_config
from ml_backend.label_studio import LabelStudioClient
from ml_backend.lanes import Priority
from ml_backend.models import Models, ServedModel
from ml_backend.prefetch import Prefetcher
from ml_backend.registry import VERSION_PREFIX, Registry
from ml_backend.settings import Settings, TrainMethod
from ml_backend.triggers import start_job
from sam_ext.errors import PromptError
from sam_ext.predictor import ObjectPrompt, Predictor

__all__ = ["SamBackend", "Service"]

Region: TypeAlias = dict[str, Any]
Task: TypeAlias = Mapping[str, Any]
Prediction: TypeAlias = "dict[str, Any] | list[Any]"
_Reader: TypeAlias = Callable[[tuple[int, int]], list[PromptedObject]]

_log = logging.getLogger(__name__)

# Whether a drawing is right, and on which image it is, does not depend on the image's size.
_ANY_SIZE = (1000, 1000)
# A mask has the image's size: so many of them are held at a time.
_OBJECTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Service:
    """What all requests of a process share."""

    settings: Settings
    registry: Registry
    models: Models
    engine: Engine
    images: ImageLoader
    client_for: Callable[[Task], LabelStudioClient | None]
    """Gives the Label Studio that a task came from, by the task's `project`."""
    method_for: Callable[[str], TrainMethod]
    """Says how a project is to be trained."""
    jobs: JobStore
    queue: JobQueue
    prefetcher: Prefetcher | None = None
    report: Callable[[str, str], None]
    """Told what a request goes on in spite of, as nobody else hears of it: a sentence, and where
    that was."""

    def close(self) -> None:
        """End all threads; what runs for an annotator is finished."""
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.engine.close()
        self.models.close()
        self.queue.close()


class SamBackend(LabelStudioMLBase):  # type: ignore[misc]  # label-studio-ml has no types
    """Answers the requests of one project; made for each request from what the request says."""

    def __init__(self, label_config: str, *, service: Service, project: str | None = None) -> None:
        """Read the labelling config.

        Args:
            label_config: The project's labelling config, XML.
            service: The models and what they work with.
            project: The project as Label Studio names it (`<id>.<created>`), to find its model and
                its images.

        Raises:
            LabelConfigError: If the config cannot be read or has no image.
        """
        super().__init__()  # without the config, which it would parse again with other rules
        self.label_config = label_config
        self.model_version = service.models.version_of(project)
        self._config: LabelConfig = parse_label_config(label_config)
        self._service = service
        self._project = project

    @cached_property
    def _model(self) -> ServedModel:
        """What answers all of this request; asked for when there is something to answer."""
        return self._chosen()

    def _chosen(self, *, wait: bool = False) -> ServedModel:
        model = self._service.models.for_project(self._project, wait=wait)
        self.model_version = model.model_version
        return model

    def predict(
        self, tasks: Sequence[Task], *, context: Mapping[str, Any] | None = None, **_params: Any
    ) -> list[Prediction]:
        """Answer a drawing, or tasks that were opened or selected.

        Args:
            tasks: One task with a drawing, any number without.
            context: What was drawn, under `result`; None when nothing was.
            _params: What else Label Studio sends; not used.

        Returns:
            One prediction a task. For a task that there is nothing to say about it is
            `{"result": []}` with a drawing (an empty one), which clears the suggestions, and `[]`
            without, of which Label Studio stores nothing.

        Raises:
            BackendError: If a drawing cannot be answered, or if no task of several could be.
        """
        if context is None:
            return self._predict_batch(tasks)
        regions = context.get("result")
        if regions in (None, []):
            return [{"result": []}]
        if len(tasks) != 1:
            raise BadRequestError(
                f"tasks must be the one task that was drawn on, got {len(tasks)}; "
                "send params.context as null for several"
            )

        def read(size_hw: tuple[int, int]) -> list[PromptedObject]:
            if size_hw != _ANY_SIZE and (other := find_size_mismatch(regions, size_hw=size_hw)):
                _log.info(
                    "task %s: the page has an image of %s (H, W), the file has %s, which counts",
                    tasks[0].get("id"),
                    other,
                    size_hw,
                )
            return objects_from_regions(regions, self._config, size_hw=size_hw)

        with self._service.engine.admitted():
            answer = self._answer(tasks[0], read, Priority.DRAWING)
        return [self._prediction(answer) or {"result": []}]

    def fit(
        self, tasks: Sequence[Task], workdir: str | None = None, **_params: Any
    ) -> dict[str, Any]:
        """Queue a training of the project; the worker asks Label Studio for the tasks itself.

        Raises:
            BackendError: If the project is not known, one is under way, or it cannot be queued.
        """
        if self._project is None:
            raise BadRequestError("project must be a project's name to train it, got none")
        service = self._service
        job = start_job(
            self._project,
            "start_training",
            service.method_for(self._project),
            jobs=service.jobs,
            queue=service.queue,
        )
        return {"job": job.id}

    def _predict_batch(self, tasks: Sequence[Task]) -> list[Prediction]:
        predictions: list[Prediction] = []
        failures: list[Exception] = []
        for task in tasks:
            try:
                predictions.append(self._prediction(self._batch_answer(task)) or [])
            except OverloadedError:
                raise
            except Exception as error:  # noqa: BLE001
                # One bad task among many must not cost the others their predictions.
                predictions.append([])
                failures.append(error)
                if len(tasks) > 1:
                    self._report_failure(task, error)
        if len(tasks) == 1:  # so does a page that opens a task
            self._prefetch(tasks[0])
        if failures and len(failures) == len(tasks):
            raise failures[0]
        return predictions

    def _report_failure(self, task: Task, error: Exception) -> None:
        if isinstance(error, BackendError):
            self._report(task, f"left out: {error}")
        else:
            _log.error("task %s", task.get("id"), exc_info=error)
            self._report(
                task, "left out: the backend failed in a way it does not know; see its log"
            )

    def _report(self, task: Task, reason: str) -> None:
        self._service.report(reason, f"task {task.get('id')}")

    def _prefetch(self, task: Task) -> None:
        prefetcher = self._service.prefetcher
        if prefetcher is not None:
            prefetcher.open(
                self._project or "",
                predictor=self._current_predictor,
                own=partial(self._images_of, task),
                following=partial(self._images_after, task),
            )

    def _current_predictor(self) -> Predictor:
        return self._service.models.for_project(self._project).predictor

    def _images_of(self, task: Task) -> Iterator[Callable[[], LoadedImage]]:
        for tag in self._config.images:
            yield partial(self._load, task, tag.name, None)

    def _images_after(self, task: Task) -> Iterator[Callable[[], LoadedImage]]:
        number, task_id = (self._project or "").partition(".")[0], task.get("id")
        client = self._service.client_for({"project": self._project})
        if client is None or not number.isdecimal() or not isinstance(task_id, int):
            return
        limit = self._service.settings.sam_prefetch
        for following in client.list_tasks(int(number), after=task_id, limit=limit):
            yield from self._images_of(following)

    def _batch_answer(self, task: Task) -> list[Region]:
        for where, stored in _stored(task):
            read = partial(objects_from_annotation, stored, self._config, where=where)
            asked = read(size_hw=_ANY_SIZE)
            for _, error in asked.left_out:
                self._report(task, f"left out: {error}")
            if asked.objects:
                with self._service.engine.admitted():
                    return self._answer(task, partial(_objects_of, read), Priority.BATCH)
        # Asked without the model, which may have to be loaded.
        if self._service.models.prompt_free_label_of(self._project) is not None:
            with self._service.engine.admitted():
                if self._model.prompt_free_label is None:  # it is the version before it as yet
                    self._model = self._chosen(wait=True)
                label = self._model.prompt_free_label
                if label is not None:
                    return self._prompt_free_answer(task, label)
        if self._service.settings.sam_automatic:
            with self._service.engine.admitted():
                return self._automatic_answer(task)
        return []

    def _answer(self, task: Task, read: _Reader, priority: Priority) -> list[Region]:
        """Answer the objects that `read` finds, once it knows each image's size."""
        regions: list[Region] = []
        predictor = self._model.predictor  # whose embeddings may tell the image's size
        places = dict.fromkeys((one.image_name, one.item_index) for one in read(_ANY_SIZE))
        for image_name, item_index in places:
            image = self._load(task, image_name, item_index)
            objects = [
                one
                for one in read(image.size_hw)
                if (one.image_name, one.item_index) == (image_name, item_index)
            ]
            regions += self._regions(task, predictor, objects, image, priority)
        return regions

    def _regions(
        self,
        task: Task,
        predictor: Predictor,
        objects: Sequence[PromptedObject],
        image: LoadedImage,
        priority: Priority,
    ) -> list[Region]:
        regions: list[Region] = []
        for start in range(0, len(objects), _OBJECTS_AT_ONCE):
            part = objects[start : start + _OBJECTS_AT_ONCE]
            try:
                prompts = [
                    ObjectPrompt(
                        point_coords=one.point_coords,
                        point_labels=one.point_labels,
                        box_xyxy=one.box_xyxy,
                    )
                    for one in part
                ]
                answers = self._service.engine.answer(predictor, image, prompts, priority=priority)
            except PromptError as error:
                raise BadRequestError(f"the drawing is no prompt: {error}") from error
            for one, answer in zip(part, answers, strict=True):
                if not answer.mask.any():
                    what = "the points" if one.box_xyxy is None else "a box"
                    self._report(
                        task, f"the model found nothing by {what}; draw a larger box, or add points"
                    )
                # How far Stable-SAM's plugin took part; Label Studio keeps it.
                routing = answer.candidates.routing
                regions += self._regions_of(
                    answer.mask,
                    image_name=one.image_name,
                    item_index=one.item_index,
                    labels=one.labels,
                    score=answer.iou_prediction,
                    meta=None if routing is None else {"routing": round(routing, 3)},
                )
        return regions

    def _prompt_free_answer(self, task: Task, label: str) -> list[Region]:
        """Answer with everything that the project's version takes for one of its label."""
        names = [one.name for one in self._config.images]
        names = [name for name in names if self._config.can_carry(name, label=label)]
        if not names:
            raise LabelConfigError(
                f"the labelling config must have a tag to answer {label!r} into, which "
                f"{self.model_version} finds without prompts, got none; train again, or roll back"
            )
        regions: list[Region] = []
        engine, predictor = self._service.engine, self._model.predictor
        for name, item_index in self._places(task):
            if name in names:
                image = self._load(task, name, item_index)
                embedding = engine.embed(predictor, image, priority=Priority.BATCH)
                for found in engine.prompt_free_masks(predictor, embedding):
                    regions += self._regions_of(
                        found.mask,
                        image_name=name,
                        item_index=item_index,
                        labels=[label] if label else [],
                        score=found.score,
                        meta={"prompt_free": True},
                    )
        return regions

    def _places(self, task: Task) -> Iterator[tuple[str, int | None]]:
        """Name a task's images, those of a list one by one."""
        data = task.get("data")
        for tag in self._config.images:
            addresses = data.get(tag.value_key) if isinstance(data, Mapping) else None
            if tag.is_list and isinstance(addresses, list):
                yield from ((tag.name, index) for index in range(len(addresses)))
            else:
                yield tag.name, None

    def _automatic_answer(self, task: Task) -> list[Region]:
        regions: list[Region] = []
        engine, predictor = self._service.engine, self._model.predictor
        for name, item_index in self._places(task):
            image = self._load(task, name, item_index)
            embedding = engine.embed(predictor, image, priority=Priority.BATCH)
            for found in engine.automatic_masks(predictor, embedding):
                regions += self._regions_of(
                    found.mask, image_name=name, item_index=item_index, score=found.iou_prediction
                )
        return regions

    def _regions_of(
        self,
        mask: np.ndarray[Any, np.dtype[np.bool_]],
        *,
        image_name: str,
        score: float,
        labels: Sequence[str] = (),
        item_index: int | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> list[Region]:
        settings = self._service.settings
        regions = regions_from_mask(
            mask,
            config=self._config,
            image_name=image_name,
            # The head that predicts it is not bounded, and its last digits depend on how the
            # processor's threads share the work.
            score=round(min(max(score, 0.0), 1.0), 4),
            labels=labels,
            wanted=settings.sam_output,
            tolerance_px=settings.sam_polygon_tolerance_px,
            item_index=item_index,
        )
        if meta is not None:
            for region in regions:
                region["meta"] = dict(meta)
        return regions

    def _prediction(self, regions: list[Region]) -> dict[str, Any] | None:
        if not regions:
            return None
        return {
            "result": regions,
            "score": fmean(region["score"] for region in regions),
            "model_version": self.model_version,
        }

    def _load(self, task: Task, image_name: str, item_index: int | None) -> LoadedImage:
        tag = self._config.find_image(image_name)
        assert tag is not None  # the config's own names only
        data = task.get("data")
        if tag.is_list and isinstance(data, Mapping):
            addresses = data.get(tag.value_key)
            index = item_index or 0
            if not isinstance(addresses, list) or not 0 <= index < len(addresses):
                raise ImageAddressError(
                    f"address: data.{tag.value_key} of task {task.get('id')} must be a list with "
                    f"an entry {index}, got {type(addresses).__name__}"
                )
            data = {**data, tag.value_key: addresses[index]}
        # A task names its project by number; what /setup announced is kept under the full name.
        return self._service.images.load(
            {**task, "data": data, "project": self._project}, tag.value_key
        )


def _objects_of(
    read: Callable[..., StoredPrompts], size_hw: tuple[int, int]
) -> list[PromptedObject]:
    return read(size_hw=size_hw).objects


def _stored(task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a task already has that may hold prompts: annotations, newest first, then predictions.

    The predictions of this backend are left out: its own rectangles are answers, not prompts.
    """
    for name in ("annotations", "predictions"):
        entries = task.get(name) or []
        if not isinstance(entries, list):
            raise BadRequestError(
                f"{name} of task {task.get('id')} must be a list, got {type(entries).__name__}"
            )
        for index, entry in reversed(list(enumerate(entries))):
            where = f"{name}[{index}] of task {task.get('id')}"
            if not isinstance(entry, Mapping):
                raise BadRequestError(f"{where} must be an object, got {type(entry).__name__}")
            is_own = str(entry.get("model_version")).startswith(VERSION_PREFIX)
            if not is_own and not entry.get("was_cancelled"):
                yield where, entry
