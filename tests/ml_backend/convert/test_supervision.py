"""Labelled tasks, recorded and made up, to what one can learn from them."""

from __future__ import annotations

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle, mask2rle

from ml_backend.convert.png import data_url_from_mask
from ml_backend.convert.rle import rle_from_mask
from ml_backend.convert.supervision import choose_annotation, supervision_of
from ml_backend.label_config import parse_label_config
from tests.ml_backend.backend import payload

SIZE = (40, 50)  # H, W
LABELS = '<Label value="Cat"/><Label value="Dog"/>'
CONFIG = f"""<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image" smart="false">{LABELS}</BrushLabels>
  <BitmaskLabels name="bits" toName="image">{LABELS}</BitmaskLabels>
  <PolygonLabels name="poly" toName="image">{LABELS}</PolygonLabels>
  <Brush name="plain" toName="image"/>
  <Labels name="labels" toName="image"><Label value="Cat"/></Labels>
  <KeyPointLabels name="kp" toName="image">{LABELS}</KeyPointLabels>
  <RectangleLabels name="box" toName="image">{LABELS}</RectangleLabels>
</View>"""


def region(kind: str, value: dict, *, name: str, **fields) -> dict:
    own = {} if fields.get("label") is None else {kind: [fields.pop("label")]}
    fields.pop("label", None)
    return {
        "id": f"{name}{len(str(value))}",
        "type": kind,
        "from_name": name,
        "to_name": "image",
        "original_width": SIZE[1],
        "original_height": SIZE[0],
        "image_rotation": 0,
        "value": value | own,
    } | fields


def brush(mask, label="Cat", **fields):
    value = {"format": "rle", "rle": rle_from_mask(mask)}
    return region("brushlabels", value, name="mask", label=label, **fields)


def polygon(*corners, label="Cat", **fields):
    value = {"points": [[x / SIZE[1] * 100, y / SIZE[0] * 100] for x, y in corners], "closed": True}
    return region("polygonlabels", value, name="poly", label=label, **fields)


def box(x0, y0, x1, y1, label="Cat", **fields):
    height, width = SIZE
    value = {
        "x": x0 / width * 100,
        "y": y0 / height * 100,
        "width": (x1 - x0) / width * 100,
        "height": (y1 - y0) / height * 100,
        "rotation": 0,
    }
    return region("rectanglelabels", value, name="box", label=label, **fields)


def point(x, y, label="Cat", **fields):
    value = {"x": x / SIZE[1] * 100, "y": y / SIZE[0] * 100, "width": 0.3}
    return region("keypointlabels", value, name="kp", label=label, **fields)


