"""Training samples from COCO-format folders and generated scenes, mixed by weight.

A sample is a square image with a fixed number of prompted objects; sample `i` of a mix depends on
the seed and on `i` alone, so a run can be resumed anywhere and with any number of worker processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset

from sam_ext.errors import ConfigError, DataError
from sam_ext.training.synthetic import Photographs, SyntheticConfig, generate_scene

__all__ = [
    "CocoFolder",
    "MixedSamples",
    "PhotographsOf",
    "Sample",
    "Scene",
    "Source",
    "SyntheticSource",
    "make_sample",
]

_MASK_STRIDE = 4
_PAD_COLOUR = (124, 116, 104)  # SAM's pixel mean: zero after normalisation, as SAM pads
_MIN_AREA_PX = 20
_MAX_SHARE = 0.95
_MIN_VISIBLE = 0.15
_MOSAIC_CHANCE = 0.3
_MIN_CUTOUT_PX = 16


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its objects; masks are decoded when asked for."""

    image: NDArray[Any]
    """[H, W, 3] uint8 RGB."""
    boxes_xyxy: NDArray[Any]
    """[K, 4] float32, each object's bounding box in pixels."""
    rles: Sequence[dict[str, object]]
    """K COCO run-length encodings."""

    def mask(self, index: int) -> NDArray[Any]:
        """Decode object `index`: [H, W] uint8, 0 or 1."""
        decoded: NDArray[Any] = coco_mask.decode(self.rles[index])
        return decoded


class Source(Protocol):
    """Where scenes come from."""

    def __len__(self) -> int: ...

    def scene(self, index: int) -> Scene:
        """Return scene `index`, always the same one."""
        ...


