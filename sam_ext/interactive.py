"""Answers what annotators draw: in crops where objects are small, click upon click, one mask each.

Everything follows from the prompts and the image alone: no session, and the same answer every time.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import ConfigError
from sam_ext.metrics import tight_box
from sam_ext.predictor import Crop, Embedding, ObjectMasks, ObjectPrompt, Predictor

__all__ = [
    "Answer",
    "CropPolicy",
    "Decode",
    "LogitsMemo",
    "answer_prompts",
    "default_crops",
    "default_refine",
    "embed_once",
    "first_crop",
]

# A crop is worth an encode of its own if it shows the object at least this much larger.
_MIN_GAIN = 1.5


class Decode(Protocol):
    """What `Predictor.decode` does."""

    def __call__(
        self,
        embedding: Embedding,
        prompts: Sequence[ObjectPrompt],
        *,
        multimask_output: bool | None = None,
    ) -> list[ObjectMasks]:
        """Predict the masks of each prompted object."""
        ...


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """When an object is looked at in a crop of the image, and in which one.

    Crops are squares of `min_side` pixels, or that times a power of two. Those of one side begin
    every half side, so that drawings near each other share a crop. At the image's border they are
    moved inwards, and along an axis shorter than their side they are cut off.
    """

    min_object_px: float
    """An object whose long side is shorter than this in the encoder's input gets a crop."""
    context: float = 4.0
    """A crop's side is at least so many times the object's long side; at least 2, so that one of
    the crops always holds all of the object."""
    min_side: int = 128
    """Side of the smallest crops in pixels of the image."""

    def __post_init__(self) -> None:
        if self.min_object_px <= 0:
            raise ConfigError(
                f"CropPolicy.min_object_px must be above 0, got {self.min_object_px}; "
                "give no CropPolicy to do without crops"
            )
        if self.context < 2:
            raise ConfigError(f"CropPolicy.context must be at least 2, got {self.context}")
        if self.min_side < 2:
            raise ConfigError(f"CropPolicy.min_side must be at least 2, got {self.min_side}")

    def crop(
        self,
        box_xyxy: NDArray[np.floating[Any]],
        image_hw: tuple[int, int],
        *,
        longer_than: int = 0,
    ) -> Crop | None:
        """Choose the smallest crop that shows an object with its surroundings.

        Args:
            box_xyxy: The object's box [4] in pixels.
            image_hw: The image's size.
            longer_than: Only crops whose side is longer than this.

        Returns:
            The crop, or None if that is the whole image.
        """
        height, width = image_hw
        extent = float((box_xyxy[2:] - box_xyxy[:2]).max())
        side = self.min_side
        while side < self.context * extent or side <= longer_than:
            side *= 2
        if side >= max(image_hw):
            return None
        x0, x1 = _lattice_span(float(box_xyxy[0] + box_xyxy[2]) / 2, side, width)
        y0, y1 = _lattice_span(float(box_xyxy[1] + box_xyxy[3]) / 2, side, height)
        return Crop(x0, y0, x1, y1)


