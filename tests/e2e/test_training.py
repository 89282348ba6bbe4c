"""Start Training on Label Studio's page: from drawn boxes to a version that is served, and back."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from ml_backend.connect import connect
from ml_backend.demo import demo_label_config
from sam_ext.evaluate.common import center_point
from sam_ext.metrics import tight_box
from sam_ext.training.robust import noisy_boxes
from tests.e2e.page import LabellingPage
from tests.e2e.support import CAT, Demo, Thing, keypoint, mask_of, rectangle

pytestmark = pytest.mark.e2e

# 24 parts of images of dsb2018_nuclei's train split (CC0), see ml_backend/samples/README.md.
NUCLEI_FOLDER = Path(__file__).parent / "nuclei"
_LABELLED = 16
_CLICKED = 4  # nuclei of each of the other images
_JOB_TIMEOUT_S = 900
_MENU = '[aria-label="Machine learning model options"]'


def nuclei() -> dict[str, list[np.ndarray]]:
    """The masks [H, W] of the nuclei that lie whole in each image, by its name."""
    content = json.loads((NUCLEI_FOLDER / "masks.json").read_text())
    return {
        name: [
            coco_mask.decode({"size": content["size"], "counts": counts.encode()}).astype(bool)
            for counts in rles
        ]
        for name, rles in content["rle"].items()
    }


def boxes_of(name: str, masks: list[np.ndarray], *, noise: float = 0.0) -> list[dict[str, Any]]:
    """Rectangles around nuclei, tight or as an annotator in a hurry draws them."""
    height, width = masks[0].shape
    drawn = noisy_boxes(
        torch.from_numpy(np.stack([tight_box(mask) for mask in masks])),
        image_hw=(height, width),
        scale=noise,
        generator=torch.Generator().manual_seed(0),
    )
    things = [Thing(name, (height, width), (0, 0), tuple(box), "Nucleus") for box in drawn.tolist()]
    return [rectangle(thing) for thing in things]


@dataclass
class Trained:
    """What happened from Start Training to the job's end."""

    project_id: int
    before: dict[str, list[dict[str, Any]]]
    after: dict[str, list[dict[str, Any]]]
    iou_before: dict[str, float]
    """Mean IoU of the answers by the kind of prompt."""
    iou_after: dict[str, float]
    version_before: str
    version_after: str
    job_text: str
    """What the status page said of the running job."""
    outcome: str
    """What it said of the job at its end."""
    seconds: float
    clicks_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def version_of(demo: Demo, project_id: int) -> str:
    """The version that Label Studio shows: what /setup answered."""
    (backend,) = demo.client.list_backends(project_id)
    return backend["model_version"]


