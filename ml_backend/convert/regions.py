"""A mask to the regions that Label Studio draws, lets the annotator accept, and stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ml_backend.convert.png import data_url_from_mask
from ml_backend.convert.polygons import polygons_from_mask, remove_specks
from ml_backend.convert.rle import rle_from_mask
from ml_backend.label_config import Control, LabelConfig

__all__ = ["regions_from_mask"]


def regions_from_mask(
    mask: NDArray[np.bool_],
    *,
    config: LabelConfig,
    image_name: str,
    score: float,
    labels: Sequence[str] = (),
    wanted: Sequence[str] | None = None,
    tolerance_px: float = 1.0,
    min_area_px: float = 16.0,
    item_index: int | None = None,
) -> list[dict[str, Any]]:
    """Write one object's mask as the regions that the labelling config has tags for.

    A brush or bitmask region holds the mask as it is. Polygons and the rectangle leave out specks:
    a stray pixel would be a region of its own there, or would blow the rectangle up. A mask of
    several pieces is one polygon region for each; a piece's holes are reached by bridges
    (`polygons_from_mask`).

    A tag without labels of its own (`<Brush>`) gives a pair of entries with one id: the region,
    and the same under the `<Labels>` tag with the label. This is how Label Studio stores it.
    A label that the config's tag does not have is left out; the annotator sees an unlabelled
    region.

    Args:
        mask: [H, W] bool, of the image's real size after EXIF rotation.
        config: The project's labelling config.
        image_name: The `<Image>` tag's name (`to_name` of the prompts).
        score: How sure the model is, finite; the region list shows it.
        labels: The object's labels, as the prompt's region carried them.
        wanted: The kinds of region to return; see `LabelConfig.outputs_for`.
        tolerance_px: How far a polygon may stray from the mask's outline.
        min_area_px: Smaller pieces and holes are left out of polygons and rectangle, but for the
            largest piece.
        item_index: Which image of the tag's list, for an `<Image valueList="...">`.

    Returns:
        The regions, ready for JSON: brush, bitmask, polygons, rectangle, each with an id that is
        unique for real (a repeated id overwrites a region accepted before). None for an empty mask.

    Raises:
        LabelConfigError: If the config has no tag to answer into, or none of a wanted kind.
        ValueError: If the mask is not [H, W] bool.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask must be [H, W] bool, got {mask.dtype} {list(mask.shape)}")
    outputs = config.outputs_for(image_name, labels=labels, wanted=wanted)
    if not mask.any():
        return []
    shared: dict[str, Any] = {
        "to_name": image_name,
        "origin": "prediction",
        "original_width": mask.shape[1],
        "original_height": mask.shape[0],
        "image_rotation": 0,
        "score": float(score),
    }
    if item_index is not None:
        shared["item_index"] = item_index

    regions = []
    for control in outputs:
        for value in _values(
            mask, control=control, tolerance_px=tolerance_px, min_area_px=min_area_px
        ):
            regions += _entries(value, shared, control=control, config=config, labels=labels)
    return regions


def _entries(
    value: dict[str, Any],
    shared: dict[str, Any],
    *,
    control: Control,
    config: LabelConfig,
    labels: Sequence[str],
) -> list[dict[str, Any]]:
    region_id = uuid4().hex
    own = _own_labels(control, config=config, labels=labels)
    entries = [_entry(value, shared, region_id=region_id, control=control, labels=own)]
    if control.value_key is None and labels:
        tag = config.labels_tag_for(shared["to_name"], labels=labels)
        if tag is not None:
            own = _own_labels(tag, config=config, labels=labels)
            entries.append(_entry(value, shared, region_id=region_id, control=tag, labels=own))
    return entries


def _entry(
    value: dict[str, Any],
    shared: dict[str, Any],
    *,
    region_id: str,
    control: Control,
    labels: list[str],
) -> dict[str, Any]:
    labelled = {control.value_key: labels} if control.value_key and labels else {}
    return {
        "id": region_id,
        "from_name": control.name,
        "type": control.result_type,
        **shared,
        "value": {**value, **labelled},
    }


def _own_labels(control: Control, *, config: LabelConfig, labels: Sequence[str]) -> list[str]:
    resolved = (config.resolve_label(control, label) for label in labels)
    return [label for label in resolved if label is not None]


def _values(
    mask: NDArray[np.bool_], *, control: Control, tolerance_px: float, min_area_px: float
) -> list[dict[str, Any]]:
    """Write the mask as the geometry of one kind of region, in percent of the image."""
    if control.kind == "brush":
        return [{"format": "rle", "rle": rle_from_mask(mask)}]
    if control.kind == "bitmask":
        return [{"imageDataURL": data_url_from_mask(mask)}]

    height, width = mask.shape
    top, left, bottom, right = _bounds(mask)
    clean = remove_specks(mask[top:bottom, left:right], min_area_px=min_area_px)
    if control.kind == "polygon":
        corner, size_wh = np.array((left, top)), np.array((width, height))
        return [
            {"points": ((ring + corner) / size_wh * 100).tolist(), "closed": True}
            for ring in polygons_from_mask(clean, tolerance_px=tolerance_px)
        ]

    y0, x0, y1, x1 = _bounds(clean)
    return [
        {
            "x": (left + x0) / width * 100,
            "y": (top + y0) / height * 100,
            "width": (x1 - x0) / width * 100,
            "height": (y1 - y0) / height * 100,
            "rotation": 0,
        }
    ]


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Find the smallest window with all of the mask: top, left, bottom, right, half open."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
