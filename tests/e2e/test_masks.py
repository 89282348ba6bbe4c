"""Start Training with full masks of one label: then Retrieve Predictions needs no prompts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ml_backend.demo import backend_child, wait_until_healthy
from ml_backend.registry import Registry
from tests.e2e.masks import MaskProject, brush, label_config, polygon, union_iou
from tests.e2e.support import free_port, mask_of, union_of
from tests.e2e.test_training import NUCLEI_FOLDER, nuclei

pytestmark = pytest.mark.e2e

_LABEL = "Nucleus"
_LABELLED = 16
_EMPTY = 6


@dataclass
class Trained:
    """What happened from Start Training to the predictions."""

    project: MaskProject
    before: dict[str, list[dict[str, Any]]]
    after: dict[str, list[dict[str, Any]]]
    job: dict[str, Any]
    version_before: str
    seconds: float
    retrieved_s: float
    empty: list[dict[str, Any]]
    """What is found in an image of nothing."""


@pytest.fixture(scope="module")
def backend(demo, tmp_path_factory):
    """A backend that trains for a minute or two: its address and its data."""
    folder, port = tmp_path_factory.mktemp("masks"), free_port()
    child = backend_child(
        folder,
        port=port,
        label_studio_url=demo.url,
        token=demo.state["token"],
        environ={**os.environ, "TRAIN_STEPS": "250"},
    )
    try:
        wait_until_healthy([child], stop=threading.Event())
        yield f"http://127.0.0.1:{port}", folder / "backend"
    finally:
        child.terminate()
        child.wait()


@pytest.fixture
def versions(trained, backend):
    return Registry(backend[1] / "projects", keep=5).project(trained.project.name)


def _without_nuclei(folder: Path, names: Sequence[str]) -> list[Path]:
    """Paint some images' nuclei over with what is around them."""
    rng, files = np.random.default_rng(0), []
    for number, name in enumerate(names):
        pixels = np.array(Image.open(NUCLEI_FOLDER / name).convert("RGB"))
        covered = np.any(nuclei()[name], axis=0)
        covered = cv2.dilate(covered.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        background = pixels[~covered]
        pixels[covered] = background[rng.integers(len(background), size=covered.sum())]
        files.append(folder / f"nothing-{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture(scope="module")
def trained(demo, backend, tmp_path_factory):
    truth = nuclei()
    names = sorted(truth)
    *submitted, unseen = _without_nuclei(
        tmp_path_factory.mktemp("nothing"), [*names[:_EMPTY], names[_LABELLED]]
    )
    project = MaskProject.create(
        demo,
        "nuclei without prompts",
        label_config(_LABEL, "BrushLabels", "PolygonLabels"),
        [*(NUCLEI_FOLDER / name for name in names), *submitted, unseen],
        method="sam-adapter",
        backend_url=backend[0],
    )
    for index, name in enumerate(names[:_LABELLED]):
        draw = brush if index % 2 else polygon
        project.annotate(name, [draw(mask, _LABEL) for mask in truth[name]])
    for file in submitted:
        project.annotate(file.name, [])
    version_before = project.model_version
    before = project.retrieve(names[_LABELLED:])
    started = time.monotonic()
    job = project.train()
    seconds = time.monotonic() - started
    started = time.monotonic()
    after = project.retrieve(names[_LABELLED:])
    return Trained(
        project=project,
        before=before,
        after=after,
        job=job,
        version_before=version_before,
        seconds=seconds,
        retrieved_s=time.monotonic() - started,
        empty=[
            region
            for prediction in project.retrieve([unseen.name])[unseen.name]
            for region in prediction["result"]
        ],
    )


def test_the_job_says_how_it_learnt_and_its_version_is_served(trained, versions):
    job = trained.job
    assert (job["state"], job["method"]) == ("promoted", "sam-adapter"), job["reason"]
    assert job["progress"]["method"] == "sam-adapter"
    active = versions.active()
    assert active.manifest["method"] == "sam-adapter"
    assert active.manifest["prompt_free"] == {"label": _LABEL}
    assert trained.project.model_version == active.model_version != trained.version_before


def test_tasks_without_prompts_have_regions_only_afterwards(trained, capsys):
    truth = nuclei()
    assert not any(trained.before.values())
    reached = []
    for name, predictions in trained.after.items():
        (prediction,) = predictions
        assert prediction["model_version"] == trained.project.model_version
        regions = prediction["result"]
        assert {region["type"] for region in regions} == {"brushlabels", "polygonlabels"}
        assert all(region["value"][region["type"]] == [_LABEL] for region in regions)
        assert all(0 <= region["score"] <= 1 for region in regions)
        pieces = [mask_of(region) for region in regions if region["type"] == "brushlabels"]
        assert np.sum(pieces, axis=0).max() == 1  # one region for each piece
        reached += [union_iou(regions, truth[name])]
    with capsys.disabled():
        print(  # noqa: T201
            f"\nIoU without prompts {np.mean(reached):.3f} on {len(reached)} images; job "
            f"{trained.seconds:.0f} s, {trained.retrieved_s:.1f} s to retrieve"
        )
    assert np.mean(reached) > 0.5


def test_tasks_submitted_empty_teach_that_nothing_is_there(trained, versions, capsys):
    manifest = versions.active().manifest
    used = {*manifest["learnt_from"], *manifest["judged_by"]}
    empty = {trained.project.tasks[f"nothing-{number}.png"] for number in range(_EMPTY)}
    assert len(used & empty) > _EMPTY / 2  # all but some of those that are for judging
    assert len(used - empty) == _LABELLED
    found = union_of(trained.empty).mean() if trained.empty else 0.0
    with capsys.disabled():
        print(f"\nfound where nothing is: {found:.4f} of the image")  # noqa: T201
    assert found < 0.05  # nuclei are a sixth of such an image


def test_rolled_back_there_are_none(trained, versions):
    project, name = trained.project, next(iter(trained.after))
    (prediction,) = trained.after[name]
    assert versions.rollback() is None
    assert project.model_version == trained.version_before
    assert project.retrieve([name])[name] == [prediction]
