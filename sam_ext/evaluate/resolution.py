"""IoU by the size at which images are encoded, without and with BA-SAM."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sam_ext.ba_sam import DEFAULT_BA_SAM, BaSamConfig
from sam_ext.evaluate.common import (
    add_data_arguments,
    add_model_arguments,
    add_rows_argument,
    box_prompt,
    chosen_images,
    measured_key,
    new_figure,
    object_masks,
    open_folder,
    open_model,
)
from sam_ext.evaluate.records import RowFile
from sam_ext.image_encoder import Precision
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.predictor import Embedding, ObjectMasks, ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import Sam
from sam_ext.training.data import CocoFolder

__all__ = [
    "ResolutionRow",
    "add_arguments",
    "ba_sam_variants",
    "evaluate_resolution",
    "plot_resolution",
    "run",
]


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
    for index in chosen_images(folder, limit, seed):
        scene = folder.scene(index)
        wanted = object_masks(scene)
        prompts = [box_prompt(tight_box(mask)) for mask in wanted]
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
    figure = new_figure(9, 4)
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


def _decode(
    predictor: Predictor, embedding: Embedding, prompts: Sequence[ObjectPrompt], batch: int = 32
) -> list[ObjectMasks]:
    answers: list[ObjectMasks] = []
    for first in range(0, len(prompts), batch):
        answers += predictor.decode(embedding, prompts[first : first + batch])
    return answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_rows_argument(parser)
    parser.add_argument(
        "--sizes",
        type=_factors,
        default=(0.5, 1.0, 1.5, 2.0, 4.0),
        metavar="0.5,1,...",
        help="long sides, as multiples of the training side",
    )
    parser.add_argument(
        "--bias",
        choices=("full", "extrapolation", "stretch", "official"),
        default=DEFAULT_BA_SAM.bias,
    )
    parser.add_argument("--beta", type=float, default=DEFAULT_BA_SAM.beta)
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="auto", help="of the encoder"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table, too")


def run(options: argparse.Namespace) -> list[ResolutionRow]:
    """Measure as the command line says."""
    sam = open_model(options)
    variants = ba_sam_variants(
        Path(options.model).stem, BaSamConfig(bias=options.bias, beta=options.beta)
    )
    file, folder = RowFile(options.rows, ResolutionRow), open_folder(options)
    rows: list[ResolutionRow] = []
    for factor, (name, ba_sam) in itertools.product(options.sizes, variants.items()):
        key = measured_key(options, sam) | {
            "variant": name,
            "ba_sam": None if ba_sam is None else asdict(ba_sam),
            "factor": factor,
            "precision": options.precision,
        }
        measure = partial(
            evaluate_resolution,
            sam,
            folder,
            dataset=options.data.name,
            split=options.split,
            variants={name: ba_sam},
            factors=(factor,),
            limit=options.limit,
            seed=options.seed,
            precision=options.precision,
        )
        rows += file.get(key, measure)
    if options.plot is not None:
        plot_resolution(rows, options.plot)
    return rows


def _factors(text: str) -> tuple[float, ...]:
    factors = tuple(float(part) for part in text.split(","))
    if min(factors) <= 0:
        raise ValueError
    return factors
