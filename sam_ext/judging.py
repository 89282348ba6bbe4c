"""Judges a candidate model on labels that it was not trained on, before it may serve."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sam_ext.errors import ConfigError
from sam_ext.evaluate.common import box_prompt, center_point, points_prompt
from sam_ext.interactive import CropPolicy, answer_prompts, default_refine, embed_once
from sam_ext.labels import LabelledImage
from sam_ext.metrics import iou, tight_box
from sam_ext.predictor import Crop, Embedding, ObjectPrompt, Predictor
from sam_ext.prompt_free import answer_prompt_free
from sam_ext.training.robust import noisy_boxes

__all__ = ["Judgement", "JudgementRow", "ModelName", "judge"]

ModelName = Literal["candidate", "active", "base"]

_Embed = Callable[[Crop | None], Embedding]

_ALL = "all"
_UNION, _EMPTY = "union iou", "left empty"
_JITTER = 0.2  # of boxes, as `noisy_boxes` takes it
_FALL = 0.02  # of a label's mean, that is forgiven
_USEFUL_UNION = 0.5  # mean IoU without a prompt from which on that is worth having
_FEW = 5  # objects, of which a label has at least so many to count by itself
# Questions that all models answer before the masks go: each holds nine of the image's size a while.
_MOST_AT_ONCE, _ANSWERED_PIXELS = 16, 2**26
_FARTHEST = 0.6  # distance from the base model, beyond which masks count as collapsed


@dataclass(frozen=True, kw_only=True)
class JudgementRow:
    """One model's mean on one kind of prompt."""

    model: str
    """`candidate`, `active` or `base`."""
    prompt: str
    """`tight box`, `jittered box` or `point`; `nothing` in the prompt-free mode."""
    measure: str
    """`iou` with the true mask; `box agreement`: IoU of the mask's box with the drawn one; `point
    agreement`: the share of the drawn points that the mask agrees with; `union iou`: IoU with the
    union of an image's true masks; `left empty`: 1 for an image without objects in which nothing is
    found, else 0."""
    label: str
    """The objects' label, or `all`."""
    objects: int
    """What the mean is over: objects, or images where nothing is asked for."""
    value: float
    """The mean, 0..1."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What was measured and what follows."""

    rows: tuple[JudgementRow, ...]
    means: dict[str, float]
    """The mean over all objects, prompts and measures, by model; empty without objects. The
    prompt-free mode is no part of it."""
    distance: float
    """1 - the mean IoU of the candidate's masks with the base model's; 0 without objects."""
    promoted: bool
    """Whether the candidate may serve."""
    sentence: str
    """The decision and its reason, for a person."""


class _Question(NamedTuple):
    """A prompt, and how its answer is measured."""

    kind: str
    measure: str
    label: str
    prompt: ObjectPrompt
    score: Callable[[NDArray[np.bool_]], float]


class _Scores:
    """What one model reached: values by prompt, measure and label."""

    def __init__(self) -> None:
        self.values: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)

    def add(self, question: _Question, value: float) -> None:
        self.values[question.kind, question.measure, question.label].append(value)

    def of(self, *, label: str = _ALL, kind: tuple[str, str] | None = None) -> list[float]:
        """List the values of a label, or of a prompt and measure, or of both."""
        return [
            value
            for (prompt, measure, one), values in self.values.items()
            for value in values
            if label in (_ALL, one) and kind in (None, (prompt, measure))
        ]


