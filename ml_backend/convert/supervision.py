"""What a labelled task says about its objects: boxes, points and masks to learn and judge by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_backend.convert.png import mask_from_data_url
from ml_backend.convert.polygons import mask_from_polygon
from ml_backend.convert.prompts import PromptedObject, objects_from_annotation
from ml_backend.convert.rle import mask_from_rle
from ml_backend.label_config import Control, LabelConfig

__all__ = ["SupervisedObject", "Supervision", "choose_annotation", "supervision_of"]

# A box around a mask that was left behind as its prompt, or that was returned beside it.
_SAME_BOX = 0.5
# A mask that lies so much within a brush of its label is another form of the same answer; and so is
# one that lies so much within a bitmask.
_SAME_MASK = 0.9
_LIMIT_PERCENT = 1e6
_DRAWN_TYPES = {
    kind + ending
    for kind in ("brush", "bitmask", "polygon", "rectangle", "ellipse", "keypoint")
    for ending in ("", "labels")
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SupervisedObject:
    """One labelled object; coordinates are (x, y) in pixels of the image, unrounded.

    It has a box, a mask, or a point on it.
    """

    label: str
    """Its label, the first of several; empty without one that the config still has."""
    box_xyxy: NDArray[np.float64] | None
    """[4], within 0..W and 0..H and with an area; None if nobody drew one."""
    point_coords: NDArray[np.float64]
    """[T, 2], within 0..W - 1 and 0..H - 1; T may be 0."""
    point_labels: NDArray[np.int64]
    """[T], 1 on the object, 0 beside it."""
    mask: NDArray[np.bool_] | None
    """[H, W]; None if nobody painted or outlined it."""
    is_ground_truth: bool
    """Whether somebody marked the annotation as the one that others are measured by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Supervision:
    """What is known of one image."""

    objects: tuple[SupervisedObject, ...]
    left_out: tuple[str, ...]
    """Regions that could not be used, a sentence each."""


