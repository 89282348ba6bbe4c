"""What is looked at in one step: an image, or a crop of it as it would be served, and prompts."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sam_ext.automatic import generate_masks
from sam_ext.errors import DataError
from sam_ext.interactive import CropPolicy, answer_prompts, first_crop
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.metrics import tight_box
from sam_ext.predictor import Crop, ObjectPrompt, Predictor
from sam_ext.training.losses import mask_iou
from sam_ext.training.views import Flip, flip_boxes, flip_image, flip_points

__all__ = [
    "MASK_STRIDE",
    "Kept",
    "Part",
    "PartSource",
    "PromptChoice",
    "View",
    "empty_view",
    "five_and_five",
    "prompt_of",
    "with_box_of_points",
]

MASK_STRIDE = 4
"""Pixels of the encoder's input per pixel of the decoder's masks, along each axis."""

PromptChoice = Literal["auto", "box", "point", "coarse", "none"]

_LEAST_POINTS = 3  # for a box of them
_POINTS = 5  # drawn inside a mask, and as many outside
_TOLERANCE = 0.1  # of a rough mask's outline, as a share of the root of its area
_LEAST_TOLERANCE_PX = 2.0
# What an anchor finds by itself is a prompt if it is this sure of it.
_GRID_SIDE, _LEAST_IOU, _LEAST_STABILITY = 16, 0.7, 0.8

Value = TypeVar("Value")


class Kept:
    """The values used last, by key."""

    def __init__(self, max_entries: int) -> None:
        """Keep at most `max_entries`."""
        self._max_entries = max_entries
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Look a value up, or make it."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self._max_entries:
                self._values.popitem(last=False)
        self._values.move_to_end(key)
        value: Value = self._values[key]
        return value


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """What one step sees; a low-resolution pixel is four pixels of the image wide and high."""

    image: NDArray[np.uint8]
    """[H, W, 3], of the encoder's input size, padding left out."""
    prompts: tuple[ObjectPrompt, ...]
    """P objects, in pixels of `image`."""
    teacher_prompts: tuple[ObjectPrompt, ...]
    """The same objects, as teacher and anchor are asked for them."""
    allowed: Tensor
    """[P, H / 4, W / 4] bool: where the weak labels let an object be."""
    required: Tensor
    """[P, H / 4, W / 4] bool: where they say that it is."""
    boxes: Tensor
    """[P, H / 4, W / 4] bool: the drawn boxes; nothing where there is none."""
    masks: Tensor
    """[P, H / 4, W / 4], the share that a drawn mask covers; 0 where there is none."""
    covered: Tensor
    """[H / 4, W / 4], the share that any mask of the image covers, also those not asked for."""

    def agreement(self, masks: Tensor) -> Tensor:
        """Say how far masks agree with the boxes and masks that annotators drew.

        Args:
            masks: [P, H / 4, W / 4] bool.

        Returns:
            [P] in 0..1: the IoU with a drawn mask, else that of the mask's box with a drawn box. 0
            where there is neither: points are easily agreed with.
        """
        device = masks.device
        boxes, drawn = self.boxes.to(device), self.masks.to(device)
        agreed = _box_ious(masks, boxes) * boxes.flatten(1).any(1)
        has_mask = (drawn > 0.5).flatten(1).any(1)
        return torch.where(has_mask, mask_iou(masks.float(), drawn), agreed)

    def flipped(self, flip: Flip) -> View:
        """Turn everything round in the same way."""
        pixels = torch.from_numpy(self.image).permute(2, 0, 1)
        size_hw = (self.image.shape[0], self.image.shape[1])
        return View(
            image=np.ascontiguousarray(flip_image(pixels, flip).permute(1, 2, 0).numpy()),
            prompts=tuple(_flipped(prompt, flip, size_hw) for prompt in self.prompts),
            teacher_prompts=tuple(
                _flipped(prompt, flip, size_hw) for prompt in self.teacher_prompts
            ),
            allowed=flip_image(self.allowed, flip),
            required=flip_image(self.required, flip),
            boxes=flip_image(self.boxes, flip),
            masks=flip_image(self.masks, flip),
            covered=flip_image(self.covered, flip),
        )