def answers(
    demo: Demo, project_id: int, tasks: dict[str, Any], truth: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    return {
        name: demo.ask(project_id, tasks[name], boxes_of(name, truth[name]))
        for name in list(tasks)[_LABELLED:]
    }


def measured(
    demo: Demo, project_id: int, tasks: dict[str, Any], truth: dict[str, Any]
) -> dict[str, float]:
    """Ask about the tasks that nobody labelled by sloppy boxes, and by clicks on some nuclei."""
    names = list(tasks)[_LABELLED:]
    sloppy = {
        name: demo.ask(project_id, tasks[name], boxes_of(name, truth[name], noise=0.2))
        for name in names
    }
    clicked = []
    for name in names:
        for mask in truth[name][:_CLICKED]:
            x, y = center_point(mask).astype(int)
            thing = Thing(name, mask.shape, (int(x), int(y)), (0, 0, 0, 0), "Nucleus")
            (region,) = demo.ask(project_id, tasks[name], [keypoint(thing)])
            found = mask_of(region)
            clicked.append((found & mask).sum() / (found | mask).sum())
    return {"sloppy box": mean_iou(sloppy), "click": float(np.mean(clicked))}


def start_training(browser: Any, demo: Demo, project_id: int, screenshots: Path) -> None:
    """Press the button on the project's Model page."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    LabellingPage(page, demo.url, screenshots=screenshots, name="training").log_in(
        demo.state["email"], demo.state["password"]
    )
    page.goto(f"{demo.url}/projects/{project_id}/settings/ml")
    page.click(_MENU)
    page.get_by_text("Start Training", exact=True).first.click()
    with page.expect_response(lambda answer: re.search(r"/api/ml/\d+/train", answer.url)) as answer:
        page.locator("button", has_text="Start Training").last.click()
    assert answer.value.ok, answer.value.text()
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "training_asked_for.png")
    context.close()


class Clicking:
    """An annotator at work on another project while something else goes on."""

    def __init__(self, demo: Demo) -> None:
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._demo = demo
        self._project = demo.projects["brush"]
        self._task = demo.tasks(self._project)[CAT.image]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Clicking:
        self._demo.ask(self._project, self._task, [keypoint(CAT)])  # embedded from here on
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(1.0):
            number += 1
            started = time.monotonic()
            try:
                xy = (CAT.inside_xy[0] + number % 40, CAT.inside_xy[1] + number % 30)
                regions = self._demo.ask(self._project, self._task, [keypoint(CAT, xy)])
                if not regions:
                    self.failures.append(f"no region for click {number}")
            except AssertionError as error:
                self.failures.append(str(error))
            self.seconds.append(time.monotonic() - started)


@pytest.fixture(scope="module")
def trained(demo, browser, screenshots):
    truth = nuclei()
    names = sorted(truth)
    config = demo_label_config("brush")
    project_id = demo.client.create_project("nuclei to learn from", config)["id"]
    demo.client.import_files(project_id, [NUCLEI_FOLDER / name for name in names])
    connect(demo.client, project_id, demo.backend_url, title="SAM")
    found = demo.tasks(project_id)
    tasks = {name: found[name] for name in names}
    for name in names[:_LABELLED]:
        body = {"result": boxes_of(name, truth[name]), "was_cancelled": False}
        demo.api("POST", f"/api/tasks/{tasks[name]['id']}/annotations/", json=body)
    version_before = version_of(demo, project_id)
    before = answers(demo, project_id, tasks, truth)
    iou_before = measured(demo, project_id, tasks, truth) | {"tight box": mean_iou(before)}

    status = browser.new_context(viewport={"width": 1366, "height": 900}).new_page()
    started = time.monotonic()
    with Clicking(demo) as clicking:
        start_training(browser, demo, project_id, screenshots)
        status.goto(demo.backend_url + "/")
        card = status.locator(f"details.project[id^='project-{project_id}.']")
        job = card.locator(".job")
        job.get_by_text(re.compile(r"step [1-9]\d* of \d+")).wait_for(timeout=300_000)  # live
        job_text = job.inner_text()
        status.screenshot(path=screenshots / "training_runs.png", full_page=True)
        ended = card.locator("ul.past li").first
        ended.wait_for(timeout=_JOB_TIMEOUT_S * 1000)
    seconds = time.monotonic() - started
    outcome = ended.inner_text()
    status.reload()
    status.screenshot(path=screenshots / "training_ended.png", full_page=True)
    deadline = time.monotonic() + 30
    while version_of(demo, project_id) == version_before and time.monotonic() < deadline:
        time.sleep(0.5)
    after = answers(demo, project_id, tasks, truth)
    yield Trained(
        project_id=project_id,
        before=before,
        after=after,
        iou_before=iou_before,
        iou_after=measured(demo, project_id, tasks, truth) | {"tight box": mean_iou(after)},
        version_before=version_before,
        version_after=version_of(demo, project_id),
        job_text=job_text,
        outcome=outcome,
        seconds=seconds,
        clicks_s=clicking.seconds,
        failures=clicking.failures,
    )
    status.context.close()


def mean_iou(answers_of: dict[str, list[dict[str, Any]]]) -> float:
    """Of the nuclei that a version was asked for, in the order of their boxes."""
    truth, reached = nuclei(), []
    for name, regions in answers_of.items():
        masks = [mask_of(region) for region in regions]
        assert len(masks) == len(truth[name])
        reached += [
            (mask & wanted).sum() / (mask | wanted).sum()
            for mask, wanted in zip(masks, truth[name], strict=True)
        ]
    return float(np.mean(reached))


def shapes(answers_of: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Answers without what is new in each: the regions' ids."""
    return {
        name: [{key: value for key, value in region.items() if key != "id"} for region in regions]
        for name, regions in answers_of.items()
    }


def test_the_job_is_seen_while_it_runs_and_its_version_is_served(trained):
    assert "Start Training was pressed" in trained.job_text
    assert "promoted" in trained.outcome
    assert trained.version_after != trained.version_before
    assert "-v1-" in trained.version_after


def test_the_version_is_better_on_tasks_that_nobody_labelled(trained, capsys):
    """Sloppy boxes and clicks gain; tight boxes, which leave little to gain, lose little."""
    gains = {kind: trained.iou_after[kind] - value for kind, value in trained.iou_before.items()}
    with capsys.disabled():
        for kind, value in trained.iou_before.items():
            print(f"\n{kind}: IoU {value:.3f}, then {trained.iou_after[kind]:.3f}", end="")  # noqa: T201
        print(f"; job {trained.seconds:.0f} s")  # noqa: T201
    assert np.mean(list(gains.values())) > 0
    assert gains["tight box"] > -0.02


def test_annotators_are_answered_while_it_trains(trained, capsys):
    times = sorted(trained.clicks_s)
    with capsys.disabled():
        print(f"\n{len(times)} clicks, {np.median(times):.2f} s, worst {times[-1]:.2f} s")  # noqa: T201
    assert not trained.failures
    assert len(times) > 5
    assert times[int(0.9 * len(times))] < 1.0


def test_rolling_back_on_the_status_page_gives_the_old_answers(trained, demo, browser, screenshots):
    context = browser.new_context(viewport={"width": 1366, "height": 900})
    page = context.new_page()
    page.goto(demo.backend_url + "/")
    card = page.locator(f"details.project[id^='project-{trained.project_id}.']")
    if card.get_attribute("open") is None:
        card.locator("summary").first.click()
    card.locator("button", has_text="Roll back to").click()
    page.wait_for_load_state()
    page.screenshot(path=screenshots / "training_rolled_back.png", full_page=True)
    context.close()
    tasks = demo.tasks(trained.project_id)
    names = sorted(tasks)
    again = answers(demo, trained.project_id, {name: tasks[name] for name in names}, nuclei())
    assert version_of(demo, trained.project_id) == trained.version_before
    assert shapes(again) == shapes(trained.before)
    assert shapes(again) != shapes(trained.after)
