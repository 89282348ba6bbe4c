"""Masks to regions, held against answers that Label Studio drew and stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface

from ml_backend.convert.png import mask_from_data_url
from ml_backend.convert.regions import regions_from_mask
from ml_backend.errors import LabelConfigError
from ml_backend.label_config import parse_label_config

DATA = Path(__file__).parents[2] / "data"
LABELS = '<Label value="Cat"/><Label value="Dog"/>'
ALL = parse_label_config(
    '<View><Image name="image" value="$image"/>'
    f'<RectangleLabels name="box" toName="image">{LABELS}</RectangleLabels>'
    f'<PolygonLabels name="outline" toName="image">{LABELS}</PolygonLabels>'
    f'<BrushLabels name="mask" toName="image">{LABELS}</BrushLabels></View>'
)
WITHOUT_LABELS = parse_label_config(
    '<View><Image name="image" value="$image"/><Rectangle name="box" toName="image"/>'
    f'<Labels name="label" toName="image">{LABELS}</Labels></View>'
)


@pytest.fixture
def mask():
    """An object of 4 x 10 px, and far away a speck, in 20 rows and 50 columns."""
    mask = np.zeros((20, 50), bool)
    mask[5:9, 10:20] = True
    mask[18, 48] = True
    return mask


def regions(mask, config=ALL, *, labels=("Cat",), **options):
    return regions_from_mask(
        mask, config=config, image_name="image", labels=labels, score=0.91, **options
    )


def without_id(region):
    return {key: value for key, value in region.items() if key != "id"}


def test_writes_brush_polygon_and_rectangle(mask):
    brush, polygon, rectangle = regions(mask)

    shared = {
        "to_name": "image",
        "origin": "prediction",
        "original_width": 50,
        "original_height": 20,
        "image_rotation": 0,
        "score": 0.91,
    }
    rle = brush["value"].pop("rle")
    assert without_id(brush) == {
        "from_name": "mask",
        "type": "brushlabels",
        **shared,
        "value": {"format": "rle", "brushlabels": ["Cat"]},
    }
    np.testing.assert_array_equal(decode_rle(rle).reshape(20, 50, 4)[:, :, 3], mask * 255)
    assert without_id(polygon) == {
        "from_name": "outline",
        "type": "polygonlabels",
        **shared,
        "value": {
            "points": [[20, 25], [40, 25], [40, 45], [20, 45]],
            "closed": True,
            "polygonlabels": ["Cat"],
        },
    }
    assert without_id(rectangle) == {
        "from_name": "box",
        "type": "rectanglelabels",
        **shared,
        "value": {
            "x": 20,
            "y": 25,
            "width": 20,
            "height": 20,
            "rotation": 0,
            "rectanglelabels": ["Cat"],
        },
    }
    assert json.loads(json.dumps([brush, polygon, rectangle])) == [brush, polygon, rectangle]


@pytest.mark.parametrize("tag", ["BitmaskLabels", "Bitmask"])
def test_writes_a_bitmask_between_brush_and_polygon(mask, tag):
    """Value and type as Label Studio's SDK validates them."""
    xml = (
        '<View><Image name="image" value="$image"/>'
        f'<PolygonLabels name="outline" toName="image">{LABELS}</PolygonLabels>'
        f'<{tag} name="bits" toName="image">{LABELS}</{tag}>'
        f'<Labels name="label" toName="image">{LABELS}</Labels>'
        f'<BrushLabels name="mask" toName="image">{LABELS}</BrushLabels></View>'
    )
    found = regions(mask, parse_label_config(xml))
    assert [one["type"] for one in found if one["type"] != "labels"] == [
        *("brushlabels", tag.lower(), "polygonlabels")
    ]
    bits = found[1]
    assert bits["from_name"] == "bits"
    np.testing.assert_array_equal(
        mask_from_data_url(bits["value"]["imageDataURL"], size_hw=(20, 50)), mask
    )
    control = LabelInterface(xml).get_control("bits")
    assert control.validate_value(bits["value"])
    if tag == "BitmaskLabels":
        assert bits["value"]["bitmasklabels"] == ["Cat"]
    else:
        assert found[2] | {"from_name": "bits", "type": "bitmask"} == bits | {
            "value": bits["value"] | {"labels": ["Cat"]}
        }


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        pytest.param("50_predict_response_brush.json", "brush", id="brush"),
        pytest.param("51_predict_response_polygon.json", "polygon", id="polygon"),
    ],
)
def test_has_the_fields_of_a_region_that_label_studio_accepted(payload, kind, mask):
    recorded = json.loads((DATA / payload).read_text())["results"][0]["result"][0]

    (region,) = regions(mask, wanted=[kind])

    assert region.keys() == recorded.keys()
    assert region["value"].keys() == recorded["value"].keys()