def mask_of_box(x0, y0, x1, y1):
    mask = np.zeros(SIZE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def read(*regions, config=CONFIG, **fields):
    annotation = {"result": list(regions)} | fields
    return supervision_of(annotation, parse_label_config(config), image_name="image", size_hw=SIZE)


def bitmask(mask, label="Cat", **fields):
    value = {"imageDataURL": data_url_from_mask(mask)}
    return region("bitmasklabels", value, name="bits", label=label, **fields)


def test_a_bitmask_is_a_mask_unless_a_brush_says_the_same():
    one, other = mask_of_box(2, 3, 12, 20), mask_of_box(20, 3, 40, 30)
    got = read(
        bitmask(one),
        bitmask(other),
        brush(one),
        polygon((20, 3), (40, 3), (40, 30), (20, 30)),
        bitmask(one, "Dog"),
        bitmask(one[:20], "Dog"),
    )
    assert [found.label for found in got.objects] == ["Cat", "Cat", "Dog"]
    for found, mask in zip(got.objects, (one, other, one), strict=True):
        np.testing.assert_array_equal(found.mask, mask)
    assert len(got.left_out) == 1
    assert "must be of the image's size 50 x 40, got 50 x 20" in got.left_out[0]


def test_a_bitmask_whose_tag_is_gone_is_named():
    got = read(bitmask(mask_of_box(2, 3, 12, 20), from_name="gone"))
    assert not got.objects
    assert "(bitmasklabels) is of a tag that the labelling config has no more" in got.left_out[0]


def test_two_accepted_suggestions_are_two_masks():
    request = payload("30")
    (annotation,) = payload("60")
    config = parse_label_config(request["project"]["label_config"])

    got = supervision_of(annotation, config, image_name="image", size_hw=(480, 640))

    assert got.left_out == ()
    assert [one.label for one in got.objects] == ["Cat", "Dog"]
    for one, stored in zip(got.objects, annotation["result"], strict=True):
        alpha = decode_rle(stored["value"]["rle"]).reshape(480, 640, 4)[..., 3]
        np.testing.assert_array_equal(one.mask, alpha > 127)
        assert one.box_xyxy is None
        assert len(one.point_coords) == 0
        assert not one.is_ground_truth


def test_a_brush_painted_by_hand_is_what_is_painted_more_than_half():
    (annotation,) = payload("61")
    config = parse_label_config(payload("30")["project"]["label_config"])

    got = supervision_of(annotation, config, image_name="image", size_hw=(480, 640))

    painted, pointed = got.objects
    alpha = decode_rle(annotation["result"][0]["value"]["rle"]).reshape(480, 640, 4)[..., 3]
    assert len(np.unique(alpha)) > 100  # soft edges
    np.testing.assert_array_equal(painted.mask, alpha > 127)
    assert (painted.label, pointed.label) == ("Cat", "Dog")
    np.testing.assert_allclose(pointed.point_coords, [[479.8027, 240.3946]], atol=1e-3)
    assert pointed.mask is None


def test_a_polygon_drawn_by_hand_is_filled():
    (annotation,) = payload("62")
    config = parse_label_config(payload("17")["label_config"])

    got = supervision_of(annotation, config, image_name="image", size_hw=(480, 640))

    (one,) = got.objects
    x, y = np.array(annotation["result"][0]["value"]["points"]).T * [[6.4], [4.8]]
    area = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert one.mask.sum() == pytest.approx(area, rel=0.01)
    rows, columns = np.nonzero(one.mask)
    assert (columns.min(), columns.max()) == (round(x.min()), round(x.max()) - 1)
    assert (rows.min(), rows.max()) == (round(y.min()), round(y.max()) - 1)


def test_a_skipped_task_says_nothing():
    task = payload("36")
    assert choose_annotation({"annotations": [task["annotation"]]}) is None


def test_of_several_annotators_it_is_the_ground_truth_or_else_the_last():
    old = {"id": 1, "updated_at": "2026-11-20T17:00:00Z", "result": []}
    new = {"id": 2, "updated_at": "2026-11-20T18:00:00Z", "result": []}
    skipped = {"id": 3, "updated_at": "2026-11-20T19:00:00Z", "was_cancelled": True}
    assert choose_annotation({"annotations": [new, old, skipped]}) is new
    truth = old | {"ground_truth": True}
    assert choose_annotation({"annotations": [truth, new]}) is truth
    assert choose_annotation({"annotations": [truth | {"was_cancelled": True}, new]}) is new
    assert choose_annotation({"annotations": []}) is None
    assert choose_annotation({}) is None


def test_ground_truth_is_told():
    (one,) = read(box(1, 2, 11, 12), ground_truth=True).objects
    assert one.is_ground_truth


def test_an_empty_annotation_has_no_objects():
    assert read().objects == ()
    assert read().left_out == ()


def test_boxes_are_objects_of_their_own():
    first, second = read(box(1, 2, 11, 12), box(20.5, 10, 50, 40, "Dog")).objects
    np.testing.assert_allclose(first.box_xyxy, [1, 2, 11, 12])
    np.testing.assert_allclose(second.box_xyxy, [20.5, 10, 50, 40])
    assert (first.label, second.label) == ("Cat", "Dog")
    assert first.mask is None


def test_keypoints_of_one_label_are_objects_of_their_own_and_share_what_they_are_not():
    got = read(point(5, 6), point(25, 26), point(45, 6, is_positive=False), point(9, 9, "Dog"))
    cats = [one for one in got.objects if one.label == "Cat"]
    np.testing.assert_allclose(cats[0].point_coords, [[5, 6], [45, 6]])
    np.testing.assert_allclose(cats[1].point_coords, [[25, 26], [45, 6]])
    assert [one.point_labels.tolist() for one in cats] == [[1, 0], [1, 0]]
    (dog,) = [one for one in got.objects if one.label == "Dog"]
    np.testing.assert_allclose(dog.point_coords, [[9, 9]])


def test_keypoints_that_are_all_negative_are_no_object():
    assert read(point(5, 6, is_positive=False)).objects == ()


def test_a_keypoint_in_a_box_is_a_point_of_that_box():
    (one,) = read(box(1, 2, 11, 12), point(5, 6)).objects
    np.testing.assert_allclose(one.box_xyxy, [1, 2, 11, 12])
    np.testing.assert_allclose(one.point_coords, [[5, 6]])


def test_a_box_that_was_left_behind_belongs_to_its_mask():
    mask = mask_of_box(10, 10, 20, 30)
    other = mask_of_box(30, 10, 40, 30)
    first, second = read(brush(mask), brush(other), box(29, 9, 41, 32)).objects
    assert first.box_xyxy is None
    np.testing.assert_array_equal(second.mask, other)
    np.testing.assert_allclose(second.box_xyxy, [29, 9, 41, 32])


@pytest.mark.parametrize(
    "drawn",
    [
        pytest.param(box(10, 10, 20, 30, "Dog"), id="another-label"),
        pytest.param(box(18, 10, 40, 30), id="another-place"),
    ],
)
def test_a_box_beside_a_mask_is_another_object(drawn):
    masked, boxed = read(brush(mask_of_box(10, 10, 20, 30)), drawn).objects
    assert masked.box_xyxy is None
    assert boxed.mask is None


def test_each_mask_takes_one_box():
    mask = mask_of_box(10, 10, 20, 30)
    got = read(brush(mask), box(10, 10, 20, 30), box(10, 10, 20, 29)).objects
    assert [one.mask is not None for one in got] == [True, False]


def test_keypoints_that_were_left_behind_belong_to_the_smallest_mask_around_them():
    large, small = mask_of_box(0, 0, 40, 40), mask_of_box(10, 10, 20, 20)
    regions = (brush(large), brush(small, id="s"), point(15, 15), point(30, 30), point(45, 5))
    first, second, third = read(*regions).objects
    np.testing.assert_allclose(first.point_coords, [[30, 30]])
    np.testing.assert_allclose(second.point_coords, [[15, 15]])
    np.testing.assert_allclose(third.point_coords, [[45, 5]])
    assert third.mask is None


def test_a_prompt_without_a_label_may_belong_to_any_mask():
    (one,) = read(brush(mask_of_box(10, 10, 20, 30)), box(10, 10, 20, 30, label=None)).objects
    assert one.label == "Cat"
    assert one.box_xyxy is not None


def test_a_polygon_within_a_brush_is_the_same_answer():
    mask = mask_of_box(10, 10, 20, 30)
    inside = ((10, 10), (20, 10), (20, 29), (10, 29))
    (one,) = read(polygon(*inside), brush(mask)).objects
    np.testing.assert_array_equal(one.mask, mask)
    assert len(read(polygon(*inside, label="Dog"), brush(mask)).objects) == 2
    assert len(read(polygon((10, 10), (40, 10), (40, 30)), brush(mask)).objects) == 2


def test_overlapping_polygons_are_two_objects():
    assert (
        len(read(polygon((5, 5), (30, 5), (30, 30)), polygon((5, 5), (29, 5), (29, 29))).objects)
        == 2
    )


def test_a_brush_without_labels_is_labelled_by_the_entry_with_its_id():
    value = {"format": "rle", "rle": rle_from_mask(mask_of_box(10, 10, 20, 30))}
    pair = (
        region("brush", value, name="plain", id="a"),
        region("labels", {"labels": ["Cat"]}, name="labels", id="a"),
        region("brush", value, name="plain", id="b"),
    )
    assert [one.label for one in read(*pair).objects] == ["Cat", ""]


def test_a_label_that_is_gone_is_none():
    got = read(brush(mask_of_box(10, 10, 20, 30), label="Bird"), box(30, 1, 40, 9, label="Bird"))
    assert [one.label for one in got.objects] == ["", ""]
    assert got.left_out == ()


@pytest.mark.parametrize(
    ("drawn", "reason"),
    [
        pytest.param(
            box(1, 1, 9, 9, from_name="gone", id="r"),
            "region r (rectanglelabels) is of a tag that the labelling config has no more",
            id="a-tag-that-is-gone",
        ),
        pytest.param(
            box(1, 1, 9, 9, image_rotation=90, id="r"),
            "region r (rectanglelabels) was drawn on the image rotated by the page",
            id="rotated",
        ),
        pytest.param(
            brush(np.ones((50, 40), bool)[:39], id="r"),
            "region r (brushlabels): rle must hold 40 x 50 pixels of 4 bytes, got 6240 words of "
            "8 bits",
            id="a-mask-of-another-size",
        ),
        pytest.param(
            brush(np.zeros(SIZE, bool), id="r"),
            "region r (brushlabels): a mask must hold a pixel of the image, got none",
            id="an-empty-mask",
        ),
        pytest.param(
            brush(np.ones(SIZE, bool), id="r") | {"value": {"rle": [0, 1, 300]}},
            "region r (brushlabels): bytes must be in range(0, 256)",
            id="no-bytes",
        ),
        pytest.param(
            brush(np.ones(SIZE, bool), id="r") | {"value": {"rle": "abc"}},
            "region r (brushlabels): rle must be a list of bytes, got str",
            id="no-list",
        ),
        pytest.param(
            polygon((1, 1), (2, 2), id="r"),
            "region r (polygonlabels): points must be a list of three pairs of numbers or more",
            id="a-line",
        ),
        pytest.param(
            polygon((1, 1), (2, 2), (float("nan"), 3), id="r"),
            "region r (polygonlabels): points must be percent of the image",
            id="not-finite",
        ),
        pytest.param(
            "region", "a region must be an object with a value, got something else", id="text"
        ),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason_and_costs_no_other(drawn, reason):
    sound = box(20, 20, 30, 30)
    got = read(drawn, sound)
    assert got.left_out == (reason,)
    (one,) = got.objects
    np.testing.assert_allclose(one.box_xyxy, [20, 20, 30, 30])


def test_a_box_without_an_area_is_left_out():
    got = read(box(5, 5, 5, 9, id="r"), box(20, 20, 30, 30))
    assert len(got.objects) == 1
    assert got.left_out[0].startswith("region r (rectanglelabels): annotation.result[0].value must")


def test_a_damaged_labels_entry_costs_the_prompts_alone():
    regions = (
        box(1, 1, 9, 9, label=None, id="a"),
        region("labels", {"labels": "Cat"}, name="labels", id="a"),
        brush(mask_of_box(10, 10, 20, 30)),
    )
    got = read(*regions)
    assert [one.mask is not None for one in got.objects] == [True]
    assert len(got.left_out) == 1


def test_only_the_image_that_is_asked_for_counts():
    config = CONFIG.replace("$image", "$one").replace(
        "<Image", '<Image name="other" value="$two"/><Image', 1
    )
    there = box(1, 1, 9, 9, to_name="other")
    assert read(there, box(20, 20, 30, 30), config=config).objects[0].box_xyxy[0] == 20
    of_list = box(1, 1, 9, 9, item_index=1)
    assert read(of_list).objects == ()
    annotation = {"result": [of_list, box(20, 20, 30, 30, item_index=0)]}
    (one,) = supervision_of(
        annotation,
        parse_label_config(CONFIG),
        image_name="image",
        size_hw=SIZE,
        item_index=1,
    ).objects
    assert one.box_xyxy[0] == pytest.approx(1)


def test_the_sdks_masks_are_read():
    mask = mask_of_box(3, 5, 41, 17)
    value = {"format": "rle", "rle": mask2rle(mask.astype(np.uint8) * 255), "brushlabels": ["Cat"]}
    (one,) = read(region("brushlabels", value, name="mask")).objects
    np.testing.assert_array_equal(one.mask, mask)
