"""Masks of everything in an image, without prompts: a grid of points, filtered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sam_ext.errors import ConfigError
from sam_ext.predictor import Embedding, ObjectPrompt, Predictor

__all__ = ["AutomaticMask", "default_grid", "generate_masks", "non_maximum_suppression"]

# Rows of the grid of points are decoded in turns, so that memory stays bounded.
_POINTS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class AutomaticMask:
    """One thing in an image."""

    mask: NDArray[np.bool_]
    """[H, W], of the original image's size."""
    iou_prediction: float
    """How well the model expects the mask to overlap the thing."""
    stability_score: float
    """How little the mask changes with the threshold, in 0..1."""
    box_xyxy: tuple[int, int, int, int]
    """The tight box in pixels; right and bottom are the first column and row outside it."""

    @property
    def area_px(self) -> int:
        """The number of the mask's pixels."""
        return int(self.mask.sum())


def default_grid(train_side: int) -> dict[str, Any]:
    """Choose arguments of `generate_masks` that suit a model trained on squares of so many pixels.

    Its own thresholds were chosen with ViT-H; `tiny` is hardly ever as sure of a mask as that.
    """
    if train_side >= 1024:
        return {}
    return {"points_per_side": 16, "pred_iou_threshold": 0.6, "stability_threshold": 0.8}


def generate_masks(
    predictor: Predictor,
    embedding: Embedding,
    *,
    points_per_side: int = 32,
    pred_iou_threshold: float = 0.88,
    stability_threshold: float = 0.95,
    stability_offset: float = 1.0,
    nms_iou: float = 0.7,
    min_area_px: int = 100,
    max_area_share: float = 0.95,
    max_masks: int | None = None,
    pause: Callable[[], None] | None = None,
) -> list[AutomaticMask]:
    """Find the things in an image by prompting with a grid of points, three masks each.

    Filters, stability, boxes and suppression work at the encoder's input size; only the masks that
    are left are brought to the image's size.

    Args:
        predictor: The model.
        embedding: What the predictor gave for the image.
        points_per_side: Points along the image's longer side; the grid's cells are about square.
        pred_iou_threshold: Masks with a predicted IoU below this are dropped.
        stability_threshold: Masks with a stability below this are dropped: the IoU of the mask
            with its logits cut at `+stability_offset` and at `-stability_offset`.
        stability_offset: See there.
        nms_iou: Of two masks whose boxes overlap by more than this IoU, the one of lower predicted
            IoU is dropped.
        min_area_px: Masks with fewer pixels of the original image are dropped.
        max_area_share: Masks that cover more of the image than this are dropped: the background.
        max_masks: At most so many, those of highest predicted IoU.
        pause: Called before each part of the grid; it may wait, while somebody more urgent works,
            or raise.

    Returns:
        The masks, largest first.

    Raises:
        ConfigError: If `points_per_side` is below 1.

    Source:
        Kirillov et al., arXiv:2304.02643, section B.

    Differs from the source:
        No crops; masks are compared at the input size, not at the image's; small components and
        holes are left in; the grid follows the image's proportions.
    """
    if points_per_side < 1:
        raise ConfigError(f"points_per_side must be at least 1, got {points_per_side}")
    candidates = _candidates(
        predictor,
        embedding,
        _grid(embedding.original_size, points_per_side),
        pred_iou_threshold=pred_iou_threshold,
        stability_threshold=stability_threshold,
        stability_offset=stability_offset,
        pause=pause,
    )
    if not candidates:
        return []
    kept = non_maximum_suppression(
        torch.tensor([candidate.box_xyxy for candidate in candidates]),
        torch.tensor([candidate.iou_prediction for candidate in candidates]),
        iou_threshold=nms_iou,
    )
    height, width = embedding.original_size
    found: list[AutomaticMask] = []
    for index in kept.tolist():
        if max_masks is not None and len(found) == max_masks:
            break
        candidate = candidates[index]
        mask = predictor.full_mask(embedding, candidate.low_res)
        area = int(mask.sum())
        if area and min_area_px <= area <= max_area_share * height * width:
            found.append(
                AutomaticMask(
                    mask=mask,
                    iou_prediction=candidate.iou_prediction,
                    stability_score=candidate.stability_score,
                    box_xyxy=_box(mask),
                )
            )
    return sorted(found, key=lambda one: one.area_px, reverse=True)


def non_maximum_suppression(boxes_xyxy: Tensor, scores: Tensor, *, iou_threshold: float) -> Tensor:
    """Keep the boxes that no better one overlaps too much.

    torchvision's operator does the same, but is missing beside a CPU-only torch.

    Args:
        boxes_xyxy: [K, 4].
        scores: [K].
        iou_threshold: Boxes that overlap a kept one by more than this IoU are dropped.

    Returns:
        Indexes of the kept boxes, best first.
    """
    boxes = boxes_xyxy.double()
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    left = scores.argsort(descending=True, stable=True)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        top_left = torch.maximum(boxes[best, :2], boxes[left, :2])
        bottom_right = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        overlap = (bottom_right - top_left).clamp(min=0).prod(dim=1)
        # Not divided: two empty boxes have no IoU and do not suppress each other.
        left = left[overlap <= iou_threshold * (areas[best] + areas[left] - overlap)]
    return torch.stack(kept) if kept else left


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    low_res: Tensor  # [h, w]
    iou_prediction: float
    stability_score: float
    box_xyxy: tuple[int, int, int, int]  # at the encoder's input size


def _grid(size_hw: tuple[int, int], points_per_side: int) -> NDArray[np.float64]:
    """Spread points (x, y) [K, 2] evenly over an image, each in the middle of its cell."""
    height, width = size_hw
    rows, columns = (max(1, round(points_per_side * side / max(size_hw))) for side in size_hw)
    x = (np.arange(columns) + 0.5) * width / columns
    y = (np.arange(rows) + 0.5) * height / rows
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


@torch.inference_mode()
def _candidates(
    predictor: Predictor,
    embedding: Embedding,
    points: NDArray[np.float64],
    *,
    pred_iou_threshold: float,
    stability_threshold: float,
    stability_offset: float,
    pause: Callable[[], None] | None,
) -> list[_Candidate]:
    prompts = [
        ObjectPrompt(point_coords=point[None], point_labels=np.ones(1, dtype=np.int64))
        for point in points
    ]
    height, width = embedding.input_size
    candidates = []
    for start in range(0, len(prompts), _POINTS_AT_ONCE):
        if pause is not None:
            pause()
        answers = predictor.decode_low_res(embedding, prompts[start : start + _POINTS_AT_ONCE])
        for low_res, iou_predictions, _ in answers:
            for logits, iou_prediction in zip(
                low_res[1:], iou_predictions[1:].tolist(), strict=True
            ):
                if iou_prediction < pred_iou_threshold:
                    continue
                at_input = F.interpolate(logits[None, None], embedding.padded_size, mode="bilinear")
                at_input = at_input[0, 0, :height, :width]
                union = int((at_input > -stability_offset).sum())
                stability = int((at_input > stability_offset).sum()) / union if union else 0.0
                mask = (at_input > 0).cpu().numpy()
                if stability >= stability_threshold and mask.any():
                    candidates.append(
                        _Candidate(
                            low_res=logits.clone(),  # a view would keep its whole batch alive
                            iou_prediction=iou_prediction,
                            stability_score=stability,
                            box_xyxy=_box(mask),
                        )
                    )
    return candidates


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Find the tight box of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
