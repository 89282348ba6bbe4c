"""What WeSAM gains from weak labels, against no adaptation and full supervision."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from sam_ext.ba_sam import default_ba_sam
from sam_ext.checkpoints import find_stable_sam
from sam_ext.errors import ConfigError
from sam_ext.evaluate.common import (
    add_model_arguments,
    box_prompt,
    center_point,
    chosen_images,
    new_figure,
    object_masks,
    open_model,
    points_prompt,
    served_predictor,
)
from sam_ext.interactive import answer_prompts, default_crops, embed_once
from sam_ext.lora import merge_lora
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam, load_stable_sam
from sam_ext.training.data import CocoFolder
from sam_ext.training.parts import five_and_five
from sam_ext.training.weak import WeakImage, WeakObject
from sam_ext.training.wesam import WesamConfig, adapt

__all__ = [
    "VARIANTS",
    "AdaptationRow",
    "Supervision",
    "add_arguments",
    "evaluate_adaptation",
    "measure",
    "plot_adaptation",
    "run",
    "weak_images",
]

Supervision = Literal["box", "point", "coarse", "none"]

_LEAST_TOLERANCE_PX, _TOLERANCE = 3.0, 0.05  # of a rough mask's polygon

VARIANTS: dict[str, Callable[[WesamConfig], WesamConfig] | None] = {
    "direct": None,
    "adapted": lambda config: config,
    "supervised": lambda config: replace(config, targets="masks"),
    "no self-training": lambda config: replace(
        config, focal_weight=0.0, dice_weight=0.0, iou_weight=0.0
    ),
    "no anchor": lambda config: replace(config, anchor_weight=0.0),
    "no contrast": lambda config: replace(config, contrastive_weight=0.0),
    "no projection": lambda config: replace(config, projection_weight=0.0),
    "no correction": lambda config: replace(config, correct_pseudo_masks=False),
    "no loose prompts": lambda config: replace(config, loose_prompts=0.0),
    "no box of points": lambda config: replace(config, box_of_points=False),
    "as published": lambda config: replace(
        config,
        focal_weight=20.0,
        contrastive_weight=1.0,
        strong_chance=0.5,
        projection_weight=0.0,
        correct_pseudo_masks=False,
        loose_prompts=0.0,
        box_of_points=False,
    ),
}
"""What is compared: the model as it is, adapted, trained on the true masks, and adapted with one
part switched off; `as published` has the source's weights and nothing that is not in it."""


