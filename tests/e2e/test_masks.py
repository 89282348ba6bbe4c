"""Start Training with full masks of one label: then Retrieve Predictions needs no prompts."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ml_backend.demo import backend_child, wait_until_healthy
from ml_backend.registry import Registry
from tests.e2e.masks import MaskProject, brush, label_config, polygon, union_iou
from tests.e2e.support import free_port, mask_of
from tests.e2e.test_training import NUCLEI_FOLDER, nuclei

pytestmark = pytest.mark.e2e

_LABEL = "Nucleus"
_LABELLED = 16


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


@pytest.fixture(scope="module")
def backend(demo, tmp_path_factory):
    """A backend that trains for a minute: its address and its data."""
    folder, port = tmp_path_factory.mktemp("masks"), free_port()
    child = backend_child(
        folder,
        port=port,
        label_studio_url=demo.url,
        token=demo.state["token"],
        environ={**os.environ, "TRAIN_STEPS": "150"},
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


@pytest.fixture(scope="module")
def trained(demo, backend):
    truth = nuclei()
    names = sorted(truth)
    project = MaskProject.create(
        demo,
        "nuclei without prompts",
        label_config(_LABEL, "BrushLabels", "PolygonLabels"),
        [NUCLEI_FOLDER / name for name in names],
        method="sam-adapter",
        backend_url=backend[0],
    )
    for index, name in enumerate(names[:_LABELLED]):
        draw = brush if index % 2 else polygon
        project.annotate(name, [draw(mask, _LABEL) for mask in truth[name]])
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


def test_rolled_back_there_are_none(trained, versions):
    project, name = trained.project, next(iter(trained.after))
    (prediction,) = trained.after[name]
    assert versions.rollback() is None
    assert project.model_version == trained.version_before
    assert project.retrieve([name])[name] == [prediction]