def default_crops(train_side: int) -> CropPolicy:
    """Choose the crops that suit a model trained on squares of `train_side` pixels.

    Measured with `tiny` on train splits at its default policy, mean IoU of tight boxes and the
    share of them that a crop answers, by `min_object_px` and `context`:

    ============  ========  ===========  ===========  ===========  ===========
    set           no crops  32 px, 2     64 px, 2     96 px, 2     96 px, 4
    ============  ========  ===========  ===========  ===========  ===========
    coco200          0.591  0.606 (10%)  0.619 (25%)  0.625 (44%)  0.607 (17%)
    bsds500          0.645  0.662 (19%)  0.684 (39%)  0.686 (46%)  0.678 (35%)
    feralcat         0.703  0.703  (0%)  0.723 (18%)  0.735 (42%)  0.714 (18%)
    treepheno_hr     0.229  0.379 (86%)  0.382 (89%)  0.382 (89%)  0.369 (89%)
    ============  ========  ===========  ===========  ===========  ===========

    Models of 1024 px are not measured, and an encode costs them much: they get crops at the
    image's own resolution, of things of less than four tokens, with wider surroundings.
    """
    if train_side >= 1024:
        return CropPolicy(min_object_px=64, context=4, min_side=train_side)
    return CropPolicy(min_object_px=train_side * 3 / 8, context=2, min_side=train_side // 2)


def default_refine(train_side: int) -> bool:
    """Say whether a model trained on squares of `train_side` pixels is better refined.

    SAM's own models learnt to continue from their logits. `tiny` hardly did: after six simulated
    clicks on train splits it reaches a mean IoU of 0.308 refined and 0.386 not (coco200), and
    0.292 and 0.391 (bsds500).

    Source:
        Kirillov et al., arXiv:2304.02643, section A, on training with eight to eleven clicks.
    """
    return train_side >= 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """The mask that one object was answered with."""

    candidates: ObjectMasks
    """The masks it was chosen from."""
    chosen: int
    """Which one."""
    crop: Crop | None
    """The part of the image that the model looked at; None for all of it."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[H, W], of the original image's size."""
        mask: NDArray[np.bool_] = self.candidates.masks[self.chosen]
        return mask

    @property
    def iou_prediction(self) -> float:
        """How well the model expects the mask to overlap the object."""
        return float(self.candidates.iou_predictions[self.chosen])


class LogitsMemo:
    """The logits after the clicks answered last, so that the next click continues from them.

    It saves work and changes no answer; safe from several threads. It keeps no embedding alive.
    """

    def __init__(self, max_entries: int = 64) -> None:
        """Keep at most `max_entries` [h, w] arrays, 256 KiB each for a model of 1024 px."""
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], NDArray[np.float32]] = OrderedDict()

    def get(self, embedding: Embedding, prompt: ObjectPrompt) -> NDArray[np.float32] | None:
        """Look up the logits [h, w] that answered a prompt."""
        key = self._key(embedding, prompt)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, embedding: Embedding, prompt: ObjectPrompt, logits: NDArray[np.float32]) -> None:
        """Remember the logits [h, w] that answered a prompt."""
        with self._lock:
            self._kept[self._key(embedding, prompt)] = logits
            if len(self._kept) > self._max_entries:
                self._kept.popitem(last=False)

    @staticmethod
    def _key(embedding: Embedding, prompt: ObjectPrompt) -> tuple[object, ...]:
        box = prompt.box_xyxy
        return (
            weakref.ref(embedding),  # equal only for the same embedding, as long as it lives
            prompt.point_coords.astype(np.float64).tobytes(),
            prompt.point_labels.astype(np.int64).tobytes(),
            None if box is None else box.astype(np.float64).tobytes(),
        )


def embed_once(
    predictor: Predictor, image: NDArray[np.uint8]
) -> Callable[[Crop | None], Embedding]:
    """Make what `answer_prompts` wants as `embed` for an image that is at hand.

    Args:
        predictor: The model.
        image: [H, W, 3] RGB in 0..255.

    Returns:
        Gives the embedding of the image or of a crop, and keeps it for the next time.
    """

    @cache
    def embed(crop: Crop | None) -> Embedding:
        return predictor.embed(image, crop=crop)

    return embed


