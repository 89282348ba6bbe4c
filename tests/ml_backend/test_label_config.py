"""What a labelling config offers, from recorded ones and from the odd ones people write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ml_backend.errors import LabelConfigError
from ml_backend.label_config import Control, ImageTag, LabelConfig, parse_label_config

DATA = Path(__file__).parents[1] / "data"
IMAGE = '<Image name="image" value="$image"/>'


def config_of(*tags: str) -> LabelConfig:
    return parse_label_config(f"<View>{''.join(tags)}</View>")


def names(controls) -> list[str]:
    return [control.name for control in controls]


def test_reads_the_recorded_brush_config():
    payload = json.loads((DATA / "10_predict_interactive_keypoint_positive.json").read_text())

    config = parse_label_config(payload["label_config"])

    shared = {"to_names": ("image",), "labels": ("Cat", "Dog"), "label_values": ("Cat", "Dog")}
    assert config == LabelConfig(
        images=(ImageTag(name="image", value_key="image"),),
        controls=(
            Control(
                name="mask",
                kind="brush",
                result_type="brushlabels",
                value_key="brushlabels",
                **shared,
            ),
            Control(
                name="kp",
                kind="keypoint",
                result_type="keypointlabels",
                value_key="keypointlabels",
                smart=True,
                **shared,
            ),
            Control(
                name="box",
                kind="rectangle",
                result_type="rectanglelabels",
                value_key="rectanglelabels",
                smart=True,
                **shared,
            ),
        ),
    )
    assert names(config.prompts_for("image")) == ["kp", "box"]
    assert names(config.outputs_for("image")) == ["mask"]


def test_reads_tags_without_labels_beside_a_labels_tag():
    config = config_of(
        IMAGE,
        '<Labels name="label" toName="image"><Label value="Cat"/></Labels>',
        '<brush name="mask" toName="image"/>',
        '<KeyPoint name="kp" toName="image" SMARTONLY="true"/>',
    )

    label = Control(
        name="label",
        kind="labels",
        to_names=("image",),
        result_type="labels",
        value_key="labels",
        labels=("Cat",),
        label_values=("Cat",),
    )
    assert config.controls == (
        label,
        Control(
            name="mask", kind="brush", to_names=("image",), result_type="brush", value_key=None
        ),
        Control(
            name="kp",
            kind="keypoint",
            to_names=("image",),
            result_type="keypoint",
            value_key=None,
            smart=True,
        ),
    )
    assert config.labels_tag_for("image", labels=("Cat",)) == label
    assert config.labels_tag_for("image", labels=("Dog",)) is None


def test_keeps_the_tags_of_several_images_apart():
    config = config_of(
        '<Image name="left" value="$photo"/><Image name="right" valueList="$pages"/>',
        '<Text name="text" value="$text"/>',
        '<BrushLabels name="mask" toName="left"/>',
        '<PolygonLabels name="outline" toName="left, right"/>',
        '<Labels name="words" toName="text"/><KeyPoint toName="left"/><Choices name="c"/>',
    )

    assert config.images == (
        ImageTag(name="left", value_key="photo"),
        ImageTag(name="right", value_key="pages", is_list=True),
    )
    assert names(config.controls) == ["mask", "outline"]
    assert names(config.outputs_for("left")) == ["mask", "outline"]
    assert names(config.outputs_for("right")) == ["outline"]
    assert config.find_image("right") is config.images[1]
    assert config.find_image("text") is None
    assert config.find_control("outline") is config.controls[1]
    assert config.find_control("words") is None


def test_a_config_without_control_tags_is_read_but_has_nothing_to_answer_into():
    config = config_of(IMAGE)

    assert config.controls == ()
    assert config.prompts_for("image") == ()
    with pytest.raises(LabelConfigError) as error:
        config.outputs_for("image")
    assert str(error.value) == (
        'the labelling config must have a tag with toName="image" to answer into, one of '
        "<BrushLabels>, <BitmaskLabels>, <PolygonLabels>, <RectangleLabels>, got none; add one, or "
        "change SAM_OUTPUT"
    )


MASK = '<BrushLabels name="mask" toName="image"/>'
OUTLINE = '<PolygonLabels name="outline" toName="image"/>'
BOX = '<RectangleLabels name="box" toName="image"/>'
SMART_BOX = '<RectangleLabels name="smart" toName="image" smart="true"/>'
POINT = '<KeyPointLabels name="kp" toName="image" smart="true"/>'


@pytest.mark.parametrize(
    ("tags", "wanted", "expected"),
    [
        pytest.param([BOX, OUTLINE, MASK, POINT], None, ["mask", "outline", "box"], id="all"),
        pytest.param([SMART_BOX, OUTLINE], None, ["outline"], id="a smart rectangle is a prompt"),
        pytest.param([SMART_BOX, POINT], None, ["smart"], id="unless there is nothing else"),
        pytest.param([SMART_BOX, MASK], ["rectangle"], ["smart"], id="or it is asked for"),
        pytest.param(
            [MASK, OUTLINE], ["polygon", "brush"], ["mask", "outline"], id="always in one order"
        ),
        pytest.param([MASK, BOX], ["polygon", "rectangle"], ["box"], id="what there is of it"),
    ],
)
def test_chooses_what_to_answer_into(tags, wanted, expected):
    assert names(config_of(IMAGE, *tags).outputs_for("image", wanted=wanted)) == expected


def test_refuses_an_output_that_the_config_has_no_tag_for():
    with pytest.raises(LabelConfigError) as error:
        config_of(IMAGE, MASK, POINT).outputs_for("image", wanted=["polygon"])
    assert str(error.value) == (
        'the labelling config must have a tag with toName="image" to answer into, one of '
        "<PolygonLabels>, got brushlabels, keypointlabels; add one, or change SAM_OUTPUT"
    )


def test_of_two_tags_of_a_kind_the_one_with_the_label_is_chosen():
    config = config_of(
        IMAGE,
        '<BrushLabels name="animals" toName="image"><Label value="Cat"/></BrushLabels>',
        '<BrushLabels name="parts" toName="image"><Label value="Ear"/></BrushLabels>',
    )

    assert names(config.outputs_for("image", labels=("Ear",))) == ["parts"]
    assert names(config.outputs_for("image", labels=("Car",))) == ["animals"]
    assert names(config.outputs_for("image")) == ["animals"]


def test_an_alias_wins_over_the_value_and_the_value_joins_tags():
    config = config_of(
        IMAGE,
        '<KeyPointLabels name="kp" toName="image"><View><Label value="Cat" alias="c"/></View>',
        '<Label alias="only"/><Label/><Label value="Cat" alias="c"/></KeyPointLabels>',
        '<BrushLabels name="mask" toName="image"><Label value="Cat" alias="feline"/>',
        '<Label value="Fur" alias="f"/></BrushLabels>',
        '<PolygonLabels name="outline" toName="image"><Label value="Cat"/></PolygonLabels>',
    )
    kp, mask, outline = config.controls

    assert kp.labels == ("c", "only")
    assert kp.label_values == ("Cat", "")
    assert [config.resolve_label(c, "c") for c in (kp, mask, outline)] == ["c", "feline", "Cat"]
    assert config.resolve_label(mask, "Cat") == "feline"
    assert config.resolve_label(mask, "Fur") == "f"  # the value itself, from a client's request
    assert config.resolve_label(mask, "only") is None


@pytest.mark.parametrize(
    ("tags", "label", "can"),
    [
        pytest.param(["Brush"], "Cat", True, id="its-own"),
        pytest.param(["Brush"], "Dog", False, id="unknown"),
        pytest.param(["Brush"], "", True, id="none-is-needed"),
        pytest.param(["KeyPoint"], "Cat", False, id="no-mask-tag"),
        pytest.param(["KeyPoint"], "", False, id="no-mask-tag-and-no-label"),
        pytest.param([], "Cat", False, id="nothing"),
    ],
)
def test_says_whether_masks_may_carry_a_label(tags, label, can):
    controls = [
        f'<{tag}Labels name="{tag}" toName="image"><Label value="Cat"/></{tag}Labels>'
        for tag in tags
    ]
    assert config_of(IMAGE, *controls).can_carry("image", label=label) is can


def test_a_labels_tag_carries_the_label_of_a_mask_tag_without_any():
    labels = '<Labels name="what" toName="image"><Label value="Cat"/></Labels>'
    config = config_of(IMAGE, '<Brush name="mask" toName="image"/>', labels)
    assert config.can_carry("image", label="Cat")
    assert not config.can_carry("image", label="Dog")
    assert not config.can_carry("other", label="Cat")


def test_labels_that_come_from_the_task_may_be_any():
    config = config_of(IMAGE, '<BrushLabels name="mask" toName="image" value="$labels"/>')

    assert config.resolve_label(config.controls[0], "Okapi") == "Okapi"


def test_reads_the_same_text_once():
    assert config_of(IMAGE, MASK) is config_of(IMAGE, MASK)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        pytest.param(
            "<View>",
            "the labelling config must be XML, got '<View>' (no element found: line 1, column 6); "
            "copy it from the project's labelling interface settings",
            id="cut off",
        ),
        pytest.param(
            "<View>\ud800</View>",
            "the labelling config must be XML, got '<View>\\ud800</View>' ('utf-8' codec can't "
            "encode character '\\ud800' in position 6: surrogates not allowed); "
            "copy it from the project's labelling interface settings",
            id="half a surrogate pair",
        ),
        pytest.param(
            '<!DOCTYPE v [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><View>&b;</View>',
            "the labelling config must be plain tags, got a <!DOCTYPE ...>; "
            "remove the document type",
            id="entities",
        ),
        pytest.param(
            '<View><Text name="t" value="$t"/><Labels name="l" toName="t"/></View>',
            "the labelling config must have an <Image> tag, got View, Text, Labels; "
            'add <Image name="image" value="$image"/>',
            id="a text project",
        ),
        pytest.param(
            '<View><Image name="image"/></View>',
            "the labelling config's <Image> tag must have a name and an address, got one without "
            'an address; write it as <Image name="image" value="$image"/>',
            id="no address",
        ),
        pytest.param(
            '<View><Image value="$image"/></View>',
            "the labelling config's <Image> tag must have a name and an address, got one without "
            'a name; write it as <Image name="image" value="$image"/>',
            id="no name",
        ),
    ],
)
def test_refuses_what_is_no_config_for_images(xml, message):
    with pytest.raises(LabelConfigError) as error:
        parse_label_config(xml)
    assert str(error.value) == message