def choose_annotation(task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Choose which of a task's annotations counts.

    A skipped one (`was_cancelled`) never does. Of the others it is one that is marked as ground
    truth, if there is one; of several, by several annotators, the one that was changed last. They
    are not mixed: two drawings of one object would be two objects.

    Args:
        task: A task with `annotations`, as Label Studio's API has it.

    Returns:
        The annotation; None if nobody annotated the task.
    """
    annotations = task.get("annotations")
    candidates = [
        annotation
        for annotation in (annotations if isinstance(annotations, list) else [])
        if isinstance(annotation, dict) and not annotation.get("was_cancelled")
    ]
    return max(
        candidates,
        key=lambda one: (bool(one.get("ground_truth")), str(one.get("updated_at") or "")),
        default=None,
    )


def supervision_of(
    annotation: Mapping[str, Any],
    config: LabelConfig,
    *,
    image_name: str,
    size_hw: tuple[int, int],
    item_index: int | None = None,
) -> Supervision:
    """Read what a stored annotation says about one image.

    - A brush or bitmask region is a mask: what is painted more than half. A polygon is one, filled.
    - A rectangle or an ellipse is a box. A keypoint is an object of its own: a stored annotation
      with ten keypoints of one label has ten things pointed at. Negative keypoints hold for all
      objects of their label that were only pointed at.
    - Prompts that were left in the annotation belong to the mask that they were answered with: a
      box to the mask of its label that its own box fits, a keypoint to the mask or the box of its
      label that it lies in, the smallest such.
    - A bitmask or a polygon within a mask of another form and the same label is the same answer,
      and left out.
    - Regions whose tag is gone from the config are left out; a label that is gone is no label.
    - Regions that were drawn while the page showed the image rotated are left out, and so are those
      that are damaged, are of another size than the image, or have no area.

    Args:
        annotation: What `choose_annotation` gave.
        config: The project's labelling config.
        image_name: The `<Image>` tag.
        size_hw: The image's real size after EXIF rotation.
        item_index: Which image of the tag's list, for an `<Image valueList="...">`.

    Returns:
        The objects, those with masks first.
    """
    left_out: list[str] = []
    is_ground_truth = bool(annotation.get("ground_truth"))
    regions = _regions_of(annotation, config, image_name, item_index, left_out)
    masked = _masked_objects(regions, config, size_hw, is_ground_truth, left_out)
    prompted = _prompted_objects(regions, config, size_hw, left_out)
    boxed = [
        SupervisedObject(
            label=_label(one.labels),
            box_xyxy=one.box_xyxy,
            point_coords=one.point_coords,
            point_labels=one.point_labels,
            mask=None,
            is_ground_truth=is_ground_truth,
        )
        for one in prompted
        if one.box_xyxy is not None
    ]
    objects = _with_boxes(masked, boxed)
    for one in prompted:
        if one.box_xyxy is None:
            objects = _with_pointed(objects, one, is_ground_truth)
    return Supervision(objects=tuple(objects), left_out=tuple(left_out))


def _regions_of(
    annotation: Mapping[str, Any],
    config: LabelConfig,
    image_name: str,
    item_index: int | None,
    left_out: list[str],
) -> list[dict[str, Any]]:
    """Take the regions of the image that can be looked at."""
    result = annotation.get("result")
    regions = []
    for region in result if isinstance(result, list) else []:
        if not isinstance(region, dict) or not isinstance(region.get("value"), dict):
            left_out.append("a region must be an object with a value, got something else")
        elif region.get("to_name") != image_name or region.get("item_index") != item_index:
            continue
        elif region.get("image_rotation"):
            left_out.append(f"{_name(region)} was drawn on the image rotated by the page")
        elif _control(region, config) is None and region.get("type") in _DRAWN_TYPES:
            left_out.append(f"{_name(region)} is of a tag that the labelling config has no more")
        else:
            regions.append(region)
    return regions


def _masked_objects(
    regions: Sequence[dict[str, Any]],
    config: LabelConfig,
    size_hw: tuple[int, int],
    is_ground_truth: bool,
    left_out: list[str],
) -> list[SupervisedObject]:
    objects: list[SupervisedObject] = []
    before: list[SupervisedObject] = []
    for kind in ("brush", "bitmask", "polygon"):
        for region in regions:
            control = _control(region, config)
            if control is None or control.kind != kind:
                continue
            try:
                mask = _mask(region["value"], kind=kind, size_hw=size_hw)
            except (ValueError, TypeError) as error:
                left_out.append(f"{_name(region)}: {error}")
                continue
            label = _label(_labels_of(region, regions, config, control))
            is_copy = any(
                other.mask is not None
                and other.label == label
                and (mask & other.mask).sum() >= _SAME_MASK * mask.sum()
                for other in before
            )
            if not is_copy:
                objects.append(
                    SupervisedObject(
                        label=label,
                        box_xyxy=None,
                        point_coords=np.zeros((0, 2)),
                        point_labels=np.zeros(0, np.int64),
                        mask=mask,
                        is_ground_truth=is_ground_truth,
                    )
                )
        before = list(objects)  # of other forms
    return objects


def _mask(value: Mapping[str, Any], *, kind: str, size_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """Read a region's mask.

    Raises:
        ValueError: If it is damaged or empty.
        TypeError: If what should be numbers is something else.
    """
    if kind == "brush":
        rle = value.get("rle")
        if not isinstance(rle, list):
            raise ValueError(f"rle must be a list of bytes, got {type(rle).__name__}")
        mask = mask_from_rle(rle, size_hw=size_hw)
    elif kind == "bitmask":
        mask = mask_from_data_url(value.get("imageDataURL"), size_hw=size_hw)
    else:
        points = value.get("points")
        ring = np.array(points if isinstance(points, list) else [], np.float64)
        if ring.ndim != 2 or ring.shape[1:] != (2,) or len(ring) < 3:
            raise ValueError("points must be a list of three pairs of numbers or more")
        if not np.isfinite(ring).all() or np.abs(ring).max() > _LIMIT_PERCENT:
            raise ValueError("points must be percent of the image")
        height, width = size_hw
        mask = mask_from_polygon(ring * (width, height) / 100, size_hw=size_hw)
    if not mask.any():
        raise ValueError("a mask must hold a pixel of the image, got none")
    return mask


def _prompted_objects(
    regions: Sequence[dict[str, Any]],
    config: LabelConfig,
    size_hw: tuple[int, int],
    left_out: list[str],
) -> list[PromptedObject]:
    """Read boxes and keypoints; a damaged one costs no other."""
    stored = objects_from_annotation({"result": regions}, config, size_hw=size_hw)
    left_out += [f"{_name(region)}: {error}" for region, error in stored.left_out]
    return stored.objects


def _with_boxes(
    masked: Sequence[SupervisedObject], boxed: Sequence[SupervisedObject]
) -> list[SupervisedObject]:
    """Give the masks the boxes that are theirs; the others stay objects of their own."""
    objects, own = list(masked), []
    for one in boxed:
        assert one.box_xyxy is not None
        fits = [
            (_box_iou(one.box_xyxy, _box_of(other.mask)), index)
            for index, other in enumerate(objects)
            if other.mask is not None and other.box_xyxy is None and _alike(other.label, one.label)
        ]
        fit, index = max(fits, default=(0.0, -1))
        if fit >= _SAME_BOX:
            objects[index] = replace(
                objects[index],
                label=objects[index].label or one.label,
                box_xyxy=one.box_xyxy,
                point_coords=one.point_coords,
                point_labels=one.point_labels,
            )
        else:
            own.append(one)
    return objects + own


def _with_pointed(
    objects: list[SupervisedObject], pointed: PromptedObject, is_ground_truth: bool
) -> list[SupervisedObject]:
    """Put a keypoint on something where it belongs, or make an object of it."""
    label, is_on_it = _label(pointed.labels), pointed.point_labels == 1
    [point] = pointed.point_coords[is_on_it]
    negative = pointed.point_coords[~is_on_it]
    around = [
        index
        for index, other in enumerate(objects)
        if _alike(other.label, label) and _holds(other, point)
    ]
    objects = list(objects)
    if around:
        index = min(around, key=lambda index: _extent(objects[index]))
        objects[index] = _with_point(objects[index], point)
        return objects
    alone = SupervisedObject(
        label=label,
        box_xyxy=None,
        point_coords=np.vstack((point[None], negative)),
        point_labels=np.array([1] + [0] * len(negative), np.int64),
        mask=None,
        is_ground_truth=is_ground_truth,
    )
    return [*objects, alone]


def _with_point(one: SupervisedObject, point: NDArray[np.float64]) -> SupervisedObject:
    return replace(
        one,
        point_coords=np.vstack((one.point_coords, point[None])),
        point_labels=np.append(one.point_labels, 1),
    )


def _holds(one: SupervisedObject, point: NDArray[np.float64]) -> bool:
    x, y = point
    if one.mask is not None:
        return bool(one.mask[math.floor(y), math.floor(x)])
    if one.box_xyxy is None:
        return False
    x0, y0, x1, y1 = one.box_xyxy
    return bool(x0 <= x <= x1 and y0 <= y <= y1)


def _extent(one: SupervisedObject) -> float:
    if one.mask is not None:
        return float(one.mask.sum())
    assert one.box_xyxy is not None
    return float(np.prod(one.box_xyxy[2:] - one.box_xyxy[:2]))


def _box_of(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), np.float64)


def _box_iou(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.clip(sides, 0, None)))
    both = float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]))
    return shared / (both - shared)


def _control(region: Mapping[str, Any], config: LabelConfig) -> Control | None:
    """Find the tag that drew a region; None if the config has it no more."""
    name = region.get("from_name")
    control = config.find_control(name) if isinstance(name, str) else None
    is_same = (
        control is not None
        and control.result_type == region.get("type")
        and region.get("to_name") in control.to_names
    )
    return control if is_same else None


def _labels_of(
    region: Mapping[str, Any],
    regions: Sequence[Mapping[str, Any]],
    config: LabelConfig,
    control: Control,
) -> list[str]:
    """The labels of a mask: its tag's own, or those that a `<Labels>` tag gave it."""
    values = [region["value"].get(control.value_key or "labels"), region["value"].get("labels")]
    values += [
        other["value"].get("labels")
        for other in regions
        if other.get("id") == region.get("id") is not None and other.get("type") == "labels"
    ]
    labels = next((value for value in values if isinstance(value, list) and value), [])
    image_name = str(region["to_name"])
    return [
        label
        for label in labels
        if isinstance(label, str)
        and (
            config.resolve_label(control, label) is not None
            or config.labels_tag_for(image_name, labels=(label,)) is not None
        )
    ]


def _label(labels: Sequence[str]) -> str:
    return labels[0] if labels else ""


def _alike(label: str, other: str) -> bool:
    """Whether two regions may be of one object: a prompt may have lost its label."""
    return label == other or not label or not other


def _name(region: Mapping[str, Any]) -> str:
    return f"region {str(region.get('id'))[:40]} ({str(region.get('type'))[:40]})"