def judge(
    models: Mapping[str, Predictor],
    images: Sequence[LabelledImage],
    *,
    crops: CropPolicy | None,
    margin: float,
    seed: int,
    most_objects: int | None = None,
    prompt_free: Mapping[ModelName, str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Measure three models on held-out labels and decide whether the candidate may serve.

    An object with a true mask is asked for by its tight box, by a jittered one (0.2) and by its
    centre, and the answers are compared with the mask. One with a drawn box is asked for by that
    box, jittered, and by its centre, and the answers' boxes are compared with the drawn one. One
    with drawn points is asked for by the first of those on it, and the answer is held against the
    others, where there are others. All models get the same prompts, and answer as they would serve.

    The candidate is promoted if its mean over all of that is higher than the active model's and the
    base model's by the margin, no label of at least five objects falls by more than 0.02 against
    the active model, and its masks have not collapsed: their mean IoU with the base model's is at
    least 0.4. Weak labels alone would not notice that: a filled rectangle agrees with its box.

    A candidate that answers without prompts, too, is asked so about each image whose objects of its
    label all have true masks, and held against their union. If the active model has that mode for
    the same label, the candidate may not fall by more than 0.02 there either. If it has not, and
    the candidate's mean IoU there is at least 0.5, that is a gain by itself: the margin is then 0.
    In how many images without objects it finds nothing is measured, too, and decides nothing.

    Args:
        models: `candidate`, `active` and `base`; the last two may be the same object, which is
            then measured once.
        images: Held-out images; they are read one after the other.
        crops: As the models are served.
        margin: By how much better the candidate must be, at least 0.
        seed: Decides the jitter, together with an image's name.
        most_objects: At most so many of an image's objects are asked for, spread evenly; None asks
            for all.
        prompt_free: Which models have the prompt-free mode: the label of what they find, by name.
        on_progress: Told how many images are judged, and of how many.

    Raises:
        ConfigError: If a model is missing, or `margin` is below 0.
    """
    if missing := set(get_args(ModelName)) - set(models):
        raise ConfigError(
            f"models must be candidate, active and base, and {', '.join(sorted(missing))} is "
            "missing; give the base model as active where no version is"
        )
    if not margin >= 0:
        raise ConfigError(f"margin must be at least 0, got {margin}")
    distinct = {id(models[name]): models[name] for name in get_args(ModelName)}
    scores = {key: _Scores() for key in distinct}
    unions = _Unions(models, prompt_free or {})
    distances: list[float] = []
    for done, image in enumerate(images):
        if image.objects or unions.is_measured:
            pixels = image.read()
            size_hw = (pixels.shape[0], pixels.shape[1])
            questions = _questions(image, size_hw, seed, most_objects)
            embed = {key: embed_once(predictor, pixels) for key, predictor in distinct.items()}
            at_once = max(1, min(_MOST_AT_ONCE, _ANSWERED_PIXELS // (size_hw[0] * size_hw[1])))
            for start in range(0, len(questions), at_once):
                asked = questions[start : start + at_once]
                answers = {
                    key: _answers(predictor, size_hw, embed[key], asked, crops)
                    for key, predictor in distinct.items()
                }
                for key, masks in answers.items():
                    for question, mask in zip(asked, masks, strict=True):
                        scores[key].add(question, question.score(mask))
                distances += [
                    1 - iou(mine, theirs)
                    for mine, theirs in zip(
                        answers[id(models["candidate"])], answers[id(models["base"])], strict=True
                    )
                ]
            unions.add(image, embed)
        if on_progress is not None:
            on_progress(done + 1, len(images))
    by_name = {name: scores[id(models[name])] for name in get_args(ModelName)}
    distance = float(np.mean(distances)) if distances else 0.0
    promoted, sentence = _decide(by_name, unions.means, distance=distance, margin=margin)
    return Judgement(
        rows=(*(row for name, one in by_name.items() for row in _rows(name, one)), *unions.rows),
        means={name: float(np.mean(one.of())) for name, one in by_name.items() if one.of()},
        distance=distance,
        promoted=promoted,
        sentence=sentence,
    )


class _Unions:
    """What the candidate, and the active model beside it, find without prompts."""

    def __init__(
        self, models: Mapping[str, Predictor], prompt_free: Mapping[ModelName, str]
    ) -> None:
        self._models, self._label = models, prompt_free.get("candidate")
        asked = [
            name
            for name in ("candidate", "active")
            if self._label is not None and prompt_free.get(name) == self._label
        ]
        self._values: dict[str, dict[str, list[float]]] = {
            measure: {name: [] for name in asked} for measure in (_UNION, _EMPTY)
        }

    @property
    def is_measured(self) -> bool:
        """Whether anybody is asked."""
        return bool(self._values[_UNION])

    def add(self, image: LabelledImage, embed: Mapping[int, _Embed]) -> None:
        """Ask about an image, if what is wanted is known."""
        masks = [one.mask for one in image.objects if one.label == self._label]
        known = [mask for mask in masks if mask is not None]
        if (image.objects and not known) or len(known) < len(masks):
            return
        for name in self._values[_UNION]:
            model = self._models[name]
            answer = answer_prompt_free(model, embed[id(model)](None))
            if known:
                self._values[_UNION][name].append(iou(answer.mask, np.logical_or.reduce(known)))
            else:
                self._values[_EMPTY][name].append(float(not answer.instances))

    @property
    def means(self) -> dict[str, float]:
        """The mean IoU by model; empty if nothing was measured."""
        values = self._values[_UNION]
        return {name: float(np.mean(found)) for name, found in values.items() if found}

    @property
    def rows(self) -> list[JudgementRow]:
        return [
            JudgementRow(
                model=name,
                prompt="nothing",
                measure=measure,
                label=_ALL,
                objects=len(found),
                value=float(np.mean(found)),
            )
            for measure, values in self._values.items()
            for name, found in values.items()
            if found
        ]


def _questions(
    image: LabelledImage, image_hw: tuple[int, int], seed: int, most_objects: int | None
) -> list[_Question]:
    """Write down what is asked about an image, the same for all models."""
    digest = hashlib.sha256(f"{seed} {image.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    jittered = partial(_jittered, image_hw=image_hw, generator=generator)
    questions = []
    every = max(1, -(-len(image.objects) // most_objects)) if most_objects else 1
    for one in image.objects[::every]:
        ask = partial(_Question, label=one.label)
        if one.mask is not None and one.mask.any():
            box, score = tight_box(one.mask), partial(iou, one.mask)
            center = points_prompt(center_point(one.mask)[None])
            questions += [
                ask("tight box", "iou", prompt=box_prompt(box), score=score),
                ask("jittered box", "iou", prompt=box_prompt(jittered(box)), score=score),
                ask("point", "iou", prompt=center, score=score),
            ]
            continue
        if one.box_xyxy is not None:
            box = np.asarray(one.box_xyxy, np.float64)
            score = partial(_box_agreement, box)
            center = points_prompt((box[:2] + box[2:])[None] / 2)
            questions += [
                ask("jittered box", "box agreement", prompt=box_prompt(jittered(box)), score=score),
                ask("point", "box agreement", prompt=center, score=score),
            ]
        on_it = np.flatnonzero(one.point_labels == 1)
        if len(on_it):
            first = int(on_it[0])
            others = [i for i in range(len(one.point_labels)) if i != first] or [first]
            score = partial(_point_agreement, one.point_coords[others], one.point_labels[others])
            prompt = points_prompt(one.point_coords[first : first + 1])
            questions.append(ask("point", "point agreement", prompt=prompt, score=score))
    return questions


def _jittered(
    box_xyxy: NDArray[np.float64], *, image_hw: tuple[int, int], generator: torch.Generator
) -> NDArray[np.float64]:
    boxes = torch.from_numpy(box_xyxy)[None]
    drawn = noisy_boxes(boxes, image_hw=image_hw, scale=_JITTER, generator=generator)
    jittered: NDArray[np.float64] = drawn[0].numpy()
    return jittered


def _box_agreement(box_xyxy: NDArray[np.float64], mask: NDArray[np.bool_]) -> float:
    """Overlap a mask's box with a drawn one: their IoU, 0 for an empty mask."""
    if not mask.any():
        return 0.0
    got = tight_box(mask)
    sides = np.minimum(got[2:], box_xyxy[2:]) - np.maximum(got[:2], box_xyxy[:2])
    overlap = float(sides.clip(0).prod())
    areas = float((got[2:] - got[:2]).prod() + (box_xyxy[2:] - box_xyxy[:2]).prod())
    return overlap / (areas - overlap)


def _point_agreement(
    points: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], mask: NDArray[np.bool_]
) -> float:
    """Return the share of points that a mask holds, or leaves out if their label is 0."""
    height, width = mask.shape
    columns = np.clip(np.floor(points[:, 0]), 0, width - 1).astype(np.intp)
    rows = np.clip(np.floor(points[:, 1]), 0, height - 1).astype(np.intp)
    return float((mask[rows, columns] == (labels == 1)).mean())


def _answers(
    predictor: Predictor,
    image_hw: tuple[int, int],
    embed: _Embed,
    questions: Sequence[_Question],
    crops: CropPolicy | None,
) -> list[NDArray[np.bool_]]:
    """Answer as it would be served: [H, W] for each question."""
    answers = answer_prompts(
        predictor,
        [question.prompt for question in questions],
        image_hw=image_hw,
        embed=embed,
        crops=crops,
        refine=default_refine(predictor.image_size),
    )
    return [answer.mask.copy() for answer in answers]  # a view would keep all candidates


def _rows(model: str, scores: _Scores) -> list[JudgementRow]:
    kinds = dict.fromkeys((prompt, measure) for prompt, measure, _ in scores.values)
    labels = sorted({label for _, _, label in scores.values})
    return [
        JudgementRow(
            model=model,
            prompt=kind[0],
            measure=kind[1],
            label=label,
            objects=len(values),
            value=float(np.mean(values)),
        )
        for kind in kinds
        for label in (_ALL, *labels)
        if (values := scores.of(label=label, kind=kind))
    ]


def _decide(
    scores: Mapping[str, _Scores],
    unions: Mapping[str, float],
    *,
    distance: float,
    margin: float,
) -> tuple[bool, str]:
    """Say whether the candidate may serve, and why."""
    if not scores["candidate"].of():
        return False, "Kept the active model: no held-out image has an object to judge by."
    means = {name: float(np.mean(one.of())) for name, one in scores.items()}
    measured = (
        f"{means['candidate']:.3f} against {means['active']:.3f} of the active and "
        f"{means['base']:.3f} of the base model, over {len(scores['candidate'].of())} held-out "
        "answers"
    )
    if distance > _FARTHEST:
        return False, (
            f"Kept the active model: the candidate's masks have little left of the base model's "
            f"(mean IoU {1 - distance:.2f}, wanted {1 - _FARTHEST:.2f}), which looks like a "
            f"collapse; it reached {measured}."
        )
    is_newly_able = "active" not in unions and unions.get("candidate", 0.0) >= _USEFUL_UNION
    wanted_gain = 0.0 if is_newly_able else margin
    if means["candidate"] < max(means["active"], means["base"]) + wanted_gain:
        return False, (
            f"Kept the active model: the candidate reached {measured}, no gain of {wanted_gain:g}."
        )
    falls = _falls(scores)
    if falls:
        label, before, after = max(falls, key=lambda fall: fall[1] - fall[2])
        return False, (
            f"Kept the active model: the candidate reached {measured}, but fell from {before:.3f} "
            f"to {after:.3f} on the label {label}."
        )
    if "active" in unions and unions["candidate"] < unions["active"] - _FALL:
        return False, (
            f"Kept the active model: the candidate reached {measured}, but fell from "
            f"{unions['active']:.3f} to {unions['candidate']:.3f} without a prompt."
        )
    unasked = f", and {unions['candidate']:.3f} without a prompt" if unions else ""
    return True, f"Promoted: the candidate reached {measured}{unasked}."


def _falls(scores: Mapping[str, _Scores]) -> list[tuple[str, float, float]]:
    """List the labels that fall: label, the active model's mean, the candidate's."""
    falls = []
    for label in sorted({label for _, _, label in scores["active"].values}):
        active, candidate = (scores[name].of(label=label) for name in ("active", "candidate"))
        most = max(len(v) for (_, _, one), v in scores["active"].values.items() if one == label)
        before, after = float(np.mean(active)), float(np.mean(candidate))
        if most >= _FEW and after < before - _FALL:
            falls.append((label, before, after))
    return falls