@dataclass(frozen=True, kw_only=True)
class AdaptationRow:
    """One line of the table."""

    dataset: str
    split: str
    supervision: str
    """What the training images' labels were."""
    variant: str
    """One of `VARIANTS`."""
    seed: int
    prompt: str
    """How the objects of the test images were asked for: the tight box; the point farthest from the
    outline; or five points inside and five outside."""
    objects: int
    miou: float
    """Mean over objects of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""


def weak_images(
    folder: CocoFolder,
    indexes: Sequence[int],
    supervision: Supervision | Literal["masks"],
    *,
    seed: int,
) -> list[WeakImage]:
    """Make weak labels of a folder's masks.

    Args:
        folder: The images and masks.
        indexes: Which images.
        supervision: The tight box; five points inside and five outside of the mask, drawn evenly
            once; a polygon with few corners; nothing; or the mask itself (`masks`).
        seed: Draws the points.

    Source:
        Zhang et al., arXiv:2312.03502, and its code for the numbers.
    """
    return [
        WeakImage(
            name=folder.file(index).name,
            read=partial(_read, folder, index),
            objects=()
            if supervision == "none"
            else tuple(
                _weak_object(mask, supervision, np.random.default_rng((seed, index, number)))
                for number, mask in enumerate(object_masks(folder.scene(index)))
            ),
        )
        for index in indexes
    ]


def _read(folder: CocoFolder, index: int) -> NDArray[np.uint8]:
    return folder.scene(index).image


def _weak_object(mask: NDArray[np.bool_], supervision: str, rng: np.random.Generator) -> WeakObject:
    nothing = WeakObject(
        label="object",
        box_xyxy=tight_box(mask),
        point_coords=np.zeros((0, 2)),
        point_labels=np.zeros(0, np.int64),
        mask=None,
    )
    if supervision == "box":
        return nothing
    if supervision == "point":
        prompt = five_and_five(mask, rng)
        return replace(
            nothing,
            box_xyxy=None,
            point_coords=prompt.point_coords,
            point_labels=prompt.point_labels,
        )
    rough = mask if supervision == "masks" else _rough_mask(mask)
    return replace(nothing, box_xyxy=None, mask=rough)


def _rough_mask(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fit a polygon of few corners to a mask's largest piece, and fill it."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)
    tolerance = max(_LEAST_TOLERANCE_PX, _TOLERANCE * cv2.arcLength(contour, True))
    filled = np.zeros(mask.shape, np.uint8)
    cv2.fillPoly(filled, [cv2.approxPolyDP(contour, tolerance, True)], 1)
    rough: NDArray[np.bool_] = filled.astype(np.bool_)
    return rough if rough.any() else mask


def measure(
    sam: Sam,
    folder: CocoFolder,
    indexes: Sequence[int],
    *,
    seed: int,
    stable_sam: StableSam | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Ask a model for every object as it is served, in three ways.

    Args:
        sam: Of plain modules.
        folder: The images and masks.
        indexes: Which images.
        seed: Draws the points.
        stable_sam: The plugin that it is served with.

    Returns:
        IoU and boundary IoU of every object, by prompt.
    """
    predictor = served_predictor(sam, stable_sam)
    scores: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in indexes:
        scene = folder.scene(index)
        wanted = object_masks(scene)
        drawn = {
            "box": [box_prompt(tight_box(mask)) for mask in wanted],
            "point": [points_prompt(center_point(mask)[None]) for mask in wanted],
            "5+5 points": [
                five_and_five(mask, np.random.default_rng((seed, index, number, 1)))
                for number, mask in enumerate(wanted)
            ],
        }
        embed = embed_once(predictor, scene.image)
        for name, prompts in drawn.items():
            answers = answer_prompts(
                predictor,
                prompts,
                image_hw=(scene.image.shape[0], scene.image.shape[1]),
                embed=embed,
                crops=default_crops(predictor.image_size),
            )
            scores[name] += [
                (iou(answer.mask, mask), boundary_iou(answer.mask, mask))
                for answer, mask in zip(answers, wanted, strict=True)
            ]
    return scores


def evaluate_adaptation(
    sam: Sam,
    train: CocoFolder,
    test: CocoFolder,
    config: WesamConfig,
    *,
    dataset: str,
    split: str,
    supervision: Supervision,
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0,),
    train_limit: int | None = None,
    limit: int | None = None,
    stable_sam: StableSam | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[AdaptationRow]:
    """Adapt a model in several ways, and measure each as it would be served.

    Args:
        sam: The model; it is not changed.
        train: The images to adapt to; their masks are only seen through `supervision`.
        test: The images to measure on.
        config: The adaptation; its seed and prompts are set here.
        dataset: Name in the rows.
        split: Name in the rows.
        supervision: What the training images' labels are.
        variants: Some of `VARIANTS`.
        seeds: Of the weak labels, of the training images that a limit leaves, and of the training.
        train_limit: At most this many images to adapt to.
        limit: At most this many images to measure on, the same ones for every seed.
        stable_sam: The plugin that the model is served with, adapted or not.
        on_progress: Told what was done, in a line of text.

    Returns:
        A row for each seed, variant and prompt.

    Raises:
        ConfigError: If a variant is none of `VARIANTS`.
    """
    if unknown := set(variants) - set(VARIANTS):
        raise ConfigError(f"variants must be among {', '.join(VARIANTS)}, got {unknown.pop()!r}")
    measured = chosen_images(test, limit, 0)
    rows = []
    for seed in seeds:
        chosen = chosen_images(train, train_limit, seed)
        for variant in variants:
            started = time.monotonic()
            change = VARIANTS[variant]
            model = sam
            if change is not None:
                changed = change(replace(config, seed=seed))
                task = _task(train, chosen, supervision, changed)
                model = merge_lora(adapt(sam, *task, stable_sam=stable_sam))
            trained = time.monotonic() - started
            scores = measure(model, test, measured, seed=seed, stable_sam=stable_sam)
            for prompt, values in scores.items():
                miou, mbiou = np.mean(values, axis=0)
                rows.append(
                    AdaptationRow(
                        dataset=dataset,
                        split=split,
                        supervision=supervision,
                        variant=variant,
                        seed=seed,
                        prompt=prompt,
                        objects=len(values),
                        miou=round(float(miou), 4),
                        mbiou=round(float(mbiou), 4),
                    )
                )
            if on_progress is not None:
                reached = ", ".join(f"{r.prompt} {r.miou:.3f}" for r in rows[-len(scores) :])
                on_progress(
                    f"{dataset} {supervision}, {variant}, seed {seed}: {reached} "
                    f"({trained:.0f} s training, {time.monotonic() - started - trained:.0f} s "
                    "measuring)"
                )
    return rows