def answer_prompts(
    predictor: Predictor,
    prompts: Sequence[ObjectPrompt],
    *,
    image_hw: tuple[int, int],
    embed: Callable[[Crop | None], Embedding],
    decode: Decode | None = None,
    crops: CropPolicy | None = None,
    refine: bool = False,
    memo: LogitsMemo | None = None,
) -> list[Answer]:
    """Answer each prompted object of one image with one mask.

    A box that is small in the encoder's input is answered in a crop around it. Points do not say
    how large their object is: they are answered on the whole image, and if the mask is small, again
    in a crop, which grows as long as the mask touches an edge of it that is not the image's.
    A prompt with a `mask_input` is answered on the whole image, where its logits belong.

    Args:
        predictor: The model.
        prompts: The objects; each is answered as if it were alone.
        image_hw: The image's size.
        embed: Gives the embedding of a crop, or of the whole image; may keep it for the next time.
        decode: Used in place of the predictor's own `decode`.
        crops: When to use crops; None never does.
        refine: Answer several points one after another in their order, each with the logits of the
            answer before; otherwise all at once.
        memo: Kept by the caller from call to call, so that earlier clicks are not decoded again.

    Returns:
        One answer a prompt, in their order.

    Raises:
        PromptError: If a `mask_input` has another size than the image's logits.
    """
    answers: dict[int, Answer] = {}
    on_whole_image: dict[int, Answer] = {}
    pending = {
        index: first_crop(predictor, prompt, image_hw, crops)
        for index, prompt in enumerate(prompts)
    }
    while pending:
        by_crop: defaultdict[Crop | None, list[int]] = defaultdict(list)
        for index, crop in pending.items():
            by_crop[crop].append(index)
        pending = {}
        for crop, indexes in by_crop.items():
            part = [prompts[index] for index in indexes]
            got = _answer_on(
                embed(crop), part, decode=decode or predictor.decode, refine=refine, memo=memo
            )
            for index, prompt, answer in zip(indexes, part, got, strict=True):
                answers[index] = answer
                if crop is None:
                    on_whole_image[index] = answer
                following = _next_crop(predictor, prompt, image_hw, crops, answer)
                if following is not None:
                    pending[index] = following
                elif _is_cut_off(answer, image_hw) and index in on_whole_image:
                    answers[index] = on_whole_image[index]
    return [answers[index] for index in range(len(prompts))]


def first_crop(
    predictor: Predictor,
    prompt: ObjectPrompt,
    image_hw: tuple[int, int],
    crops: CropPolicy | None,
) -> Crop | None:
    """Choose where a prompt is asked first: only a box says how large the object is.

    Args:
        predictor: The model.
        prompt: The object.
        image_hw: The image's size.
        crops: When to use crops; None never does.

    Returns:
        The crop; None for the whole image.
    """
    if crops is None or prompt.box_xyxy is None or prompt.mask_input is not None:
        return None
    return _crop_if_small(predictor, prompt, prompt.box_xyxy, image_hw, crops)


def _next_crop(
    predictor: Predictor,
    prompt: ObjectPrompt,
    image_hw: tuple[int, int],
    crops: CropPolicy | None,
    answer: Answer,
) -> Crop | None:
    """Choose where a prompt is asked again after an answer; None keeps the answer."""
    if crops is None or prompt.box_xyxy is not None or prompt.mask_input is not None:
        return None
    if answer.crop is None:
        return _crop_if_small(predictor, prompt, _box(answer.mask), image_hw, crops)
    if not _is_cut_off(answer, image_hw):
        return None
    return _crop_if_small(
        predictor, prompt, _box(answer.mask), image_hw, crops, longer_than=max(answer.crop.size)
    )


def _crop_if_small(
    predictor: Predictor,
    prompt: ObjectPrompt,
    box_xyxy: NDArray[np.floating[Any]] | None,
    image_hw: tuple[int, int],
    crops: CropPolicy,
    *,
    longer_than: int = 0,
) -> Crop | None:
    """Choose a crop that holds a box and all points, if the image shows the object too small."""
    whole = _scale(predictor, image_hw)
    corners = prompt.point_coords
    if box_xyxy is not None:
        if float((box_xyxy[2:] - box_xyxy[:2]).max()) * whole >= crops.min_object_px:
            return None
        corners = np.concatenate([box_xyxy.reshape(2, 2), corners])
    corners = corners.clip(0, image_hw[::-1])
    crop = crops.crop(
        np.concatenate([corners.min(axis=0), corners.max(axis=0)]),
        image_hw,
        longer_than=longer_than,
    )
    if crop is None or _scale(predictor, crop.size) < _MIN_GAIN * whole:
        return None
    return crop


def _scale(predictor: Predictor, size_hw: tuple[int, int]) -> float:
    """Return how much larger an image of a size is in the encoder's input."""
    return max(predictor.input_size(size_hw)) / max(size_hw)


