"""Defects without prompts, end to end: masks in Label Studio, a training, Retrieve Predictions.

    python -m tests.e2e.defects --data DIR [--images 10 40] [--method sam-adapter]

DIR is a COCO-format folder of one kind of thing, such as mt_defect. Of its `train` split so many
images are annotated through Label Studio; the `test` split's are predicted without prompts, and
compared with automatic masks (a grid of prompts, SAM's way of working without any).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_backend.loading import load_predictor
from ml_backend.settings import Settings
from sam_ext.automatic import default_grid, generate_masks
from sam_ext.training.data import CocoFolder
from tests.e2e.masks import MaskProject, label_config, polygon, union_iou
from tests.e2e.support import Demo

_LABEL = "Defect"


def compare(demo: Demo, data: Path, *, images: int, method: str) -> str:
    """Train on `images` images, and predict the test split; returns what was measured."""
    learnt_from, measured_on = CocoFolder(data, ("train",)), CocoFolder(data, ("test",))
    chosen = np.random.default_rng(0).permutation(len(learnt_from))[:images]
    files = [learnt_from.file(index) for index in chosen]
    files += [measured_on.file(index) for index in range(len(measured_on))]
    config = label_config(_LABEL, "PolygonLabels")
    project = MaskProject.create(
        demo,
        f"defects {images}",
        config,
        files,
        method=method,
        backend_url=demo.backend_url,
    )
    for index in chosen:
        masks = _masks(learnt_from, int(index))
        name = learnt_from.file(index).name
        project.annotate(name, [polygon(mask, _LABEL) for mask in masks])

    started = time.monotonic()
    job = project.train()
    trained_s = time.monotonic() - started
    names = [measured_on.file(index).name for index in range(len(measured_on))]
    started = time.monotonic()
    found = project.retrieve(names)
    retrieved_s = time.monotonic() - started

    predictor = load_predictor(Settings())
    reached, automatic, best = [], [], []
    for index, name in enumerate(names):
        truth = np.any(_masks(measured_on, index), axis=0)
        regions = [region for prediction in found[name] for region in prediction["result"]]
        reached.append(union_iou(regions, [truth]))
        image = measured_on.scene(index).image
        options = default_grid(predictor.image_size)
        everything = generate_masks(predictor, predictor.embed(image), **options)
        automatic.append(_iou(_union([one.mask for one in everything], truth), truth))
        best.append(max((_iou(one.mask, truth) for one in everything), default=0.0))
    return "\n".join(
        [
            f"{images} images learnt from, {job['progress'].get('method')}: {job['state']} after "
            f"{trained_s:.0f} s: {job['reason']}",
            f"{len(names)} images predicted in {retrieved_s:.0f} s, "
            f"{sum(bool(found[name]) for name in names)} of them with regions",
            f"IoU without prompts       {np.mean(reached):.3f}",
            f"IoU of automatic masks    {np.mean(automatic):.3f} (all of them together)",
            f"                          {np.mean(best):.3f} (the best one of each image)",
        ]
    )


def _masks(folder: CocoFolder, index: int) -> list[NDArray[np.bool_]]:
    """The objects' masks [H, W]; pieces that touch nothing else of theirs are one object each."""
    scene = folder.scene(index)
    pieces = []
    for number in range(len(scene.rles)):
        count, labels = cv2.connectedComponents(scene.mask(number))
        pieces += [labels == piece for piece in range(1, count)]
    return pieces


def _union(masks: list[NDArray[np.bool_]], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
    union: NDArray[np.bool_] = np.any([np.zeros_like(like), *masks], axis=0)
    return union


def _iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def main() -> None:
    """Start a demo in a folder of its own, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[40])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--folder", type=Path, help="a demo's, kept; else one that goes again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(arguments.folder or Path(folder) / "demo")
        demo.start()
        try:
            for images in arguments.images:
                print(  # noqa: T201
                    compare(demo, arguments.data, images=images, method=arguments.method),
                    flush=True,
                )
        finally:
            demo.stop()


if __name__ == "__main__":
    main()
