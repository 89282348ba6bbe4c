"""Drawn regions to the objects that SAM is asked for."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_backend.convert.geometry import (
    ellipse_to_box_xyxy,
    percent_to_pixels,
    rectangle_to_box_xyxy,
)
from ml_backend.errors import BadRequestError
from ml_backend.label_config import Control, LabelConfig

__all__ = [
    "PromptedObject",
    "StoredPrompts",
    "find_size_mismatch",
    "objects_from_annotation",
    "objects_from_regions",
]

_LIMIT = 1e6  # far outside any image, and far from where squares overflow
_AS_DRAWN = "send the region as Label Studio's page does"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptedObject:
    """One object to cut out: what was drawn on it, in pixels of the image, unrounded."""

    image_name: str
    """The `<Image>` tag that it was drawn on."""
    labels: tuple[str, ...]
    """The labels of what was drawn, as its regions carry them; usually one."""
    point_coords: NDArray[np.float64]
    """[T, 2], (x, y) within 0..W - 1 and 0..H - 1; T may be 0."""
    point_labels: NDArray[np.int64]
    """[T], 1 on the object, 0 beside it."""
    box_xyxy: NDArray[np.float64] | None
    """[4], within 0..W and 0..H and with an area; None if only keypoints were drawn."""
    region_ids: tuple[str, ...]
    """The ids of the regions that say where the object is, in the order they were drawn."""
    item_index: int | None = None
    """Which image of the tag's list, for an `<Image valueList="...">`."""


