"""How good a mask is, against the mask that was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import ConfigError

__all__ = [
    "boundary_iou",
    "calibration_error",
    "ellipse_in_box",
    "iou",
    "rectangle_mask",
    "stability",
    "tight_box",
]


def iou(predicted: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Intersection over union of two masks [H, W] of booleans; 1 where both are empty.

    Raises:
        ConfigError: If the shapes differ.
    """
    _check(predicted, wanted)
    union = np.count_nonzero(predicted | wanted)
    return float(np.count_nonzero(predicted & wanted) / union) if union else 1.0


def boundary_iou(
    predicted: NDArray[Any], wanted: NDArray[Any], *, dilation_ratio: float = 0.02
) -> float:
    """IoU of the parts of two masks that lie near their own outlines.

    Args:
        predicted: [H, W] bool.
        wanted: [H, W] bool.
        dilation_ratio: How near: this share of the image's diagonal, at least one pixel.

    Returns:
        0..1; 1 where both are empty.

    Raises:
        ConfigError: If the shapes differ.

    Source:
        Cheng et al., arXiv:2103.16562. The image's border counts as outline, as there.
    """
    _check(predicted, wanted)
    height, width = predicted.shape
    distance = max(round(dilation_ratio * float(np.hypot(height, width))), 1)
    return iou(_boundary(predicted, distance), _boundary(wanted, distance))


def stability(masks: Sequence[NDArray[Any]]) -> float:
    r"""How far masks agree that answer prompts of equal quality for one object.

    .. math:: S = \frac{1}{B} \sum_i IoU(M_i, \bigcup_j M_j)

    Args:
        masks: B masks [H, W] of booleans, at least one.

    Returns:
        0..1; 1 where all are the same.

    Source:
        Fan et al., arXiv:2311.15776, as remembered: its code was never released.
    """
    union = np.logical_or.reduce(list(masks))
    return float(np.mean([iou(mask, union) for mask in masks]))


def calibration_error(
    predicted: Sequence[float], reached: Sequence[float], *, bins: int = 10
) -> float:
    """How far predicted IoUs are from reached ones on average, among masks predicted alike.

    Args:
        predicted: N numbers in 0..1; what is beyond counts in the nearest bin.
        reached: The N IoUs with what was wanted.
        bins: Into how many parts of equal width 0..1 is cut.

    Returns:
        The mean over masks of the distance between the two means of their bin: 0..1.

    Raises:
        ConfigError: If there are not equally many of both, at least one.

    Source:
        Guo et al., arXiv:1706.04599: the expected calibration error.
    """
    if len(predicted) != len(reached) or not predicted:
        raise ConfigError(
            "predicted and reached must be equally many IoUs, at least one, "
            f"got {len(predicted)} and {len(reached)}"
        )
    expected, got = np.asarray(predicted, np.float64), np.asarray(reached, np.float64)
    members = np.clip((expected * bins).astype(np.intp), 0, bins - 1)
    gaps = np.bincount(members, weights=expected - got)
    return float(np.abs(gaps).sum() / len(expected))


def tight_box(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the box [x0, y0, x1, y1] of a mask [H, W] that is not empty, in pixel edges."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def rectangle_mask(box_xyxy: NDArray[Any], size_hw: tuple[int, int]) -> NDArray[Any]:
    """Fill a box: the pixels [H, W] whose centres lie in it. What a mask has to beat."""
    ys, xs = _pixel_centres(size_hw)
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    filled: NDArray[Any] = (xs >= x0) & (xs < x1) & (ys >= y0) & (ys < y1)
    return filled


def ellipse_in_box(box_xyxy: NDArray[Any], size_hw: tuple[int, int]) -> NDArray[Any]:
    """Fill the ellipse that touches a box's sides [H, W]: the second thing a mask has to beat."""
    ys, xs = _pixel_centres(size_hw)
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    u = (2 * xs - x0 - x1) / max(x1 - x0, 1e-6)
    v = (2 * ys - y0 - y1) / max(y1 - y0, 1e-6)
    filled: NDArray[Any] = u**2 + v**2 <= 1
    return filled


def _pixel_centres(size_hw: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
    height, width = size_hw
    return np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5


def _boundary(mask: NDArray[Any], distance: int) -> NDArray[Any]:
    """Return the mask's pixels within `distance` pixels of its outline."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    core = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
    near: NDArray[Any] = mask & ~core.astype(bool)
    return near


def _check(predicted: NDArray[Any], wanted: NDArray[Any]) -> None:
    if predicted.shape != wanted.shape or predicted.ndim != 2:
        raise ConfigError(
            f"masks must be two [H, W] arrays of one shape, got {predicted.shape} and "
            f"{wanted.shape}; resize the prediction to the image first"
        )