@dataclass(eq=False)
class CocoFolder:
    """A folder with `annotations.json` (COCO instances, RLE or polygons) and `images/`.

    Images without a usable annotation are left out. Decoded images are kept in memory.
    """

    root: Path
    splits: tuple[str, ...] | None = ("train",)
    """Which images by their `split`; None takes all, whatever they say."""
    primary_only: bool = False
    """Only annotations with `primary == 1`, where a set has several annotators."""
    cache: bool = True
    _files: list[Path] = field(default_factory=list, init=False)
    _objects: list[list[dict[str, object]]] = field(default_factory=list, init=False)
    _images: dict[int, NDArray[Any]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        path = self.root / "annotations.json"
        if not path.is_file():
            raise DataError(
                f"{self.root} must hold annotations.json and images/, found no {path.name}; "
                "name the folder of one COCO-format set"
            )
        content = json.loads(path.read_text())
        by_image: dict[int, list[dict[str, object]]] = {}
        for annotation in content["annotations"]:
            if annotation.get("iscrowd") or (self.primary_only and annotation.get("primary") != 1):
                continue
            by_image.setdefault(annotation["image_id"], []).append(annotation)
        for image in content["images"]:
            if self.splits is not None and image.get("split") not in self.splits:
                continue
            size_hw = (image["height"], image["width"])
            objects = [
                {**annotation, "rle": _rle(annotation["segmentation"], size_hw)}
                for annotation in by_image.get(image["id"], [])
            ]
            if objects:
                self._files.append(self.root / "images" / image["file_name"])
                self._objects.append(objects)
        if not self._files:
            raise DataError(
                f"{self.root} must have annotated images in the splits {self.splits}, found none"
            )

    def __len__(self) -> int:
        return len(self._files)

    def file(self, index: int) -> Path:
        """Return where image `index` lies."""
        return self._files[index]

    def digest(self, indexes: Iterable[int]) -> str:
        """Hash which images these are and what is annotated in them; no pixel is looked at."""
        content = [(self._files[i].name, [o["rle"] for o in self._objects[i]]) for i in indexes]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def scene(self, index: int) -> Scene:
        """Read image `index` with all its annotations.

        Raises:
            DataError: If the file cannot be read as an image.
        """
        image = self._images.get(index)
        if image is None:
            pixels = cv2.imread(str(self._files[index]), cv2.IMREAD_COLOR)
            if pixels is None:
                raise DataError(f"{self._files[index]} must be an image, and cannot be read as one")
            image = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
            if self.cache:
                self._images[index] = image
        rles: list[dict[str, object]] = [o["rle"] for o in self._objects[index]]  # type: ignore[misc]  # built above
        boxes = coco_mask.toBbox(rles).astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        return Scene(image=image, boxes_xyxy=boxes, rles=rles)


@dataclass(eq=False)
class PhotographsOf:
    """The images and objects of some sources, as material for generated scenes."""

    sources: Sequence[tuple[Source, float]]
    """Each source with its weight."""

    def __post_init__(self) -> None:
        self._chances = _chances(self.sources)

    def photograph(self, rng: np.random.Generator) -> NDArray[Any]:
        """Draw an image [H, W, 3] uint8 RGB."""
        return self._scene(rng).image

    def cutout(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw an object: its bounding box's pixels [h, w, 3] uint8 and mask [h, w], 0 or 1."""
        for _ in range(200):
            scene = self._scene(rng)
            index = int(rng.integers(len(scene.rles)))
            x0, y0 = np.floor(scene.boxes_xyxy[index, :2]).astype(int)
            x1, y1 = np.ceil(scene.boxes_xyxy[index, 2:]).astype(int)
            if min(x1 - x0, y1 - y0) >= _MIN_CUTOUT_PX:
                return scene.image[y0:y1, x0:x1], scene.mask(index)[y0:y1, x0:x1]
        raise DataError(f"200 objects in a row were narrower than {_MIN_CUTOUT_PX} px")

    def annotated(self, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw an image [H, W, 3] uint8 RGB and the masks of its objects [K, H, W], 0 or 1."""
        scene = self._scene(rng)
        return scene.image, np.stack([scene.mask(index) for index in range(len(scene.rles))])

    def _scene(self, rng: np.random.Generator) -> Scene:
        source = self.sources[int(rng.choice(len(self.sources), p=self._chances))][0]
        return source.scene(int(rng.integers(len(source))))


@dataclass(eq=False)
class SyntheticSource:
    """Generated scenes, each made once and then kept."""

    config: SyntheticConfig
    count: int
    seed: int = 0
    photographs: Photographs | None = None
    _scenes: dict[int, Scene] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Generate scene `index`."""
        if index not in self._scenes:
            rng = np.random.default_rng((self.seed, index))
            generated = generate_scene(self.config, rng, self.photographs)
            stacked = np.asfortranarray(generated.masks.transpose(1, 2, 0).astype(np.uint8))
            rles = coco_mask.encode(stacked)
            boxes = coco_mask.toBbox(rles).astype(np.float32)
            boxes[:, 2:] += boxes[:, :2]
            self._scenes[index] = Scene(image=generated.image, boxes_xyxy=boxes, rles=rles)
        return self._scenes[index]


@dataclass(frozen=True, eq=False)
class Sample:
    """A square image with P prompted objects, in pixels of that image."""

    image: NDArray[Any]
    """[S, S, 3] uint8 RGB, padded at the bottom and right with the mean colour."""
    targets: NDArray[Any]
    """[P, S / 4, S / 4] uint8: the share of each low-resolution pixel covered, 255 for all."""
    boxes_xyxy: NDArray[Any]
    """[P, 4] float32, tight."""
    points: NDArray[Any]
    """[P, 2] float32, (x, y), one pixel inside each object."""


def make_sample(
    scene: Scene, *, size: int, prompts: int, rng: np.random.Generator, augment: bool
) -> Sample | None:
    """Cut, resize and pad a scene, and draw objects from it.

    Args:
        scene: Where to draw from.
        size: S, the side of the sample in pixels.
        prompts: P, how many objects; drawn again with another point where there are fewer.
        rng: Decides everything.
        augment: Random crop around an object, stretch, flip and colours; else the whole image.

    Returns:
        The sample, or None where no object is large enough to be asked for.
    """
    height, width = scene.image.shape[:2]
    x0, y0, crop_w, crop_h = 0, 0, width, height
    if augment and rng.random() < 0.7:
        x0, y0, crop_w, crop_h = _crop_around_object(scene, rng)
    scale_x = scale_y = size / max(crop_w, crop_h)
    if augment and rng.random() < 0.3:
        squeeze = rng.uniform(0.7, 1.0)
        scale_x, scale_y = (
            (scale_x * squeeze, scale_y)
            if rng.random() < 0.5
            else (
                scale_x,
                scale_y * squeeze,
            )
        )
    new_w, new_h = max(round(crop_w * scale_x), 1), max(round(crop_h * scale_y), 1)
    flip = augment and rng.random() < 0.5

    def place(array: NDArray[Any], fill: tuple[int, ...]) -> NDArray[Any]:
        part = array[y0 : y0 + crop_h, x0 : x0 + crop_w]
        shrink = new_w < crop_w or new_h < crop_h
        part = cv2.resize(
            part, (new_w, new_h), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        )
        if flip:
            part = part[:, ::-1]
        canvas = np.empty((size, size, *part.shape[2:]), np.uint8)
        canvas[:] = fill if part.ndim == 3 else fill[0]
        canvas[:new_h, :new_w] = part
        return canvas

    boxes = scene.boxes_xyxy
    inside = np.flatnonzero(
        (np.minimum(boxes[:, 2], x0 + crop_w) - np.maximum(boxes[:, 0], x0) > 1)
        & (np.minimum(boxes[:, 3], y0 + crop_h) - np.maximum(boxes[:, 1], y0) > 1)
    )
    targets, tight, points = [], [], []
    for index in rng.permutation(inside)[: 2 * prompts]:
        mask = scene.mask(int(index))
        whole = int(mask.sum())
        coverage = place(mask * 255, (0,))
        solid = coverage > 127
        area = int(solid.sum())
        visible = int(mask[y0 : y0 + crop_h, x0 : x0 + crop_w].sum())
        if (
            area < _MIN_AREA_PX
            or area > _MAX_SHARE * new_w * new_h
            or visible < _MIN_VISIBLE * whole
        ):
            continue
        targets.append(
            cv2.resize(
                coverage,
                (size // _MASK_STRIDE, size // _MASK_STRIDE),
                interpolation=cv2.INTER_AREA,
            )
        )
        ys, xs = np.nonzero(solid)
        tight.append((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        points.append((xs, ys))
        if len(targets) == prompts:
            break
    if not targets:
        return None
    order = [i % len(targets) for i in range(prompts)]
    picks = []
    for i in order:
        xs, ys = points[i]
        k = int(rng.integers(len(xs)))
        picks.append((xs[k], ys[k]))
    image = place(scene.image, _PAD_COLOUR)
    if augment:
        image[:new_h, :new_w] = _recolour(image[:new_h, :new_w], rng)
    return Sample(
        image=image,
        targets=np.stack([targets[i] for i in order]),
        boxes_xyxy=np.asarray([tight[i] for i in order], np.float32),
        points=np.asarray(picks, np.float32),
    )


@dataclass(eq=False)
class MixedSamples(Dataset[Sample]):
    """An endless, indexable stream of samples from several sources, drawn by weight.

    With augmentation some samples are four smaller ones side by side, so that small objects are
    as common as large ones.
    """

    sources: Sequence[tuple[Source, float]]
    """Each source with its weight."""
    size: int
    prompts: int
    seed: int
    augment: bool = True
    length: int = 2**31

    def __post_init__(self) -> None:
        if self.size % 16:
            raise ConfigError(f"size must be a multiple of 16, got {self.size}")
        self._chances = _chances(self.sources)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Draw sample `index`; the same seed and index give the same sample."""
        cv2.setNumThreads(1)
        rng = np.random.default_rng((self.seed, index))
        half = self.size // 2
        may_tile = self.augment and half % 16 == 0 and self.prompts % 4 == 0
        if may_tile and rng.random() < _MOSAIC_CHANCE:
            parts = [self._draw(rng, size=half, prompts=self.prompts // 4) for _ in range(4)]
            return _mosaic(parts)
        return self._draw(rng, size=self.size, prompts=self.prompts)

    def _draw(self, rng: np.random.Generator, *, size: int, prompts: int) -> Sample:
        for _ in range(200):
            source = self.sources[int(rng.choice(len(self.sources), p=self._chances))][0]
            scene = source.scene(int(rng.integers(len(source))))
            sample = make_sample(scene, size=size, prompts=prompts, rng=rng, augment=self.augment)
            if sample is not None:
                return sample
        raise DataError(
            f"200 scenes in a row had no object of {_MIN_AREA_PX} px at size {size}; "
            "train at a larger size or on images with larger objects"
        )


def _chances(sources: Sequence[tuple[Source, float]]) -> NDArray[Any]:
    weights = np.array([weight for _, weight in sources], float)
    if len(weights) == 0 or (weights < 0).any() or weights.sum() == 0:
        raise ConfigError(f"sources must have weights >= 0 with a sum above 0, got {weights}")
    chances: NDArray[Any] = weights / weights.sum()
    return chances


def _mosaic(parts: Sequence[Sample]) -> Sample:
    """Put four samples of one size into the corners of one that is twice as wide and high."""
    size = parts[0].image.shape[0]
    low = size // _MASK_STRIDE
    image = np.empty((2 * size, 2 * size, 3), np.uint8)
    targets, boxes, points = [], [], []
    for number, part in enumerate(parts):
        row, column = divmod(number, 2)
        image[row * size : (row + 1) * size, column * size : (column + 1) * size] = part.image
        placed = np.zeros((len(part.targets), 2 * low, 2 * low), np.uint8)
        placed[:, row * low : (row + 1) * low, column * low : (column + 1) * low] = part.targets
        corner = np.array([column * size, row * size], np.float32)
        targets.append(placed)
        boxes.append(part.boxes_xyxy + np.tile(corner, 2))
        points.append(part.points + corner)
    return Sample(
        image=image,
        targets=np.concatenate(targets),
        boxes_xyxy=np.concatenate(boxes),
        points=np.concatenate(points),
    )


def _rle(segmentation: object, size_hw: tuple[int, int]) -> dict[str, object]:
    """Bring a COCO segmentation of any form into compressed RLE."""
    if isinstance(segmentation, list):
        merged: dict[str, object] = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size_hw))
        return merged
    if not isinstance(segmentation, dict):
        raise DataError(f"segmentation must be polygons or an RLE, got {type(segmentation)}")
    if isinstance(segmentation["counts"], list):
        packed: dict[str, object] = coco_mask.frPyObjects(segmentation, *size_hw)
        return packed
    return segmentation


def _crop_around_object(scene: Scene, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Choose a square part of the image, cut at its borders, that holds a random object."""
    height, width = scene.image.shape[:2]
    longest = max(height, width)
    bx0, by0, bx1, by1 = scene.boxes_xyxy[int(rng.integers(len(scene.boxes_xyxy)))]
    smallest = min(max(1.15 * max(bx1 - bx0, by1 - by0), 0.25 * longest), longest)
    side = float(np.exp(rng.uniform(np.log(smallest), np.log(longest))))
    crop_w, crop_h = int(min(side, width)), int(min(side, height))

    def start(low: float, high: float, length: int, limit: int) -> int:
        first, last = max(high - length, 0), min(low, limit - length)
        first, last = min(first, last), max(first, last)
        return int(np.clip(rng.uniform(first, last), 0, limit - length))

    return start(bx0, bx1, crop_w, width), start(by0, by1, crop_h, height), crop_w, crop_h


def _recolour(image: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Change contrast, brightness, gamma and colours through one lookup table a channel."""
    if rng.random() < 0.8:
        ramp = np.arange(256, dtype=np.float32) / 255
        gains = rng.uniform(0.7, 1.35) * rng.uniform(0.85, 1.15, 3)
        shift = rng.uniform(-0.12, 0.12)
        gamma = np.exp(rng.uniform(-0.3, 0.3))
        table = np.clip(ramp[:, None] ** gamma * gains + shift, 0, 1)
        image = cv2.LUT(image, (table[:, None] * 255).astype(np.uint8))
    chance = rng.random()
    if chance < 0.1:
        image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    elif chance < 0.2:
        image = image[..., rng.permutation(3)]
    elif chance < 0.24:
        image = 255 - image
    if rng.random() < 0.1:
        image = cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), float(rng.uniform(0.4, 1.2)))
    return image
