"""Measures a model on COCO-format folders: the tables of the README, each one command.

Command line: ``python -m sam_ext.evaluate prompts --data DIR --split test --model tiny``, and the
same with ``resolution``. Every table's JSON is a list of objects, one a row, keyed by column.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sam_ext.ba_sam import DEFAULT_BA_SAM, BaSamConfig
from sam_ext.checkpoints import load_sam, resolve_device
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import Precision
from sam_ext.interactive import CropPolicy, answer_prompts, default_crops
from sam_ext.metrics import boundary_iou, ellipse_in_box, iou, rectangle_mask
from sam_ext.predictor import Crop, Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy, default_policy
from sam_ext.sam import Sam
from sam_ext.training.data import CocoFolder, Scene

__all__ = [
    "ResolutionRow",
    "Row",
    "ba_sam_variants",
    "center_point",
    "evaluate_prompts",
    "evaluate_resolution",
    "main",
    "plot_resolution",
    "print_rows",
    "tight_box",
]

_TABLE_WIDTH = 120


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    dataset: str
    split: str
    variant: str
    """What answered: the model by itself (SAM's square, no crops), as served, or a baseline."""
    prompt: str
    objects: int
    miou: float
    """Mean over objects of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""
    iou_error: float | None
    """Mean absolute difference of the predicted IoU and the real one; None for baselines."""


@dataclass(frozen=True, kw_only=True)
class ResolutionRow:
    """One line of the table by resolution; every object is prompted by its tight box."""

    dataset: str
    split: str
    variant: str
    """The model, and what of BA-SAM is on."""
    size: int
    """Long side in pixels at which the images were encoded, their aspect kept."""
    factor: float
    """The same as a multiple of the training side."""
    objects: int
    miou: float
    """Mean over objects of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""
    encode_ms: float
    """Median time to encode an image."""


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
    predictors: Mapping[str, tuple[Predictor, CropPolicy | None]],
    folder: CocoFolder,
    *,
    dataset: str,
    split: str,
    limit: int | None = None,
    seed: int | None = None,
) -> list[Row]:
    """Prompt every object by its tight box and by its centre, and compare the answers with it.

    Args:
        predictors: The models, each with when it looks at crops, by name in the rows.
        folder: The images and masks.
        dataset: Name in the rows.
        split: Name in the rows.
        limit: At most this many images.
        seed: Which images a limit leaves, as `evaluate_resolution` takes it.

    Returns:
        Two rows of baselines (the box itself as mask, the ellipse in it), and three a model: the
        answer to the box, the answer to the point, and the best of what that was chosen from.
    """
    scores: dict[tuple[str, str], list[tuple[float, float, float]]] = {}

    def add(name: str, kind: str, mask: NDArray[Any], wanted: NDArray[Any], guess: float) -> None:
        reached = iou(mask, wanted)
        scores.setdefault((name, kind), []).append(
            (reached, boundary_iou(mask, wanted), abs(guess - reached))
        )

    for index in _chosen(folder, limit, seed):
        scene = folder.scene(index)
        wanted = _masks(scene)
        size_hw = (scene.image.shape[0], scene.image.shape[1])
        boxes = [tight_box(mask) for mask in wanted]
        for mask, box in zip(wanted, boxes, strict=True):
            add("rectangle", "box", rectangle_mask(box, size_hw), mask, float("nan"))
            add("ellipse", "box", ellipse_in_box(box, size_hw), mask, float("nan"))
        for name, (predictor, crops) in predictors.items():
            embed = lru_cache(maxsize=None)(partial(_embed, predictor, scene.image))
            ask = partial(answer_prompts, predictor, image_hw=size_hw, embed=embed, crops=crops)
            for mask, answer in zip(wanted, ask([_by_box(box) for box in boxes]), strict=True):
                add(name, "box", answer.mask, mask, answer.iou_prediction)
            points = [_by_point(center_point(mask)) for mask in wanted]
            for mask, answer in zip(wanted, ask(points), strict=True):
                best = int(np.argmax([iou(one, mask) for one in answer.candidates.masks]))
                oracle = replace(answer, chosen=best)
                add(name, "point", answer.mask, mask, answer.iou_prediction)
                add(name, "point oracle", oracle.mask, mask, oracle.iou_prediction)
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


