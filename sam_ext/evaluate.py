"""Measures a model on COCO-format folders: the tables of the README, each one command.

Command line: ``python -m sam_ext.evaluate prompts --data DIR --split test --model tiny``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sam_ext.checkpoints import load_sam, resolve_device
from sam_ext.metrics import boundary_iou, ellipse_in_box, iou, rectangle_mask
from sam_ext.predictor import Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.training.data import CocoFolder

__all__ = ["Row", "center_point", "evaluate_prompts", "main", "print_rows", "tight_box"]

_TABLE_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    dataset: str
    split: str
    variant: str
    """What answered: the model, or a baseline that needs none."""
    prompt: str
    objects: int
    miou: float
    """Mean over objects of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""
    iou_error: float | None
    """Mean absolute difference of the predicted IoU and the real one; None for baselines."""


def tight_box(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the box [x0, y0, x1, y1] of a mask [H, W] that is not empty, in pixel edges."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float64)


def center_point(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the pixel (x, y) of a mask [H, W] that lies farthest from its outline.

    Source:
        Kirillov et al., arXiv:2304.02643, section D.1.
    """
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return np.array([x, y], np.float64)


def evaluate_prompts(
    predictor: Predictor,
    folder: CocoFolder,
    *,
    dataset: str,
    split: str,
    variant: str,
    limit: int | None = None,
) -> list[Row]:
    """Prompt every object by its tight box and by its centre, and compare the answers with it.

    Args:
        predictor: The model.
        folder: The images and masks.
        dataset: Name in the rows.
        split: Name in the rows.
        variant: Name of the model in the rows.
        limit: At most this many images, from the first on.

    Returns:
        Five rows: the box itself as mask, the ellipse in it, the answer to the box, the answer
        to the point, and the best of the three answers to the point ("oracle").
    """
    scores: dict[tuple[str, str], list[tuple[float, float, float]]] = {}

    def add(name: str, kind: str, mask: NDArray[Any], wanted: NDArray[Any], guess: float) -> None:
        reached = iou(mask, wanted)
        scores.setdefault((name, kind), []).append(
            (reached, boundary_iou(mask, wanted), abs(guess - reached))
        )

    for index in range(len(folder) if limit is None else min(limit, len(folder))):
        scene = folder.scene(index)
        wanted = [scene.mask(k).astype(bool) for k in range(len(scene.rles))]
        wanted = [mask for mask in wanted if mask.any()]
        boxes = [tight_box(mask) for mask in wanted]
        embedding = predictor.embed(scene.image)
        by_box = [_by_box(box) for box in boxes]
        by_point = [_by_point(center_point(mask)) for mask in wanted]
        for mask, box, answer in zip(
            wanted, boxes, _decode(predictor, embedding, by_box), strict=True
        ):
            size_hw = (mask.shape[0], mask.shape[1])
            add("rectangle", "box", rectangle_mask(box, size_hw), mask, float("nan"))
            add("ellipse", "box", ellipse_in_box(box, size_hw), mask, float("nan"))
            add(variant, "box", answer.masks[0], mask, float(answer.iou_predictions[0]))
        for mask, prompt, answer in zip(
            wanted, by_point, _decode(predictor, embedding, by_point), strict=True
        ):
            shown = answer.best(prompt)
            best = int(np.argmax([iou(m, mask) for m in answer.masks]))
            for name, pick in (("point", shown), ("point oracle", best)):
                add(variant, name, answer.masks[pick], mask, float(answer.iou_predictions[pick]))
    rows = []
    for (name, kind), values in scores.items():
        mean = np.mean(values, axis=0)
        rows.append(
            Row(
                dataset=dataset,
                split=split,
                variant=name,
                prompt=kind,
                objects=len(values),
                miou=round(float(mean[0]), 4),
                mbiou=round(float(mean[1]), 4),
                iou_error=None if np.isnan(mean[2]) else round(float(mean[2]), 4),
            )
        )
    return rows


def _by_box(box: NDArray[Any]) -> ObjectPrompt:
    return ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, np.int64), box_xyxy=box
    )


def _by_point(point: NDArray[Any]) -> ObjectPrompt:
    return ObjectPrompt(point_coords=point[None], point_labels=np.ones(1, np.int64))


def _decode(
    predictor: Predictor, embedding: Embedding, prompts: Sequence[ObjectPrompt], batch: int = 32
) -> list[ObjectMasks]:
    answers: list[ObjectMasks] = []
    for first in range(0, len(prompts), batch):
        answers += predictor.decode(embedding, prompts[first : first + batch])
    return answers


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows as a table, whole even where the terminal is narrow or there is none."""
    table = Table()
    for column in Row.__dataclass_fields__:
        table.add_column(column)
    for row in rows:
        table.add_row(*("" if v is None else str(v) for v in asdict(row).values()))
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m sam_ext.evaluate", description=__doc__)
    parser.add_argument("table", choices=("prompts",))
    parser.add_argument("--data", type=Path, required=True, help="folder of one COCO-format set")
    parser.add_argument("--model", default="tiny", help="a name, or a checkpoint's path")
    parser.add_argument("--split", default="test")
    parser.add_argument("--primary", action="store_true", help="only annotations with primary == 1")
    parser.add_argument("--limit", type=int, help="at most this many images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights-dir", type=Path, default=Path("data/weights"))
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    options = parser.parse_args(arguments)
    sam = load_sam(
        options.model,
        weights_dir=options.weights_dir,
        device=resolve_device(options.device),
        progress=True,
    )
    rows = evaluate_prompts(
        Predictor(sam),
        CocoFolder(
            options.data, splits=(options.split,), primary_only=options.primary, cache=False
        ),
        dataset=options.data.name,
        split=options.split,
        variant=Path(options.model).stem,
        limit=options.limit,
    )
    print_rows(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