def test_a_recorded_mask_gives_the_recorded_rle():
    recorded = json.loads((DATA / "50_predict_response_brush.json").read_text())
    rle = recorded["results"][0]["result"][0]["value"]["rle"]
    mask = decode_rle(rle).reshape(480, 640, 4)[:, :, 3] > 0

    (region,) = regions(mask, wanted=["brush"])

    assert region["value"]["rle"] == rle


def test_islands_are_regions_of_their_own_with_ids_of_their_own(mask):
    mask[12:18, 30:34] = True

    got = regions(mask, wanted=["polygon"]) + regions(mask, wanted=["polygon"])

    first_corners = [region["value"]["points"][0] for region in got]
    assert first_corners == [[20, 25], [60, 60]] * 2
    ids = {region["id"] for region in got}
    assert len(ids) == 4
    assert all(re.fullmatch("[0-9a-f]{32}", region_id) for region_id in ids)


def test_a_mask_of_nothing_but_a_speck_is_answered_nonetheless():
    mask = np.zeros((20, 50), bool)
    mask[19, 49] = True

    _, polygon, rectangle = regions(mask)

    assert polygon["value"]["points"] == [[98, 95], [100, 95], [100, 100], [98, 100]]
    assert rectangle["value"] == {
        "x": 98,
        "y": 95,
        "width": 2,
        "height": 5,
        "rotation": 0,
        "rectanglelabels": ["Cat"],
    }


def test_an_empty_mask_gives_no_region():
    assert regions(np.zeros((20, 50), bool)) == []


def test_a_tag_without_labels_gives_a_pair_of_entries_with_one_id(mask):
    region, label = regions(mask, WITHOUT_LABELS)

    geometry = {"x": 20, "y": 25, "width": 20, "height": 20, "rotation": 0}
    assert region["type"] == "rectangle"
    assert region["from_name"] == "box"
    assert region["value"] == geometry
    assert label == {
        **region,
        "type": "labels",
        "from_name": "label",
        "value": {**geometry, "labels": ["Cat"]},
    }


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        pytest.param(WITHOUT_LABELS, (), id="no label, no entry for it"),
        pytest.param(WITHOUT_LABELS, ("Bird",), id="no tag has the label"),
        pytest.param(ALL, ("Bird",), id="the tag lacks the label"),
        pytest.param(ALL, (), id="no label"),
    ],
)
def test_a_label_that_cannot_be_given_is_left_out(mask, config, labels):
    (region,) = regions(mask, config, labels=labels, wanted=["rectangle"])

    assert region["value"] == {"x": 20, "y": 25, "width": 20, "height": 20, "rotation": 0}


def test_labels_are_written_as_the_answering_tag_calls_them(mask):
    config = parse_label_config(
        '<View><Image name="image" value="$image"/>'
        '<KeyPointLabels name="kp" toName="image"><Label value="Cat"/></KeyPointLabels>'
        '<BrushLabels name="mask" toName="image"><Label value="Cat" alias="c"/>'
        '<Label value="Fur"/></BrushLabels></View>'
    )

    (region,) = regions(mask, config, labels=("Cat", "Fur"))

    assert region["value"]["brushlabels"] == ["c", "Fur"]


def test_says_which_image_of_a_list(mask):
    assert {region["item_index"] for region in regions(mask, item_index=0)} == {0}


def test_a_polygon_strays_no_further_than_the_tolerance():
    rows, columns = np.indices((60, 90))
    disc = (rows - 30) ** 2 + (columns - 40) ** 2 < 25**2

    corners = [
        len(regions(disc, wanted=["polygon"], tolerance_px=tolerance)[0]["value"]["points"])
        for tolerance in (0.0, 1.0, 3.0)
    ]

    assert corners == sorted(corners, reverse=True)
    assert corners[0] > 3 * corners[1] > 3 * corners[2]


def test_a_config_without_a_tag_to_answer_into_is_named():
    config = parse_label_config('<View><Image name="image" value="$image"/></View>')
    with pytest.raises(LabelConfigError, match="must have a tag with"):
        regions(np.zeros((2, 3), bool), config)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        pytest.param(np.zeros((2, 3), np.uint8), "uint8 [2, 3]", id="not bool"),
        pytest.param(np.zeros((1, 2, 3), bool), "bool [1, 2, 3]", id="a stack"),
    ],
)
def test_refuses_what_is_no_mask(mask, got):
    with pytest.raises(ValueError, match=re.escape(f"mask must be [H, W] bool, got {got}")):
        regions(mask)