class StoredPrompts(NamedTuple):
    """What a stored annotation, prediction or draft asks for."""

    objects: list[PromptedObject]
    """In the order in which they were begun."""
    left_out: list[tuple[Any, BadRequestError]]
    """The regions that are damaged, and what is wrong with each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Drawn:
    """One region, read."""

    image_name: str
    item_index: int | None
    labels: tuple[str, ...]
    labels_field: str
    region_id: str | None
    point: NDArray[np.float64] | None
    is_positive: bool
    box_xyxy: NDArray[np.float64] | None

    @property
    def family(self) -> tuple[str, int | None, tuple[str, ...]]:
        """What regions of one object have in common."""
        return self.image_name, self.item_index, self.labels


def objects_from_regions(
    regions: object,
    config: LabelConfig,
    *,
    size_hw: tuple[int, int],
    where: str = "context.result",
) -> list[PromptedObject]:
    """Read what an annotator drew with the smart tools.

    - Every rectangle is an object; so is every ellipse, by the box around it.
    - The keypoints of one label (and one image) are one object. A keypoint without `is_positive`
      is on the object: Label Studio drops the field when it reloads a draft.
    - A keypoint inside a rectangle of the same label refines that rectangle, the smallest such;
      Label Studio's page never sends the two together, other clients may.
    - Keypoints that are all negative ask for nothing and give no object.
    - Boxes are cut to the image, and points on its far border moved onto its last pixel.
    - Entries with the id of a drawn region are about that region: a `<Labels>` entry gives its
      label, what other tags say of it (text, choices) is passed over.

    Args:
        regions: `context.result` of a predict request, as it came.
        config: The project's labelling config.
        size_hw: The image's real size after EXIF rotation; `original_width` and
            `original_height` are not looked at.
        where: What the caller calls `regions`, for messages.

    Returns:
        The objects, in the order in which they were begun.

    Raises:
        BadRequestError: If a field is missing, of the wrong type or not finite, a tag or a label
            is not in the config, a region is of a kind that is no prompt, a box has no area within
            the image, or the image was shown rotated by the page.
    """
    entries = _entries(regions, where=where)
    controls = [_prompt_control(region, config) for region in entries]
    drawn_ids = {
        region.get("id")
        for region, control in zip(entries, controls, strict=True)
        if control is not None
    }
    drawn = []
    for index, (region, control) in enumerate(zip(entries, controls, strict=True)):
        place = f"{where}[{index}]"
        if control is not None:
            one = _read(region, entries, control=control, size_hw=size_hw, place=place)
            _check_labels(one, config, control=control)
            drawn.append(one)
        elif region.get("id") is None or region["id"] not in drawn_ids:
            raise _no_prompt(region, config, place=place)
    return _objects(drawn)


def objects_from_annotation(
    annotation: Mapping[str, Any],
    config: LabelConfig,
    *,
    size_hw: tuple[int, int],
    where: str = "annotation",
) -> StoredPrompts:
    """Read the rectangles, ellipses and keypoints of a stored annotation, prediction or draft.

    They become objects by the rules of `objects_from_regions`, but for keypoints that lie in no
    rectangle of their label: each that is on an object is one of its own, for which all negative
    ones of the label count. Ten stored keypoints are ten things pointed at.

    Stored regions may be older than the config, and most are not there as prompts, so what is no
    prompt is passed over: masks and other kinds, tags that are gone, images that were shown
    rotated. A label that is gone is left out. A damaged region costs no other.

    Args:
        annotation: The entry of a task's `annotations`, `predictions` or `drafts`.
        config: The project's labelling config.
        size_hw: The image's real size after EXIF rotation.
        where: What the caller calls `annotation`, for messages.

    Returns:
        The objects, none for a skipped task; and which regions miss a prompt's field, or have one
        of the wrong type or not finite, or a box without an area within the image.

    Raises:
        BadRequestError: If the annotation has no list of regions.
    """
    where = f"{where}.result"
    regions = annotation.get("result")
    if not isinstance(regions, list):
        raise _wrong(where, "a list of regions", regions)
    entries = [one if isinstance(one, dict) else {} for one in regions]
    drawn, left_out = [], []
    for index, region in enumerate(regions):
        place = f"{where}[{index}]"
        try:
            _check_entry(region, place=place)
            control = _prompt_control(region, config)
            if control is not None and not region.get("image_rotation"):
                one = _read(region, entries, control=control, size_hw=size_hw, place=place)
                known = (label for label in one.labels if _has_label(label, one, config, control))
                drawn.append(replace(one, labels=tuple(known)))
        except BadRequestError as error:
            left_out.append((region, error))
    return StoredPrompts(
        [single for one in _objects(drawn) for single in _pointed_at(one)], left_out
    )


def _pointed_at(one: PromptedObject) -> list[PromptedObject]:
    """Take keypoints without a box apart: an object for each that is on one."""
    if one.box_xyxy is not None:
        return [one]
    negative = one.point_labels == 0
    return [
        replace(one, point_coords=one.point_coords[kept], point_labels=one.point_labels[kept])
        for number in np.flatnonzero(~negative)
        for kept in [negative | (np.arange(len(negative)) == number)]
    ]


def find_size_mismatch(regions: object, *, size_hw: tuple[int, int]) -> tuple[int, int] | None:
    """Tell whether a request and the file disagree on the image's size.

    Nothing has to be done about it: percent refer to the image, so its real size is the one that
    counts. It is worth a line in the log.

    Args:
        regions: `context.result` of a predict request.
        size_hw: The image's real size after EXIF rotation.

    Returns:
        The first size (H, W) in `original_height` and `original_width` that is another one; None
        if there is none.
    """
    for region in _entries(regions, where="context.result"):
        height, width = region.get("original_height"), region.get("original_width")
        if isinstance(height, int) and isinstance(width, int) and (height, width) != size_hw:
            return height, width
    return None


def _entries(regions: object, *, where: str) -> list[dict[str, Any]]:
    if not isinstance(regions, list):
        raise _wrong(where, "a list of regions", regions)
    for index, region in enumerate(regions):
        _check_entry(region, place=f"{where}[{index}]")
    return regions


def _check_entry(region: object, *, place: str) -> None:
    if not isinstance(region, dict):
        raise _wrong(place, "an object", region)
    if not isinstance(region.get("id"), str | int | None):
        raise _wrong(f"{place}.id", "a string", region["id"])


def _prompt_control(region: dict[str, Any], config: LabelConfig) -> Control | None:
    """Find the tag that a region was prompted with; None if it is no prompt of this config."""
    to_name = region.get("to_name")
    if not isinstance(to_name, str) or config.find_image(to_name) is None:
        return None
    for control in config.prompts_for(to_name):
        if control.name == region.get("from_name") and control.result_type == region.get("type"):
            return control
    return None


def _no_prompt(region: dict[str, Any], config: LabelConfig, *, place: str) -> BadRequestError:
    """Say why `_prompt_control` found none."""
    from_name, to_name, kind = (region.get(key) for key in ("from_name", "to_name", "type"))
    control = config.find_control(from_name) if isinstance(from_name, str) else None
    if control is None:
        names = ", ".join(c.name for c in config.controls) or "none"
        return _wrong(
            f"{place}.from_name", f"a tag of the labelling config ({names})", from_name, "add it"
        )
    if kind != control.result_type:
        return _wrong(f"{place}.type", f"{control.result_type}, as its tag says", kind)
    images = [name for name in control.to_names if config.find_image(name) is not None]
    if to_name not in images:
        return _wrong(
            f"{place}.to_name", f"an image that its tag works on ({', '.join(images)})", to_name
        )
    return _wrong(
        f"{place}.type",
        "a keypoint, a rectangle or an ellipse",
        kind,
        f'draw one of those, and set smart="false" on the tag "{control.name}"',
    )


def _read(
    region: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    *,
    control: Control,
    size_hw: tuple[int, int],
    place: str,
) -> _Drawn:
    value = region.get("value")
    if not isinstance(value, dict):
        raise _wrong(f"{place}.value", "an object", value)
    item_index = region.get("item_index")
    if not isinstance(item_index, int | None):
        raise _wrong(f"{place}.item_index", "an integer", item_index)
    if region.get("image_rotation"):
        raise _wrong(
            f"{place}.image_rotation", "0", region["image_rotation"], "turn the image back"
        )
    is_positive = region.get("is_positive")
    if not isinstance(is_positive, bool | None):
        raise _wrong(f"{place}.is_positive", "true or false", is_positive)

    point = box = None
    if control.kind == "keypoint":
        point = _point(value, size_hw=size_hw, place=place)
    else:
        box = _box(value, control=control, size_hw=size_hw, place=place)
    region_id = region.get("id")
    labels_field, labels = _labels(region, entries, control=control, place=place)
    return _Drawn(
        image_name=region["to_name"],
        item_index=item_index,
        labels=labels,
        labels_field=labels_field,
        region_id=None if region_id is None else str(region_id),
        point=point,
        is_positive=is_positive is not False,
        box_xyxy=box,
    )


def _point(value: dict[str, Any], *, size_hw: tuple[int, int], place: str) -> NDArray[np.float64]:
    xy_percent = (_number(value, "x", place=place), _number(value, "y", place=place))
    height, width = size_hw
    point = percent_to_pixels(xy_percent, size_hw=size_hw)
    return np.clip(point, 0, (width - 1, height - 1))


def _box(
    value: dict[str, Any], *, control: Control, size_hw: tuple[int, int], place: str
) -> NDArray[np.float64]:
    xy_percent = (_number(value, "x", place=place), _number(value, "y", place=place))
    rotation = 0.0
    if value.get("rotation") is not None:
        rotation = _number(value, "rotation", unit="degrees", place=place)
    if control.kind == "rectangle":
        box = rectangle_to_box_xyxy(
            xy_percent=xy_percent,
            wh_percent=(
                _number(value, "width", place=place),
                _number(value, "height", place=place),
            ),
            rotation_degrees=rotation,
            size_hw=size_hw,
        )
    else:
        box = ellipse_to_box_xyxy(
            xy_percent=xy_percent,
            radii_percent=(
                _number(value, "radiusX", place=place),
                _number(value, "radiusY", place=place),
            ),
            rotation_degrees=rotation,
            size_hw=size_hw,
        )
    height, width = size_hw
    box = np.clip(box, 0, (width, height, width, height))
    if not (box[:2] < box[2:]).all():
        raise _wrong(f"{place}.value", "a box with an area within the image", value)
    return box


def _number(
    value: dict[str, Any], field: str, *, place: str, unit: str = "percent of the image"
) -> float:
    number: Any = value.get(field)
    if type(number) not in (int, float) or not abs(number) <= _LIMIT:  # not <=: NaN too
        raise _wrong(f"{place}.value.{field}", f"a number, in {unit}", number)
    return float(number)


def _labels(
    region: dict[str, Any],
    entries: Sequence[dict[str, Any]],
    *,
    control: Control,
    place: str,
) -> tuple[str, tuple[str, ...]]:
    """Read a region's labels: its tag's own, or those that a `<Labels>` tag gave it.

    Returns:
        The field they stand in, for messages, and the labels.
    """
    values = [(place, region["value"], control.value_key or "labels")]
    values.append((place, region["value"], "labels"))  # the page's copy, or a `<Labels>` tag's
    if region.get("id") is not None:
        base = place.rpartition("[")[0]
        values += [
            (f"{base}[{index}]", entry["value"], "labels")
            for index, entry in enumerate(entries)
            if entry.get("id") == region["id"]
            and entry.get("type") == "labels"
            and isinstance(entry.get("value"), dict)
        ]
    for owner, value, key in values:
        field, labels = f"{owner}.value.{key}", value.get(key)
        if not isinstance(labels, list | None) or not all(
            isinstance(label, str) for label in labels or ()
        ):
            raise _wrong(field, "a list of labels", labels)
        if labels:
            return field, tuple(labels)
    return f"{place}.value", ()


def _has_label(label: str, drawn: _Drawn, config: LabelConfig, control: Control) -> bool:
    """Say whether the label is one of the region's tag, or of a `<Labels>` tag on its image."""
    return (
        config.resolve_label(control, label) is not None
        or config.labels_tag_for(drawn.image_name, labels=(label,)) is not None
    )


