"""Regions to prompted objects: recorded requests first, then the odd cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ml_backend.convert.prompts import (
    find_size_mismatch,
    objects_from_annotation,
    objects_from_regions,
)
from ml_backend.errors import BadRequestError
from ml_backend.label_config import parse_label_config

DATA = Path(__file__).parents[2] / "data"
SIZE_HW = (200, 400)
LABELS = '<Label value="Cat"/><Label value="Dog"/>'
CONFIG = parse_label_config(
    '<View><Image name="image" value="$image"/><Image name="pages" valueList="$pages"/>'
    f'<BrushLabels name="mask" toName="image">{LABELS}</BrushLabels>'
    f'<KeyPointLabels name="kp" toName="image,pages">{LABELS}</KeyPointLabels>'
    f'<RectangleLabels name="box" toName="image,text">{LABELS}</RectangleLabels>'
    f'<EllipseLabels name="oval" toName="image">{LABELS}</EllipseLabels></View>'
)
WITH_LABELS_TAG = parse_label_config(
    '<View><Image name="image" value="$image"/><KeyPoint name="kp" toName="image"/>'
    f'<Labels name="label" toName="image">{LABELS}</Labels></View>'
)


def keypoint(x=50, y=50, *, label="Cat", region_id="k", **fields):
    value = {"x": x, "y": y, "width": 0.26, "labels": [label], "keypointlabels": [label]}
    return {
        "id": region_id,
        "from_name": "kp",
        "to_name": "image",
        "type": "keypointlabels",
        "value": value,
    } | fields


def rectangle(x=25, y=25, width=50, height=50, *, label="Cat", region_id="r", **fields):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}
    return {
        "id": region_id,
        "from_name": "box",
        "to_name": "image",
        "type": "rectanglelabels",
        "value": value | {"rectanglelabels": [label]},
    } | fields


def changed(region, **value):
    return region | {"value": {**region["value"], **value}}


def plain(objects):
    """The objects as plain values, to be compared whole; a millionth of a pixel is noise."""
    return [
        {
            "image": (one.image_name, one.item_index),
            "labels": one.labels,
            "points": [
                (*xy, label)
                for xy, label in zip(
                    one.point_coords.round(6).tolist(), one.point_labels.tolist(), strict=True
                )
            ],
            "box": None if one.box_xyxy is None else one.box_xyxy.round(6).tolist(),
            "ids": one.region_ids,
        }
        for one in objects
    ]


def object_of(*, labels=("Cat",), points=(), box=None, ids=(), image=("image", None)):
    return {"image": image, "labels": labels, "points": [*points], "box": box, "ids": ids}


def read(*regions, config=CONFIG):
    return plain(objects_from_regions([*regions], config, size_hw=SIZE_HW))


def recorded(name, *, size_hw):
    payload = json.loads((DATA / name).read_text())
    config = parse_label_config(payload["label_config"])
    regions = payload["params"]["context"]["result"]
    return regions, plain(objects_from_regions(regions, config, size_hw=size_hw))


@pytest.mark.parametrize(
    ("name", "size_hw", "expected"),
    [
        pytest.param(
            "10_predict_interactive_keypoint_positive.json",
            (480, 640),
            [object_of(points=[(191.763255, 215.930949, 1)], ids=("dQN8c5ic6o",))],
            id="keypoint",
        ),
        pytest.param(
            "11_predict_interactive_keypoints_positive_and_negative.json",
            (480, 640),
            [
                object_of(
                    points=[
                        (191.763255, 215.930949, 1),
                        (479.802713, 240.394575, 0),
                    ],
                    ids=("dQN8c5ic6o", "kh15Wqdf76"),
                )
            ],
            id="positive and negative",
        ),
        pytest.param(
            "12_predict_interactive_rectangle.json",
            (480, 640),
            [
                object_of(
                    labels=("Dog",),
                    box=[384.31566, 144.118372, 563.452528, 360.345253],
                    ids=("DihChWABU4",),
                )
            ],
            id="rectangle",
        ),
        pytest.param(
            "13_predict_interactive_three_rectangles.json",
            (480, 640),
            [
                object_of(
                    box=[393.026316, 148.815789, 550.921053, 349.342105],
                    ids=("_BjM3VHG8-",),
                ),
                object_of(
                    box=[77.236842, 58.026316, 320.394737, 240.394737],
                    ids=("gH_bmgIozQ",),
                ),
                object_of(
                    box=[89.078947, 331.184211, 198.815789, 421.973684],
                    ids=("nKy2A9FVpA",),
                ),
            ],
            id="three rectangles are three objects",
        ),
        pytest.param(
            "14_predict_interactive_empty_context_after_submit.json", (480, 640), [], id="empty"
        ),
        pytest.param(
            "15_predict_interactive_keypoint_without_is_positive_after_reload.json",
            (480, 640),
            [
                object_of(
                    points=[
                        (198.865598, 217.509248, 1),
                        (138.026316, 285.394737, 0),
                    ],
                    ids=("S8ikp1JzQz", "_JGxlWrEmW"),
                )
            ],
            id="is_positive and labels missing",
        ),
        pytest.param(
            "16_predict_interactive_exif_rotated_image.json",
            (640, 480),
            [object_of(points=[(144.135977, 288.271955, 1)], ids=("pn4MzkX6Sd",))],
            id="EXIF-rotated",
        ),
    ],
)
def test_reads_recorded_requests(name, size_hw, expected):
    _, got = recorded(name, size_hw=size_hw)

    assert got == expected


def test_percent_refer_to_the_file_whatever_size_the_request_says():
    regions, got = recorded("16_predict_interactive_exif_rotated_image.json", size_hw=(100, 1000))

    assert got == [object_of(points=[(300.283286, 45.042493, 1)], ids=("pn4MzkX6Sd",))]
    assert find_size_mismatch(regions, size_hw=(100, 1000)) == (640, 480)
    assert find_size_mismatch(regions, size_hw=(640, 480)) is None


@pytest.mark.parametrize("sizes", [{}, {"original_height": None, "original_width": "7"}])
def test_a_request_that_says_no_size_mismatches_nothing(sizes):
    assert find_size_mismatch([keypoint(**sizes)], size_hw=SIZE_HW) is None


def test_keypoints_of_another_label_or_image_are_another_object():
    got = read(
        keypoint(10, 10, region_id="a"),
        keypoint(20, 20, label="Dog", region_id="b"),
        keypoint(30, 30, region_id="c", to_name="pages", item_index=1),
        keypoint(40, 40, region_id="d", to_name="pages", item_index=0),
        keypoint(50, 50, region_id="e"),
        keypoint(60, 60, region_id="f", to_name="pages"),
    )

    assert got == [
        object_of(points=[(40, 20, 1), (200, 100, 1)], ids=("a", "e")),
        object_of(labels=("Dog",), points=[(80, 40, 1)], ids=("b",)),
        object_of(points=[(120, 60, 1)], ids=("c",), image=("pages", 1)),
        object_of(points=[(160, 80, 1)], ids=("d",), image=("pages", 0)),
        object_of(points=[(240, 120, 1)], ids=("f",), image=("pages", None)),
    ]


def test_a_keypoint_refines_the_smallest_rectangle_of_its_label_around_it():
    got = read(
        keypoint(50, 50, region_id="in both", is_positive=False),
        rectangle(20, 20, 60, 60, region_id="large"),
        rectangle(40, 40, 20, 20, region_id="small"),
        rectangle(45, 45, 10, 10, label="Dog", region_id="dog"),
        keypoint(70, 70, region_id="in large"),
        keypoint(80, 80, region_id="on its corner"),
        keypoint(90, 90, region_id="outside"),
    )

    assert got == [
        object_of(points=[(200, 100, 0)], box=[160, 80, 240, 120], ids=("in both", "small")),
        object_of(
            points=[(280, 140, 1), (320, 160, 1)],
            box=[80, 40, 320, 160],
            ids=("large", "in large", "on its corner"),
        ),
        object_of(labels=("Dog",), box=[180, 90, 220, 110], ids=("dog",)),
        object_of(points=[(360, 180, 1)], ids=("outside",)),
    ]


def test_nothing_but_negative_keypoints_asks_for_nothing():
    assert read(keypoint(is_positive=False), keypoint(10, 10, is_positive=False)) == []


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        pytest.param(0, 0, (0, 0, 1), id="top left"),
        pytest.param(100, 100, (399, 199, 1), id="far border: the last pixel"),
        pytest.param(-3, 130, (0, 199, 1), id="outside"),
        pytest.param(33.3, 12.25, (133.2, 24.5, 1), id="not rounded"),
    ],
)
def test_keypoints_are_moved_into_the_image(x, y, expected):
    assert [got["points"] for got in read(keypoint(x, y))] == [[expected]]


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        pytest.param(rectangle(90, -10, 30, 50), [360, 0, 400, 80], id="cut to the image"),
        pytest.param(rectangle(75, 75, -50, -50), [100, 50, 300, 150], id="drawn backwards"),
        pytest.param(
            changed(rectangle(50, 50, 10, 30), rotation=90), [140, 100, 200, 140], id="rotated"
        ),
        pytest.param(
            changed(rectangle(), rotation=None), [100, 50, 300, 150], id="rotation is null"
        ),
        pytest.param(
            rectangle(
                from_name="oval",
                type="ellipselabels",
                value={"x": 50, "y": 50, "radiusX": 5, "radiusY": 30, "rotation": 90},
            ),
            [140, 80, 260, 120],
            id="ellipse",
        ),
    ],
)
def test_boxes_stand_upright_around_what_was_drawn(region, expected):
    assert [got["box"] for got in read(region)] == [expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param({"keypointlabels": ["Dog"], "labels": ["Cat"]}, ("Dog",), id="the tag's own"),
        pytest.param({"keypointlabels": [], "labels": ["Cat"]}, ("Cat",), id="the page's copy"),
        pytest.param({"keypointlabels": None, "labels": None}, (), id="none"),
        pytest.param({"keypointlabels": ["Cat", "Dog"]}, ("Cat", "Dog"), id="two"),
    ],
)
def test_reads_labels(value, expected):
    assert [got["labels"] for got in read(changed(keypoint(), **value))] == [expected]


@pytest.mark.parametrize(
    ("own", "entry", "expected"),
    [
        pytest.param({}, {}, ("Dog",), id="from the entry"),
        pytest.param({"labels": ["Cat"]}, {}, ("Cat",), id="the page's copy first"),
        pytest.param({}, {"id": "other", "type": "labels"}, (), id="of another region"),
        pytest.param({}, {"value": 3}, (), id="entry without value"),
    ],
)
def test_a_labels_tag_labels_the_region_of_its_id(own, entry, expected):
    region = keypoint(type="keypoint", value={"x": 50, "y": 50, "width": 1, **own})
    labels = keypoint(from_name="label", type="labels", value={"labels": ["Dog"]}) | entry
    other = keypoint(10, 10, region_id="other", type="keypoint", value={"x": 10, "y": 10})

    got = read(labels, region, other, config=WITH_LABELS_TAG)

    assert [one["labels"] for one in got if "k" in one["ids"]] == [expected]


def test_what_other_tags_say_of_a_drawn_region_is_passed_over():
    note = {"id": "k", "from_name": "note", "to_name": "image", "type": "textarea", "value": {}}

    assert read(note, keypoint()) == [object_of(points=[(200, 100, 1)], ids=("k",))]


def test_a_region_needs_no_id():
    without_id = {key: value for key, value in keypoint().items() if key != "id"}

    assert read(without_id, keypoint(region_id=7)) == [
        object_of(points=[(200, 100, 1)] * 2, ids=("7",))
    ]


AS_DRAWN = "send the region as Label Studio's page does"


@pytest.mark.parametrize(
    ("region", "message"),
    [
        pytest.param(None, f" must be an object, got None; {AS_DRAWN}", id="no object"),
        pytest.param(
            keypoint(region_id=["k"]), f".id must be a string, got ['k']; {AS_DRAWN}", id="id"
        ),
        pytest.param(
            keypoint(from_name="gone", region_id=None),
            ".from_name must be a tag of the labelling config (mask, kp, box, oval), got 'gone'; "
            "add it",
            id="unknown tag",
        ),
        pytest.param(
            keypoint(from_name=["kp"]),
            ".from_name must be a tag of the labelling config (mask, kp, box, oval), got ['kp']; "
            "add it",
            id="tag of the wrong type",
        ),
        pytest.param(
            keypoint(type="rectanglelabels"),
            ".type must be keypointlabels, as its tag says, got 'rectanglelabels'; " + AS_DRAWN,
            id="type of another tag",
        ),
        pytest.param(
            rectangle(to_name="text"),
            f".to_name must be an image that its tag works on (image), got 'text'; {AS_DRAWN}",
            id="not on an image",
        ),
        pytest.param(
            rectangle(to_name="pages"),
            f".to_name must be an image that its tag works on (image), got 'pages'; {AS_DRAWN}",
            id="on another image",
        ),
        pytest.param(
            keypoint(from_name="mask", type="brushlabels"),
            ".type must be a keypoint, a rectangle or an ellipse, got 'brushlabels'; "
            'draw one of those, and set smart="false" on the tag "mask"',
            id="a smart brush",
        ),
        pytest.param(
            keypoint(value=[1]), f".value must be an object, got [1]; {AS_DRAWN}", id="value"
        ),
        pytest.param(
            keypoint(item_index="0"),
            f".item_index must be an integer, got '0'; {AS_DRAWN}",
            id="item_index",
        ),
        pytest.param(
            keypoint(image_rotation=90),
            ".image_rotation must be 0, got 90; turn the image back",
            id="rotated image",
        ),
        pytest.param(
            keypoint(is_positive="false"),
            f".is_positive must be true or false, got 'false'; {AS_DRAWN}",
            id="is_positive",
        ),
        pytest.param(
            changed(keypoint(), x=float("nan")),
            f".value.x must be a number, in percent of the image, got nan; {AS_DRAWN}",
            id="NaN",
        ),
        pytest.param(
            changed(keypoint(), y="50"),
            f".value.y must be a number, in percent of the image, got '50'; {AS_DRAWN}",
            id="text",
        ),
        pytest.param(
            changed(keypoint(), y=True),
            f".value.y must be a number, in percent of the image, got True; {AS_DRAWN}",
            id="bool",
        ),
        pytest.param(
            changed(rectangle(), width=10**400),
            ".value.width must be a number, in percent of the image, "
            f"got 100000000000000000...0000000000000000000; {AS_DRAWN}",
            id="too large for a float",
        ),
        pytest.param(
            changed(rectangle(), rotation=float("inf")),
            f".value.rotation must be a number, in degrees, got inf; {AS_DRAWN}",
            id="infinite",
        ),
        pytest.param(
            rectangle(value={"x": 1, "y": 1, "width": 2}),
            f".value.height must be a number, in percent of the image, got None; {AS_DRAWN}",
            id="missing",
        ),
        pytest.param(
            rectangle(value={"x": 120, "y": 1, "width": 2, "height": 3}),
            ".value must be a box with an area within the image, "
            f"got {{'height': 3, 'width': 2, 'x': 120, 'y': 1}}; {AS_DRAWN}",
            id="box beside the image",
        ),
        pytest.param(
            rectangle(value={"x": 10, "y": 1, "width": 2, "height": 0}),
            ".value must be a box with an area within the image, "
            f"got {{'height': 0, 'width': 2, 'x': 10, 'y': 1}}; {AS_DRAWN}",
            id="flat box",
        ),
        pytest.param(
            changed(keypoint(), keypointlabels="Cat"),
            f".value.keypointlabels must be a list of labels, got 'Cat'; {AS_DRAWN}",
            id="labels no list",
        ),
        pytest.param(
            changed(keypoint(), keypointlabels=[3]),
            f".value.keypointlabels must be a list of labels, got [3]; {AS_DRAWN}",
            id="labels no texts",
        ),
        pytest.param(
            keypoint(label="Bird"),
            ".value.keypointlabels must be labels of the labelling config (Cat, Dog), got 'Bird'; "
            "add the label there, or draw with another one",
            id="unknown label",
        ),
    ],
)
def test_names_the_field_that_is_wrong(region, message):
    with pytest.raises(BadRequestError) as error:
        read(keypoint(region_id="before"), region)
    assert str(error.value) == f"context.result[1]{message}"


def test_two_regions_without_an_id_are_two_regions():
    with pytest.raises(BadRequestError, match=r"^context.result\[1\].from_name must be a tag"):
        read(keypoint(region_id=None), keypoint(region_id=None, from_name="gone"))


def test_names_the_entry_of_a_labels_tag_that_is_wrong():
    labels = keypoint(from_name="label", type="labels", value={"labels": ["Bird"]})
    region = keypoint(type="keypoint", value={"x": 50, "y": 50, "width": 1})

    with pytest.raises(BadRequestError) as error:
        read(region, labels, config=WITH_LABELS_TAG)
    assert str(error.value) == (
        "context.result[1].value.labels must be labels of the labelling config (Cat, Dog), "
        "got 'Bird'; add the label there, or draw with another one"
    )


@pytest.mark.parametrize("regions", [None, {}, "regions"])
def test_refuses_a_context_without_a_list(regions):
    with pytest.raises(BadRequestError) as error:
        objects_from_regions(regions, CONFIG, size_hw=SIZE_HW)
    assert str(error.value) == (
        f"context.result must be a list of regions, got {regions!r}; {AS_DRAWN}"
    )


def test_a_stored_annotation_gives_its_prompts_and_nothing_else():
    stored = json.loads(
        (DATA / "61_stored_annotation_hand_brush_plus_leftover_prompt.json").read_text()
    )[0]
    payload = json.loads((DATA / "10_predict_interactive_keypoint_positive.json").read_text())

    got = objects_from_annotation(
        stored, parse_label_config(payload["label_config"]), size_hw=(480, 640)
    )

    assert not got.left_out
    assert plain(got.objects) == [
        object_of(labels=("Dog",), points=[(479.802713, 240.394575, 1)], ids=("tSilWnSoYy",))
    ]


def test_a_stored_annotation_may_be_older_than_the_config():
    annotation = {
        "result": [
            rectangle(label="Bird", region_id="label gone"),
            rectangle(from_name="gone", region_id="tag gone"),
            rectangle(region_id="shown rotated", image_rotation=90),
            keypoint(from_name="mask", type="brushlabels", region_id="a mask"),
            {"from_id": "a", "to_id": "b", "type": "relation"},
            keypoint(90, 90, region_id="fine"),
        ]
    }

    got = objects_from_annotation(annotation, CONFIG, size_hw=SIZE_HW)

    assert plain(got.objects) == [
        object_of(labels=(), box=[100, 50, 300, 150], ids=("label gone",)),
        object_of(points=[(360, 180, 1)], ids=("fine",)),
    ]
    assert not got.left_out


def test_each_stored_keypoint_is_a_thing_of_its_own_unless_it_lies_in_a_box():
    annotation = {
        "result": [
            keypoint(90, 90, region_id="one"),
            keypoint(10, 90, region_id="another"),
            keypoint(80, 90, region_id="beside", is_positive=False),
            rectangle(region_id="box"),
            keypoint(50, 50, region_id="in the box"),
        ]
    }

    got = objects_from_annotation(annotation, CONFIG, size_hw=SIZE_HW).objects

    pointed = ("one", "another", "beside")
    assert plain(got) == [
        object_of(points=[(360, 180, 1), (320, 180, 0)], ids=pointed),
        object_of(points=[(40, 180, 1), (320, 180, 0)], ids=pointed),
        object_of(points=[(200, 100, 1)], box=[100, 50, 300, 150], ids=("box", "in the box")),
    ]


def test_a_damaged_stored_region_costs_no_other():
    damaged = [
        changed(rectangle(region_id="outside"), x=120),
        changed(keypoint(region_id="broken"), x=None),
        "no region",
        keypoint(region_id=["no", "id"]),
    ]
    annotation = {"result": [damaged[0], keypoint(90, 90, region_id="fine"), *damaged[1:]]}

    got = objects_from_annotation(annotation, CONFIG, size_hw=SIZE_HW, where="annotations[0]")

    assert plain(got.objects) == [object_of(points=[(360, 180, 1)], ids=("fine",))]
    assert [region for region, _ in got.left_out] == damaged
    reasons = [str(error) for _, error in got.left_out]
    assert reasons[0].startswith("annotations[0].result[0].value must be a box with an area")
    assert reasons[1] == (
        "annotations[0].result[2].value.x must be a number, in percent of the image, got None; "
        + AS_DRAWN
    )
    assert reasons[2].startswith("annotations[0].result[3] must be an object, got 'no region'")
    assert reasons[3].startswith("annotations[0].result[4].id must be a string")


def test_refuses_a_stored_annotation_without_a_list():
    where = "tasks[2].annotations[0]"
    with pytest.raises(BadRequestError) as error:
        objects_from_annotation({}, CONFIG, size_hw=SIZE_HW, where=where)
    assert str(error.value) == f"{where}.result must be a list of regions, got None; {AS_DRAWN}"