def ba_sam_variants(name: str, ba_sam: BaSamConfig) -> dict[str, BaSamConfig | None]:
    """Take a BA-SAM apart: the model called `name` without it, with either half, with both."""
    return {
        name: None,
        f"{name}+factor": BaSamConfig(scaling_factor=True),
        f"{name}+bias": BaSamConfig(bias=ba_sam.bias, beta=ba_sam.beta),
        f"{name}+factor+bias": BaSamConfig(scaling_factor=True, bias=ba_sam.bias, beta=ba_sam.beta),
    }


def evaluate_resolution(
    sam: Sam,
    folder: CocoFolder,
    *,
    dataset: str,
    split: str,
    variants: Mapping[str, BaSamConfig | None],
    factors: Sequence[float],
    limit: int | None = None,
    seed: int | None = None,
    precision: Precision = "fp32",
) -> list[ResolutionRow]:
    """Encode images at several sizes, prompt every object by its tight box, compare.

    Images are padded to whole patches only, also at the training side: what one variant gains or
    loses over another is then the variant's doing, not the padding's.

    Args:
        sam: The model.
        folder: The images and masks.
        dataset: Name in the rows.
        split: Name in the rows.
        variants: What the encoder does about a size, by name in the rows.
        factors: Long sides of the encoder's input, as multiples of the training side.
        limit: At most this many images.
        seed: Draws the images that a limit leaves; None takes the first.
        precision: Of the encoder.

    Returns:
        A row for each factor and variant.
    """
    predictors = {}
    for factor in factors:
        side = round(factor * sam.image_encoder.img_size)
        policy = ResolutionPolicy(mode="native", min_side=side, max_side=side)
        for name, ba_sam in variants.items():
            predictors[factor, side, name] = Predictor(
                sam, ba_sam=ba_sam, policy=policy, precision=precision
            )
    scores: dict[Any, list[tuple[float, float]]] = {key: [] for key in predictors}
    seconds: dict[Any, list[float]] = {key: [] for key in predictors}
    for index in _chosen(folder, limit, seed):
        scene = folder.scene(index)
        wanted = _masks(scene)
        prompts = [_by_box(tight_box(mask)) for mask in wanted]
        for key, predictor in predictors.items():
            started = time.perf_counter()
            embedding = predictor.embed(scene.image)
            seconds[key].append(time.perf_counter() - started)
            answers = _decode(predictor, embedding, prompts)
            scores[key] += [
                (iou(answer.masks[0], mask), boundary_iou(answer.masks[0], mask))
                for answer, mask in zip(answers, wanted, strict=True)
            ]
    rows = []
    for key in predictors:
        factor, side, name = key
        miou, mbiou = np.mean(scores[key], axis=0)
        rows.append(
            ResolutionRow(
                dataset=dataset,
                split=split,
                variant=name,
                size=side,
                factor=factor,
                objects=len(scores[key]),
                miou=round(float(miou), 4),
                mbiou=round(float(mbiou), 4),
                encode_ms=round(1000 * float(np.median(seconds[key])), 1),
            )
        )
    return rows


def plot_resolution(rows: Sequence[ResolutionRow], path: Path) -> None:
    """Draw IoU and boundary IoU over the size, a line a variant, into an image file.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot must have matplotlib, got an environment without it; pip install matplotlib"
        ) from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), ("miou", "mbiou"), ("IoU", "boundary IoU"), strict=True
    ):
        for variant in dict.fromkeys(row.variant for row in rows):
            line = sorted((r.factor, getattr(r, column)) for r in rows if r.variant == variant)
            axes.plot(*zip(*line, strict=True), marker="o", label=variant)
        axes.set(title=title, xlabel="long side / training side", xscale="log")
        factors = sorted({row.factor for row in rows})
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{rows[0].dataset} {rows[0].split}, tight boxes")
    figure.savefig(path)


def _chosen(folder: CocoFolder, limit: int | None, seed: int | None) -> list[int]:
    """Choose the images to measure, in the folder's order."""
    count = len(folder) if limit is None else min(limit, len(folder))
    if seed is None:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(len(folder))[:count].tolist())


