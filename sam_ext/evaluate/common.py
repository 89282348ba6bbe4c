"""What all tables share: which images, how an object is prompted, and how rows are shown."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sam_ext.ba_sam import default_ba_sam
from sam_ext.checkpoints import load_sam, resolve_device
from sam_ext.colours import default_colours
from sam_ext.errors import ConfigError
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.resolution import default_policy
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam
from sam_ext.training.data import CocoFolder, Scene

__all__ = [
    "add_data_arguments",
    "add_model_arguments",
    "add_rows_argument",
    "box_prompt",
    "center_point",
    "chosen_images",
    "measured_key",
    "new_figure",
    "object_masks",
    "open_folder",
    "open_model",
    "points_prompt",
    "print_rows",
    "served_predictor",
]


def center_point(mask: NDArray[Any]) -> NDArray[Any]:
    """Return the pixel (x, y) of a mask [H, W] that lies farthest from its outline.

    Source:
        Kirillov et al., arXiv:2304.02643, section D.1.
    """
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(int(distance.argmax()), mask.shape)
    return np.array([x, y], np.float64)


def chosen_images(folder: CocoFolder, limit: int | None, seed: int | None) -> list[int]:
    """Choose the images to measure, in the folder's order.

    Args:
        folder: The images.
        limit: At most this many; None takes all.
        seed: Draws the images that a limit leaves; None takes the first.
    """
    count = len(folder) if limit is None else min(limit, len(folder))
    if seed is None:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(len(folder))[:count].tolist())


def object_masks(scene: Scene) -> list[NDArray[np.bool_]]:
    """Decode a scene's masks [H, W], those left out that hold no pixel."""
    masks = [scene.mask(index).astype(np.bool_) for index in range(len(scene.rles))]
    return [mask for mask in masks if mask.any()]


def box_prompt(box_xyxy: NDArray[Any]) -> ObjectPrompt:
    """Prompt by a box [4] alone."""
    return ObjectPrompt(
        point_coords=np.zeros((0, 2)), point_labels=np.zeros(0, np.int64), box_xyxy=box_xyxy
    )


def points_prompt(points: NDArray[Any]) -> ObjectPrompt:
    """Prompt by points [T, 2] on the object alone."""
    return ObjectPrompt(point_coords=points, point_labels=np.ones(len(points), np.int64))


def open_model(options: argparse.Namespace) -> Sam:
    """Load the model that `add_model_arguments` asked for."""
    return load_sam(
        options.model,
        weights_dir=options.weights_dir,
        device=resolve_device(options.device),
        progress=True,
    )


def open_folder(options: argparse.Namespace) -> CocoFolder:
    """Open the set that `add_data_arguments` asked for."""
    return CocoFolder(
        options.data, splits=(options.split,), primary_only=options.primary, cache=False
    )


def measured_key(options: argparse.Namespace, sam: Sam) -> dict[str, Any]:
    """Say what rows follow from, as `RowFile` takes it: the model, and what of the set is seen."""
    return {
        "model": weights_fingerprint(sam),
        "dataset": options.data.name,
        "split": options.split,
        "primary": options.primary,
        "limit": options.limit,
        "seed": options.seed,
    }


def served_predictor(sam: Sam, stable_sam: StableSam | None) -> Predictor:
    """Make what the backend answers with by its default settings."""
    side = sam.image_encoder.img_size
    return Predictor(
        sam,
        ba_sam=default_ba_sam(side),
        policy=default_policy(side),
        precision="auto",
        stable_sam=stable_sam,
        colours=default_colours(side),
    )


def print_rows(rows: Sequence[Any]) -> None:
    """Print rows, dataclasses of one kind, whole even where the terminal is narrow or none.

    Columns that are None in all rows are left out.
    """
    content = [asdict(row) for row in rows]
    columns = [name for name in content[0] if any(row[name] is not None for row in content)]
    lines = [["" if row[name] is None else str(row[name]) for name in columns] for row in content]
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    console = Console()
    widths = [max(map(len, cells)) for cells in zip(columns, *lines, strict=True)]
    console.width = max(console.width, sum(widths) + 3 * len(widths) + 1)
    console.print(table)


def new_figure(width: float, height: float) -> Any:
    """Make an empty matplotlib figure of a size in inches.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot must have matplotlib, got an environment without it; "
            "pip install 'sam-ml-backend[evaluate]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every table asks: the model, and where its rows go."""
    parser.add_argument("--model", default="tiny", help="a name, or a checkpoint's path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--weights-dir", type=Path, default=Path("data/weights"))
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="and as Markdown to this")


def add_rows_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument of tables that can go on where they stopped."""
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE.jsonl",
        help="keep rows here as they are measured, and measure only what is not there",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of tables that are measured on one COCO-format set."""
    parser.add_argument("--data", type=Path, required=True, help="folder of one COCO-format set")
    parser.add_argument("--split", default="test")
    parser.add_argument("--primary", action="store_true", help="only annotations with primary == 1")
    parser.add_argument("--limit", type=int, help="at most this many images")
    parser.add_argument("--seed", type=int, help="draw these images; otherwise the first")