def _box_ious(masks: Tensor, boxes: Tensor) -> Tensor:
    """Overlap the tight boxes of masks with boxes, both [P, H, W] bool: [P]; 0 without a mask."""
    got, wanted = _sides(masks), _sides(boxes)
    inner = torch.minimum(got[:, 2:], wanted[:, 2:]) - torch.maximum(got[:, :2], wanted[:, :2])
    overlap = inner.clamp(min=0).prod(1)
    areas = [(sides[:, 2:] - sides[:, :2]).prod(1) for sides in (got, wanted)]
    union = areas[0] + areas[1] - overlap
    return overlap / union.clamp(min=1) * masks.flatten(1).any(1)


def _sides(masks: Tensor) -> Tensor:
    """Return the tight boxes [P, 4] of masks [P, H, W] bool, in pixel edges; none is empty."""
    columns, rows = masks.any(1).int(), masks.any(2).int()
    first = [side.argmax(1) for side in (columns, rows)]
    last = [side.shape[1] - side.flip(1).argmax(1) for side in (columns, rows)]
    return torch.stack([*first, *last], 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some objects of one image, or of one crop of it."""

    key: tuple[int, Crop | None, int]
    """Number of the image, crop, and which objects of these."""
    view: View
    """As it is, before any flip."""


def _flipped(prompt: ObjectPrompt, flip: Flip, size_hw: tuple[int, int]) -> ObjectPrompt:
    box = prompt.box_xyxy
    points = torch.from_numpy(np.asarray(prompt.point_coords, np.float64))
    if box is not None:
        boxes = torch.from_numpy(np.asarray(box, np.float64))[None]
        box = flip_boxes(boxes, flip, image_hw=size_hw)[0].numpy()
    return replace(
        prompt,
        point_coords=flip_points(points, flip, image_hw=size_hw).numpy(),
        box_xyxy=box,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prompted:
    """An object of an image, how it is asked for, and what an annotator asserted of it."""

    prompt: ObjectPrompt
    teacher_prompt: ObjectPrompt
    asserted: LabelledObject | None


def _assemble(
    image: NDArray[np.uint8],
    objects: Sequence[_Prompted],
    region: Crop,
    input_size: tuple[int, int],
    covered: NDArray[np.bool_],
) -> View:
    """Cut a region out of an image, and bring it and what is known of it to the encoder's size."""
    x0, y0, x1, y1 = region
    height, width = input_size
    scale = np.array([width / (x1 - x0), height / (y1 - y0)])

    def moved(points: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        placed: NDArray[np.float64] = (points.reshape(-1, 2) - region[:2]) * scale
        return placed

    def brought(prompt: ObjectPrompt) -> ObjectPrompt:
        box = prompt.box_xyxy
        return replace(
            prompt,
            point_coords=moved(prompt.point_coords),
            box_xyxy=None if box is None else moved(box).reshape(4),
        )

    maps = [_assertions(one.asserted, region, moved, input_size) for one in objects]
    covered_share = _low_resolution(_share(covered, region, input_size))
    nothing = torch.zeros(0, *covered_share.shape)
    allowed, required, boxes, masks = (
        (torch.stack(kind) for kind in zip(*maps, strict=True))
        if maps
        else (nothing.bool(), nothing.bool(), nothing.bool(), nothing)
    )
    return View(
        image=np.array(  # copied: torch wants arrays that may be written to
            Image.fromarray(image[y0:y1, x0:x1]).resize((width, height), Image.Resampling.BILINEAR)
        ),
        prompts=tuple(brought(one.prompt) for one in objects),
        teacher_prompts=tuple(brought(one.teacher_prompt) for one in objects),
        allowed=allowed,
        required=required,
        boxes=boxes,
        masks=masks,
        covered=covered_share,
    )


def empty_view(image: NDArray[np.uint8], anchor: Predictor) -> View:
    """Look at an image [H, W, 3] in which nothing is.

    Args:
        image: Its pixels.
        anchor: Says how large the image is encoded.
    """
    whole = Crop(0, 0, image.shape[1], image.shape[0])
    input_size = anchor.input_size(whole.size)
    return _assemble(image, (), whole, input_size, np.zeros(image.shape[:2], np.bool_))


def _share(
    mask: NDArray[np.bool_], region: Crop, input_size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return the share of each pixel of the encoder's size that a mask [H, W] covers in a region.

    Not thresholded: of something smaller than such a pixel nothing would be left.
    """
    cut = mask[region.y0 : region.y1, region.x0 : region.x1].astype(np.float32)
    is_reduced = cut.shape[0] > input_size[0] or cut.shape[1] > input_size[1]
    how = cv2.INTER_AREA if is_reduced else cv2.INTER_LINEAR
    share: NDArray[np.float32] = cv2.resize(cut, input_size[::-1], interpolation=how)
    return share


def _assertions(
    one: LabelledObject | None,
    region: Crop,
    moved: Callable[[NDArray[np.floating[Any]]], NDArray[np.float64]],
    input_size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw what is asserted of an object: allowed, required, box and mask, as `View` has them."""
    height, width = input_size
    allowed = np.ones(input_size, np.bool_)
    box = np.zeros(input_size, np.bool_)
    share: NDArray[np.float32] = np.zeros(input_size, np.float32)
    points = {label: np.zeros(input_size, np.bool_) for label in (0, 1)}
    if one is not None and one.box_xyxy is not None:
        corners = moved(one.box_xyxy)
        left, top = np.floor(corners[0]).astype(int).clip(0)
        right, bottom = np.ceil(corners[1]).astype(int).clip(0)
        box[top:bottom, left:right] = True
        allowed &= box
    if one is not None and one.mask is not None:
        share = _share(one.mask, region, input_size)
        reach = max(_TOLERANCE * float(np.sqrt(share.sum())), _LEAST_TOLERANCE_PX)
        # At least where it covers most, however thin it is.
        outside = (share < min(0.5, max(float(share.max()), 1e-6))).astype(np.uint8)
        allowed &= cv2.distanceTransform(outside, cv2.DIST_L2, 5) <= reach
    if one is not None and len(one.point_coords):
        columns, rows = np.floor(moved(one.point_coords)).astype(int).T
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        for label, drawn in points.items():
            chosen = inside & (one.point_labels == label)
            drawn[rows[chosen], columns[chosen]] = True
    forbidden, required = (_low_resolution(points[label]) > 0 for label in (0, 1))
    return (
        (_low_resolution(allowed) > 0) & ~(forbidden & ~required),
        required,
        _low_resolution(box) >= 0.5,
        _low_resolution(share),
    )


def _low_resolution(drawn: NDArray[np.bool_ | np.float32]) -> Tensor:
    """Return the share of each low-resolution pixel that is drawn: [H / 4, W / 4], rounded up.

    Where a side is no multiple of 4 all pixels are a little smaller, so that a map may be flipped.
    """
    size = (-(-drawn.shape[0] // MASK_STRIDE), -(-drawn.shape[1] // MASK_STRIDE))
    return F.adaptive_avg_pool2d(torch.from_numpy(drawn).float()[None], size)[0]


def prompt_of(
    one: LabelledObject, *, kind: PromptChoice, image_hw: tuple[int, int], rng: np.random.Generator
) -> ObjectPrompt | None:
    """Choose how an object is asked for.

    Args:
        one: The object.
        kind: `auto` takes the box, else the points, else the rough mask. `box` takes the box, or
            the mask's. `point` takes the annotator's points, or draws five inside and five outside
            of the mask. `coarse` takes the rough mask, as its box.
        image_hw: The image's size; boxes are cut off at it.
        rng: Draws points.

    Returns:
        The prompt; None where the object has not what is wanted.

    Source:
        Zhang et al., arXiv:2312.03502, and its code for the numbers.

    Differs from the source:
        A rough mask is asked for by its own box, not by that of a polygon fitted to its first
        contour.
    """
    height, width = image_hw
    has_points = bool((one.point_labels == 1).any())
    if kind == "auto":
        kind = "box" if one.box_xyxy is not None else "point" if has_points else "coarse"
    if kind == "point":
        if has_points:
            return ObjectPrompt(point_coords=one.point_coords, point_labels=one.point_labels)
        return None if one.mask is None else five_and_five(one.mask, rng)
    if kind == "box" and one.box_xyxy is not None:
        box = one.box_xyxy
    elif one.mask is not None:
        box = tight_box(one.mask)
    else:
        return None
    box = np.clip(box, 0, [width, height, width, height])
    if (box[2:] - box[:2]).min() <= 0:
        return None
    return ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, np.int64), box_xyxy=box
    )


def with_box_of_points(prompt: ObjectPrompt, *, image_hw: tuple[int, int]) -> ObjectPrompt:
    r"""Add the box that points drawn evenly from an object would come from; leave out the others.

    .. math:: c \pm \frac{n + 1}{n - 1} \cdot \frac{\max - \min}{2}, \text{ along each axis}

    The range of n evenly drawn numbers is n - 1 parts of n + 1 of what they are drawn from.

    Args:
        prompt: A prompt by points.
        image_hw: The image's size; the box is cut off at it.

    Returns:
        The box and the points on the object. Unchanged where there is a box already, or fewer than
        three points on the object.
    """
    on_it = prompt.point_coords[prompt.point_labels == 1]
    if prompt.box_xyxy is not None or len(on_it) < _LEAST_POINTS:
        return prompt
    height, width = image_hw
    low, high = on_it.min(axis=0), on_it.max(axis=0) + 1
    reach = (high - low) / 2 * (len(on_it) + 1) / (len(on_it) - 1)
    middle = (low + high) / 2
    box = np.concatenate([middle - reach, middle + reach]).clip(0, [width, height] * 2)
    return ObjectPrompt(
        point_coords=on_it, point_labels=np.ones(len(on_it), np.int64), box_xyxy=box
    )


def five_and_five(mask: NDArray[np.bool_], rng: np.random.Generator) -> ObjectPrompt:
    """Draw five points inside a mask [H, W] and five outside, evenly and independently.

    Source:
        Zhang et al., arXiv:2312.03502, and its code for the numbers.
    """
    points, labels = [], []
    for label, where in ((1, mask), (0, ~mask)):
        ys, xs = np.nonzero(where)
        if len(xs):
            picks = rng.integers(len(xs), size=_POINTS)
            points.append(np.stack([xs[picks], ys[picks]], axis=1).astype(np.float64))
            labels += [label] * _POINTS
    return ObjectPrompt(point_coords=np.concatenate(points), point_labels=np.array(labels))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layout:
    """An image's objects and the parts that they are looked at in."""

    objects: tuple[_Prompted, ...]
    chunks: dict[Crop | None, list[list[int]]]
    """Indexes of the objects, by where they are looked at, in groups of bounded size."""
    served_in: list[Crop | None]
    """For each object, where it would be looked at in the end."""


class PartSource:
    """Gives the part of a step, always the same one."""

    def __init__(
        self,
        images: Sequence[LabelledImage],
        *,
        anchor: Predictor,
        kind: PromptChoice,
        box_of_points: bool,
        crops: CropPolicy | None,
        crop_chance: float,
        max_objects: int,
        seed: int,
    ) -> None:
        """Take the images; none is read yet.

        Raises:
            DataError: If no object can be asked for as `kind` wants it.
        """
        self._anchor = anchor
        self._kind = kind
        self._box_of_points = box_of_points
        self._crops = crops
        self._crop_chance = crop_chance
        self._max_objects = max_objects
        self._seed = seed
        self._images = [one for one in images if kind in ("auto", "none") or one.objects]
        self._layouts: dict[int, _Layout] = {}
        self._parts = Kept(max_entries=128)
        if not self._images:
            raise DataError(
                f"images must have objects to ask for by {kind}, got {len(images)} images and no "
                "object; label some, or choose other prompts"
            )

    def part(self, step: int, *, whole: bool = False) -> Part:
        """Choose the part of a step: images in turns, then an object and where it is looked at.

        Args:
            step: Number of the step.
            whole: Look at the whole image, wherever the object is served.

        Raises:
            DataError: If no image holds an object that can be asked for.
        """
        count = len(self._images)
        for attempt in range(count):
            epoch, place = divmod(step + attempt, count)
            order = np.random.default_rng((self._seed, epoch)).permutation(count)
            index = int(order[place])
            layout = self._layout(index)
            if layout.objects:
                rng = np.random.default_rng((self._seed, step, 1))
                chosen = int(rng.integers(len(layout.objects)))
                is_cropped = rng.random() < self._crop_chance and not whole
                crop = layout.served_in[chosen] if is_cropped else None
                number = next(n for n, c in enumerate(layout.chunks[crop]) if chosen in c)
                return self._part(index, crop, number)
        raise DataError(
            f"none of {count} images has an object that can be asked for by {self._kind}; "
            "label some, or choose other prompts"
        )

    def _part(self, index: int, crop: Crop | None, number: int) -> Part:
        def make() -> Part:
            image = self._images[index].read()
            layout = self._layout(index)
            region = crop or Crop(0, 0, image.shape[1], image.shape[0])
            input_size = self._anchor.input_size(region.size)
            objects = [layout.objects[i] for i in layout.chunks[crop][number]]
            covered = np.zeros(image.shape[:2], np.bool_)
            for one in self._images[index].objects:
                if one.mask is not None:
                    covered |= one.mask
            view = _assemble(image, objects, region, input_size, covered)
            return Part(key=(index, crop, number), view=view)

        return self._parts.get((index, crop, number), make)

    def _layout(self, index: int) -> _Layout:
        if index not in self._layouts:
            image = self._images[index].read()
            size_hw = (image.shape[0], image.shape[1])
            rng = np.random.default_rng((self._seed, index, 2))
            embeddings = Kept(max_entries=8)

            def embed(crop: Crop | None) -> Any:
                return embeddings.get(crop, lambda: self._anchor.embed(image, crop=crop))

            if self._kind == "none" or not self._images[index].objects:
                objects = self._found(embed(None))
            else:
                objects = self._labelled(self._images[index], size_hw, rng)
            prompts = [one.prompt for one in objects]
            served = [first_crop(self._anchor, one, size_hw, self._crops) for one in prompts]
            by_points = [i for i, one in enumerate(prompts) if one.box_xyxy is None]
            if by_points and self._crops is not None:
                # Points do not say how large their object is; the anchor's answer does.
                answers = answer_prompts(
                    self._anchor,
                    [prompts[i] for i in by_points],
                    image_hw=size_hw,
                    embed=embed,
                    crops=self._crops,
                )
                for i, answer in zip(by_points, answers, strict=True):
                    served[i] = answer.crop
            together: defaultdict[Crop | None, list[int]] = defaultdict(list)
            for i in rng.permutation(len(objects)).tolist():
                together[None].append(i)
                if served[i] is not None:
                    together[served[i]].append(i)
            self._layouts[index] = _Layout(
                objects=tuple(objects),
                chunks={
                    crop: [
                        members[first : first + self._max_objects]
                        for first in range(0, len(members), self._max_objects)
                    ]
                    for crop, members in together.items()
                },
                served_in=served,
            )
        return self._layouts[index]

    def _labelled(
        self, image: LabelledImage, size_hw: tuple[int, int], rng: np.random.Generator
    ) -> list[_Prompted]:
        objects = []
        for one in image.objects:
            if one.mask is not None and one.mask.shape != size_hw:
                raise DataError(
                    f"{image.name}: a mask must have the image's size {list(size_hw)}, "
                    f"got {list(one.mask.shape)}"
                )
            prompt = prompt_of(one, kind=self._kind, image_hw=size_hw, rng=rng)
            if prompt is not None:
                stricter = prompt
                if self._box_of_points:
                    stricter = with_box_of_points(prompt, image_hw=size_hw)
                objects.append(_Prompted(prompt=prompt, teacher_prompt=stricter, asserted=one))
        return objects

    def _found(self, embedding: Any) -> list[_Prompted]:
        """Ask for what the anchor finds by itself; nobody asserted anything of it."""
        found = generate_masks(
            self._anchor,
            embedding,
            points_per_side=_GRID_SIDE,
            pred_iou_threshold=_LEAST_IOU,
            stability_threshold=_LEAST_STABILITY,
            max_masks=2 * self._max_objects,
        )
        prompts = [
            ObjectPrompt(
                point_coords=np.zeros((0, 2)),
                point_labels=np.zeros(0, np.int64),
                box_xyxy=np.array(one.box_xyxy, np.float64),
            )
            for one in found
        ]
        return [_Prompted(prompt=one, teacher_prompt=one, asserted=None) for one in prompts]