def _masks(scene: Scene) -> list[NDArray[np.bool_]]:
    """Decode a scene's masks [H, W], those left out that hold no pixel."""
    masks = [scene.mask(index).astype(np.bool_) for index in range(len(scene.rles))]
    return [mask for mask in masks if mask.any()]


def _embed(predictor: Predictor, image: NDArray[np.uint8], crop: Crop | None) -> Embedding:
    return predictor.embed(image, crop=crop)


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


def print_rows(rows: Sequence[Row] | Sequence[ResolutionRow]) -> None:
    """Print rows as a table, whole even where the terminal is narrow or there is none."""
    table = Table(*asdict(rows[0]))
    for row in rows:
        table.add_row(*("" if v is None else str(v) for v in asdict(row).values()))
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, and write JSON where asked."""
    options = _parser().parse_args(arguments)
    sam = load_sam(
        options.model,
        weights_dir=options.weights_dir,
        device=resolve_device(options.device),
        progress=True,
    )
    folder = CocoFolder(
        options.data, splits=(options.split,), primary_only=options.primary, cache=False
    )
    model = Path(options.model).stem
    names = {"dataset": options.data.name, "split": options.split}
    rows: list[Row] | list[ResolutionRow]
    if options.table == "prompts":
        side = sam.image_encoder.img_size
        served = Predictor(
            sam, ba_sam=DEFAULT_BA_SAM, policy=default_policy(side), precision="auto"
        )
        rows = evaluate_prompts(
            {model: (Predictor(sam), None), f"{model} as served": (served, default_crops(side))},
            folder,
            **names,
            limit=options.limit,
            seed=options.seed,
        )
    else:
        rows = evaluate_resolution(
            sam,
            folder,
            **names,
            variants=ba_sam_variants(model, BaSamConfig(bias=options.bias, beta=options.beta)),
            factors=options.sizes,
            limit=options.limit,
            seed=options.seed,
            precision=options.precision,
        )
        if options.plot is not None:
            plot_resolution(rows, options.plot)
    print_rows(rows)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, required=True, help="folder of one COCO-format set")
    common.add_argument("--model", default="tiny", help="a name, or a checkpoint's path")
    common.add_argument("--split", default="test")
    common.add_argument("--primary", action="store_true", help="only annotations with primary == 1")
    common.add_argument("--limit", type=int, help="at most this many images")
    common.add_argument("--seed", type=int, help="draw these images; otherwise the first")
    common.add_argument("--device", default="auto")
    common.add_argument("--weights-dir", type=Path, default=Path("data/weights"))
    common.add_argument("--json", type=Path, help="write the rows to this file as well")
    parser = argparse.ArgumentParser(prog="python -m sam_ext.evaluate", description=__doc__)
    tables = parser.add_subparsers(dest="table", required=True)
    tables.add_parser("prompts", parents=[common], help="boxes and points against baselines")
    resolution = tables.add_parser(
        "resolution", parents=[common], help="image sizes, without and with BA-SAM"
    )
    resolution.add_argument(
        "--sizes",
        type=_factors,
        default=(0.5, 1.0, 1.5, 2.0, 4.0),
        metavar="0.5,1,...",
        help="long sides, as multiples of the training side",
    )
    resolution.add_argument(
        "--bias",
        choices=("full", "extrapolation", "stretch", "official"),
        default=DEFAULT_BA_SAM.bias,
    )
    resolution.add_argument("--beta", type=float, default=DEFAULT_BA_SAM.beta)
    resolution.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="of the encoder"
    )
    resolution.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table, too")
    return parser


def _factors(text: str) -> tuple[float, ...]:
    factors = tuple(float(part) for part in text.split(","))
    if min(factors) <= 0:
        raise ValueError
    return factors


if __name__ == "__main__":
    main()