def _check_labels(drawn: _Drawn, config: LabelConfig, *, control: Control) -> None:
    for label in drawn.labels:
        if not _has_label(label, drawn, config, control):
            known = dict.fromkeys(name for c in config.controls for name in c.labels)
            raise _wrong(
                drawn.labels_field,
                f"labels of the labelling config ({', '.join(known) or 'none'})",
                label,
                "add the label there, or draw with another one",
            )


def _objects(drawn: Sequence[_Drawn]) -> list[PromptedObject]:
    """Gather what was drawn on the same object."""
    boxed = [one for one in drawn if one.box_xyxy is not None]
    members: dict[object, list[_Drawn]] = {}  # by the box it lies in, or else by its family
    for one in drawn:
        key: object = one.family
        around = [one] if one.box_xyxy is not None else [b for b in boxed if _is_in(one, b)]
        if around:
            key = id(min(around, key=_area))
        members.setdefault(key, []).append(one)
    objects = (_object(group) for group in members.values())
    return [o for o in objects if o.box_xyxy is not None or o.point_labels.any()]


def _is_in(keypoint: _Drawn, boxed: _Drawn) -> bool:
    assert keypoint.point is not None
    assert boxed.box_xyxy is not None
    x, y = keypoint.point
    x_min, y_min, x_max, y_max = boxed.box_xyxy
    inside = x_min <= x <= x_max and y_min <= y <= y_max
    return bool(inside) and keypoint.family == boxed.family


def _area(boxed: _Drawn) -> float:
    assert boxed.box_xyxy is not None
    x_min, y_min, x_max, y_max = boxed.box_xyxy
    return float((x_max - x_min) * (y_max - y_min))


def _object(group: Sequence[_Drawn]) -> PromptedObject:
    keypoints = [one for one in group if one.point is not None]
    return PromptedObject(
        image_name=group[0].image_name,
        labels=group[0].labels,
        point_coords=np.array([one.point for one in keypoints], np.float64).reshape(-1, 2),
        point_labels=np.array([one.is_positive for one in keypoints], np.int64),
        box_xyxy=next((one.box_xyxy for one in group if one.box_xyxy is not None), None),
        region_ids=tuple(one.region_id for one in group if one.region_id is not None),
        item_index=group[0].item_index,
    )


def _wrong(what: str, wanted: str, got: object, advice: str = _AS_DRAWN) -> BadRequestError:
    return BadRequestError(f"{what} must be {wanted}, got {reprlib.repr(got)}; {advice}")
