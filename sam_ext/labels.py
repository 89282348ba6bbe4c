"""What a project's labels say of an image: boxes, points and masks of its objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import DataError

__all__ = ["LabelledImage", "LabelledObject"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledObject:
    """One labelled object; coordinates are (x, y) in pixels of the image, not rounded."""

    label: str
    """What it was called."""
    box_xyxy: NDArray[np.floating[Any]] | None
    """[4]: left, top, right, bottom; None where nobody drew one."""
    point_coords: NDArray[np.floating[Any]]
    """[T, 2]; T may be 0."""
    point_labels: NDArray[np.integer[Any]]
    """[T], 1 for the object and 0 for what is not it."""
    mask: NDArray[np.bool_] | None
    """[H, W], its pixels, as exactly as they were drawn; None where nobody drew any."""

    def __post_init__(self) -> None:
        coords, labels, box = self.point_coords, self.point_labels, self.box_xyxy
        if coords.ndim != 2 or coords.shape[1] != 2 or labels.shape != coords.shape[:1]:
            raise DataError(
                "LabelledObject.point_coords and point_labels must be [T, 2] and [T], "
                f"got {list(coords.shape)} and {list(labels.shape)}"
            )
        if not np.isfinite(coords).all() or not np.isin(labels, (0, 1)).all():
            raise DataError(
                "LabelledObject's points must be finite with labels 0 or 1, "
                f"got {coords.tolist()} and {labels.tolist()}"
            )
        if box is not None and not (
            box.shape == (4,) and np.isfinite(box).all() and (box[:2] < box[2:]).all()
        ):
            raise DataError(
                "LabelledObject.box_xyxy must be finite [left, top, right, bottom] with a size, "
                f"got {box.tolist()}"
            )
        if self.mask is not None and not (
            self.mask.ndim == 2 and self.mask.dtype == np.bool_ and self.mask.any()
        ):
            raise DataError(
                "LabelledObject.mask must be [H, W] bool and hold a pixel, "
                f"got {list(self.mask.shape)} {self.mask.dtype} with {int(self.mask.sum())} set"
            )
        if box is None and self.mask is None and not (labels == 1).any():
            raise DataError(
                "a LabelledObject must have a box, a mask or a point on it, got none of them; "
                "leave the object out"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """An image and what its labels say."""

    name: str
    """Tells it from the others, in messages, when a run goes on, and where noise is drawn."""
    read: Callable[[], NDArray[np.uint8]]
    """Gives the pixels [H, W, 3], always the same ones."""
    objects: tuple[LabelledObject, ...]
    """May be empty."""