def _lattice_span(middle: float, side: int, length: int) -> tuple[int, int]:
    """Choose the span of `side` on an axis of `length` whose middle is nearest to a point."""
    if side >= length:
        return 0, length
    start = round((middle - side / 2) / (side // 2)) * (side // 2)
    start = min(max(start, 0), length - side)
    return start, start + side


def _is_cut_off(answer: Answer, image_hw: tuple[int, int]) -> bool:
    """Say whether a mask reaches an edge of its crop that is not the image's."""
    if answer.crop is None:
        return False
    x0, y0, x1, y1 = answer.crop
    mask, (height, width) = answer.mask, image_hw
    return bool(
        (x0 > 0 and mask[y0:y1, x0].any())
        or (y0 > 0 and mask[y0, x0:x1].any())
        or (x1 < width and mask[y0:y1, x1 - 1].any())
        or (y1 < height and mask[y1 - 1, x0:x1].any())
    )


def _answer_on(
    embedding: Embedding,
    prompts: Sequence[ObjectPrompt],
    *,
    decode: Decode,
    refine: bool,
    memo: LogitsMemo | None,
) -> list[Answer]:
    """Answer objects on one embedding, all objects' next clicks together."""
    chains = [_clicks(prompt) if refine else [prompt] for prompt in prompts]
    position = [0] * len(prompts)
    logits: list[NDArray[np.float32] | None] = [None] * len(prompts)
    for index, chain in enumerate(chains):
        for done in range(len(chain) - 1, 0, -1):
            logits[index] = memo.get(embedding, chain[done - 1]) if memo else None
            if logits[index] is not None:
                position[index] = done
                break
    answers: dict[int, Answer] = {}
    while unfinished := [i for i, chain in enumerate(chains) if position[i] < len(chain)]:
        clicks = [chains[index][position[index]] for index in unfinished]
        asked = [
            click if (before := logits[index]) is None else replace(click, mask_input=before)
            for index, click in zip(unfinished, clicks, strict=True)
        ]
        got = _choose(embedding, asked, decode)
        for index, click, (candidates, chosen) in zip(unfinished, clicks, got, strict=True):
            answers[index] = Answer(candidates=candidates, chosen=chosen, crop=embedding.crop)
            position[index] += 1
            # Copied: a view would keep all candidates alive.
            logits[index] = after = candidates.low_res_logits[chosen].copy()
            if memo is not None and click.mask_input is None:
                memo.put(embedding, click, after)
    return [answers[index] for index in range(len(prompts))]


def _clicks(prompt: ObjectPrompt) -> list[ObjectPrompt]:
    """Take a prompt apart into what was drawn up to each click, the box being the first."""
    if prompt.mask_input is not None:
        return [prompt]
    first = 1 if prompt.box_xyxy is None else 0
    return [
        replace(
            prompt,
            point_coords=prompt.point_coords[:count],
            point_labels=prompt.point_labels[:count],
        )
        for count in range(first, len(prompt.point_coords) + 1)
    ]


def _choose(
    embedding: Embedding, prompts: Sequence[ObjectPrompt], decode: Decode
) -> list[tuple[ObjectMasks, int]]:
    """Decode prompts and choose each one's mask.

    Those that agree with most points come first. Among these, a single point gets the one of
    highest predicted IoU; anything more gets SAM's single mask, and one of the three others
    only where the single mask disagrees with a point that they agree with.
    """
    answers = list(decode(embedding, prompts))
    wrong = [
        index
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        if len(answer.masks) == 1 and answer.agreeing(prompt)[0] < len(prompt.point_coords)
    ]
    if wrong:
        others = decode(embedding, [prompts[index] for index in wrong], multimask_output=True)
        for index, other in zip(wrong, others, strict=True):
            if other.agreeing(prompts[index]).max() > answers[index].agreeing(prompts[index])[0]:
                answers[index] = other
    return [(answer, answer.best(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def _box(mask: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return the tight box [4] of a mask [H, W]; None if it is empty."""
    return tight_box(mask) if mask.any() else None
