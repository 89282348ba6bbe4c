"""Images far smaller and far larger than what SAM is trained on, through Label Studio."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ml_backend.connect import connect
from ml_backend.demo import demo_label_config, sample_images
from tests.e2e.page import LabellingPage
from tests.e2e.support import NUCLEI, Thing, rectangle, share_inside, union_of

pytestmark = pytest.mark.e2e

_NUCLEUS_RECTANGLE = 3
_NUCLEUS = NUCLEI[1]
_SLIDE_HW = (2448, 3264)
_FIELD_XY = (2411, 1703)  # where the micrograph lies on the slide


@pytest.fixture(scope="module")
def sized(demo, tmp_path_factory):
    """A project with the micrograph's corner of 256 px, and a slide of 3264 px that holds it."""
    folder = tmp_path_factory.mktemp("sized")
    (path,) = (path for path in sample_images() if path.name == _NUCLEUS.image)
    micrograph = np.asarray(Image.open(path).convert("RGB"))
    small = micrograph[:256, :256]
    rng = np.random.default_rng(0)
    ground = np.median(micrograph, axis=(0, 1)) + rng.normal(0, 4, (*_SLIDE_HW, 1))
    slide = np.clip(ground, 0, 255).astype(np.uint8)
    x, y = _FIELD_XY
    slide[y : y + micrograph.shape[0], x : x + micrograph.shape[1]] = micrograph
    for name, pixels in (("small.png", small), ("slide.jpg", slide)):
        Image.fromarray(pixels).save(folder / name, quality=95)
    project_id = demo.client.create_project("sizes", demo_label_config("brush"))["id"]
    demo.client.import_files(project_id, sorted(folder.iterdir()))
    connect(demo.client, project_id, demo.backend_url, title="SAM")
    return project_id, demo.tasks(project_id)


def things() -> dict[str, Thing]:
    left, top, right, bottom = _NUCLEUS.box_xyxy
    x, y = _FIELD_XY
    moved = replace(
        _NUCLEUS,
        image="slide.jpg",
        size_hw=_SLIDE_HW,
        box_xyxy=(left + x, top + y, right + x, bottom + y),
    )
    return {
        "small.png": replace(_NUCLEUS, image="small.png", size_hw=(256, 256)),
        "slide.jpg": moved,
    }


def test_a_nucleus_is_found_on_a_small_image_and_on_a_slide(demo, sized):
    project_id, tasks = sized
    left, top, right, bottom = _NUCLEUS.box_xyxy
    ys, xs = np.mgrid[: bottom - top, : right - left] + 0.5
    ellipse = ((2 * xs / (right - left) - 1) ** 2 + (2 * ys / (bottom - top) - 1) ** 2) <= 1
    for name, thing in things().items():
        mask = union_of(demo.ask(project_id, tasks[name], [rectangle(thing)]))
        assert mask.shape == thing.size_hw
        assert share_inside(mask, thing.box_xyxy) > 0.9
        x0, y0, x1, y1 = thing.box_xyxy
        part = mask[y0:y1, x0:x1]
        assert (part & ellipse).sum() / (part | ellipse).sum() > 0.7, name


def test_both_are_drawn_on_the_page(demo, sized, browser, screenshots):
    project_id, tasks = sized
    for name, thing in things().items():
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        page = LabellingPage(
            context.new_page(), demo.url, screenshots=screenshots, name=f"size_{name[:5]}"
        )
        page.log_in(demo.state["email"], demo.state["password"])
        page.open(project_id, tasks[name]["id"])
        page.choose("rectangle-tool")
        page.label(_NUCLEUS_RECTANGLE)
        height, width = thing.size_hw
        left, top, right, bottom = thing.box_xyxy
        page.drag(
            (100 * left / width, 100 * top / height), (100 * right / width, 100 * bottom / height)
        )
        page.screenshot("suggested")
        page.accept()
        assert len(page.region_ids()) == 1
        page.screenshot("accepted")
        context.close()
