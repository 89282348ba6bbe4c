"""An annotator's work on the real page, with a mask drawn, accepted and submitted."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ml_backend.connect import connect
from ml_backend.convert.supervision import supervision_of
from ml_backend.demo import demo_label_config, sample_images
from ml_backend.label_config import parse_label_config
from tests.e2e.page import LabellingPage
from tests.e2e.support import CAT, MASK_TYPE, NUCLEI, OUTPUTS, Thing, share_inside, union_of

pytestmark = pytest.mark.e2e

# The labels in the order of the page: two to click with, two to drag with, two by hand.
_CAT_KEYPOINT, _CAT_RECTANGLE, _NUCLEUS_RECTANGLE = 0, 2, 3


@pytest.fixture(params=OUTPUTS)
def output(request):
    return request.param


@pytest.fixture
def labelling(demo, browser, screenshots, output):
    page = open_labelling(demo, browser, screenshots, output)
    yield page
    page.screenshot("last")
    page.page.context.close()


def percent(thing: Thing, xy: tuple[int, int]) -> tuple[float, float]:
    height, width = thing.size_hw
    return 100 * xy[0] / width, 100 * xy[1] / height


def corners(thing: Thing) -> tuple[tuple[float, float], tuple[float, float]]:
    left, top, right, bottom = thing.box_xyxy
    return percent(thing, (left, top)), percent(thing, (right, bottom))


def open_labelling(demo, browser, screenshots, name):
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = LabellingPage(context.new_page(), demo.url, screenshots=screenshots, name=name)
    page.log_in(demo.state["email"], demo.state["password"])
    return page


def stored(demo, task):
    (annotation,) = demo.api("GET", f"/api/tasks/{task['id']}/annotations/")
    return annotation["result"]


def change_inside_and_outside(before, after, mask):
    """How much the screen has changed where the mask is, and elsewhere; grey levels."""
    height, width = before.shape[:2]
    shown = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    change = np.abs(after.astype(int) - before.astype(int)).mean(axis=2)
    return change[shown].mean(), change[~shown].mean()


def test_click_correct_box_accept_and_submit(demo, labelling, output, capsys):
    project_id = demo.projects[output]
    task = demo.tasks(project_id)["cat_black.jpg"]
    labelling.open(project_id, task["id"])
    before = labelling.image_pixels()

    labelling.choose("key-point-tool")
    labelling.label(_CAT_KEYPOINT)
    (sent,) = labelling.click(percent(CAT, CAT.inside_xy))
    assert sent["is_positive"] is True
    labelling.screenshot("keypoint")

    labelling.label(_CAT_KEYPOINT)
    sent = labelling.click(percent(CAT, (60, 60)), alt=True)
    assert [prompt["is_positive"] for prompt in sent] == [True, False]
    after = labelling.image_pixels()
    labelling.screenshot("alt_click")
    labelling.accept()
    clicked = labelling.region_ids()
    labelling.screenshot("accepted")

    labelling.choose("rectangle-tool")
    labelling.label(_CAT_RECTANGLE)
    labelling.drag(*corners(CAT))
    labelling.screenshot("rectangle")
    labelling.accept()
    assert labelling.submit() == 201
    labelling.screenshot("submitted")

    regions = stored(demo, task)
    assert {region["type"] for region in regions} == {MASK_TYPE[output]}
    assert {region["origin"] for region in regions} == {"prediction"}
    assert {tuple(region["value"][MASK_TYPE[output]]) for region in regions} == {("Cat",)}
    assert share_inside(union_of(regions), CAT.box_xyxy) > 0.8
    assert union_of(regions)[CAT.inside_xy[1], CAT.inside_xy[0]]
    drawn = union_of([region for region in regions if region["id"] in clicked])
    inside, outside = change_inside_and_outside(before, after, drawn)
    assert inside > 3 * outside
    with capsys.disabled():
        times = ", ".join(f"{seconds:.2f} s" for seconds in labelling.seconds)
        print(f"\n{output}, on the page: {times} (first click, Alt-click, rectangle)")  # noqa: T201


def test_a_bitmask_is_drawn_accepted_and_read_again(demo, browser, screenshots):
    """In a project of its own; what is stored is shown when the task is opened anew."""
    config = demo_label_config("brush").replace("BrushLabels", "BitmaskLabels")
    project = demo.client.create_project("bitmask", config)
    demo.client.import_files(project["id"], [p for p in sample_images() if p.name == CAT.image])
    connect(demo.client, project["id"], demo.backend_url, title="SAM")
    task = demo.tasks(project["id"])[CAT.image]
    page = open_labelling(demo, browser, screenshots, "bitmask")
    page.open(project["id"], task["id"])
    before = page.image_pixels()
    page.choose("rectangle-tool")
    page.label(_CAT_RECTANGLE)
    page.drag(*corners(CAT))
    page.screenshot("rectangle")
    page.accept()
    assert page.submit() == 201
    [region] = stored(demo, task)
    assert (region["type"], region["value"]["bitmasklabels"]) == ("bitmasklabels", ["Cat"])
    mask = union_of([region])
    assert share_inside(mask, CAT.box_xyxy) > 0.8
    assert mask[CAT.inside_xy[1], CAT.inside_xy[0]]

    page.open(project["id"], task["id"])
    for _ in range(50):  # it is decoded in the background
        inside, outside = change_inside_and_outside(before, page.image_pixels(), mask)
        if inside > 3 * outside:
            break
        page.page.wait_for_timeout(200)
    page.screenshot("stored")
    assert inside > 3 * outside
    config = parse_label_config(config)
    [learnt] = supervision_of(
        {"result": [region]}, config, image_name="image", size_hw=mask.shape
    ).objects
    np.testing.assert_array_equal(learnt.mask, mask)
    page.page.context.close()


def test_two_rectangles_become_two_objects(demo, labelling, output):
    project_id = demo.projects[output]
    task = demo.tasks(project_id)["nuclei.jpg"]
    labelling.open(project_id, task["id"])
    labelling.choose("rectangle-tool")
    for nucleus in NUCLEI:
        labelling.label(_NUCLEUS_RECTANGLE)
        sent = labelling.drag(*corners(nucleus))
    assert len(sent) == 2
    labelling.screenshot("two_rectangles")
    labelling.accept()
    assert labelling.submit() == 201

    regions = stored(demo, task)
    assert {region["type"] for region in regions} == {MASK_TYPE[output]}
    mask = union_of(regions)
    for nucleus in NUCLEI:
        x, y = nucleus.inside_xy
        assert mask[y, x]
    boxes = np.zeros_like(mask)
    for left, top, right, bottom in (nucleus.box_xyxy for nucleus in NUCLEI):
        boxes[top:bottom, left:right] = True
    assert (mask & boxes).sum() > 0.9 * mask.sum()