def _task(
    folder: CocoFolder, chosen: Sequence[int], supervision: Supervision, config: WesamConfig
) -> tuple[list[WeakImage], WesamConfig]:
    """Make the labels that a run needs: with full supervision masks, asked for as otherwise."""
    if config.targets == "teacher":
        images = weak_images(folder, chosen, supervision, seed=config.seed)
        return images, replace(config, prompts=supervision)
    images = weak_images(folder, chosen, "masks", seed=config.seed)
    return images, replace(config, prompts="point" if supervision == "point" else "box")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--train", type=Path, help="folder of the COCO-format set to adapt to")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test", type=Path, help="folder of the set to measure on")
    parser.add_argument("--split", default="test", help="of the set to measure on")
    parser.add_argument("--supervision", choices=get_args(Supervision), default="box")
    parser.add_argument("--variants", type=_names, default=tuple(VARIANTS), metavar="NAME,...")
    parser.add_argument("--seeds", type=_numbers, default=(0,), metavar="0,1,...")
    parser.add_argument("--steps", type=int, help="of each training; by default as for a project")
    parser.add_argument("--train-limit", type=int, help="at most this many images to adapt to")
    parser.add_argument("--limit", type=int, help="at most this many images to measure on")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table, too")


def run(options: argparse.Namespace) -> list[AdaptationRow]:
    """Measure as the command line says."""
    sam = open_model(options)
    plugin = find_stable_sam(options.model, weights_dir=options.weights_dir)
    stable_sam = None
    if plugin is not None:
        stable_sam = load_stable_sam(plugin, base=weights_fingerprint(sam))
    console = Console(stderr=True)
    rows = evaluate_adaptation(
        sam,
        CocoFolder(options.train, splits=(options.train_split,)),
        CocoFolder(options.test, splits=(options.split,)),
        WesamConfig(steps=options.steps, ba_sam=default_ba_sam(sam.image_encoder.img_size)),
        dataset=options.test.name,
        split=options.split,
        supervision=options.supervision,
        variants=options.variants,
        seeds=options.seeds,
        train_limit=options.train_limit,
        limit=options.limit,
        stable_sam=stable_sam,
        on_progress=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    if options.plot is not None:
        plot_adaptation(rows, options.plot)
    return rows


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def plot_adaptation(rows: Sequence[AdaptationRow], path: Path) -> None:
    """Draw a bar for each variant and prompt, the mean over seeds, into an image file.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    variants = list(dict.fromkeys(row.variant for row in rows))
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    figure = new_figure(3 + len(variants), 4)
    axes = figure.subplots()
    width = 0.8 / len(prompts)
    for number, prompt in enumerate(prompts):
        heights = [
            float(np.mean([r.miou for r in rows if (r.variant, r.prompt) == (variant, prompt)]))
            for variant in variants
        ]
        places = np.arange(len(variants)) + (number - (len(prompts) - 1) / 2) * width
        axes.bar(places, heights, width, label=prompt)
    axes.set_xticks(range(len(variants)), variants, rotation=20, ha="right")
    axes.set(ylabel="IoU", title=f"{rows[0].dataset} {rows[0].split}, {rows[0].supervision} labels")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path)
