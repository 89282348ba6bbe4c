"""What each way to adapt gains, by the number of images that it learns from."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from sam_ext.automatic import default_grid, generate_masks
from sam_ext.ba_sam import default_ba_sam
from sam_ext.checkpoints import find_stable_sam
from sam_ext.errors import ConfigError
from sam_ext.evaluate.common import (
    add_model_arguments,
    add_rows_argument,
    box_prompt,
    center_point,
    chosen_images,
    new_figure,
    object_masks,
    open_model,
    points_prompt,
    served_predictor,
)
from sam_ext.evaluate.records import RowFile, markdown_table
from sam_ext.evaluate.saliency import MapScores, map_scores
from sam_ext.interactive import answer_prompts, default_crops, default_refine, embed_once
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.lora import merge_lora
from sam_ext.metrics import boundary_iou, iou, tight_box
from sam_ext.prompt_free import answer_prompt_free
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam, load_stable_sam, training_plugin
from sam_ext.training.choice import choose_method
from sam_ext.training.data import CocoFolder
from sam_ext.training.finetune import (
    PROMPT_FREE_CHANCE,
    FinetuneConfig,
    FinetuneMethod,
    finetune,
)
from sam_ext.training.parts import five_and_five
from sam_ext.training.wesam import WesamConfig, adapt

__all__ = [
    "METHODS",
    "WESAM_VARIANTS",
    "AdaptationRow",
    "AnswerScore",
    "Supervision",
    "add_arguments",
    "evaluate_adaptation",
    "markdown",
    "measure",
    "measure_without_prompts",
    "plot_adaptation",
    "run",
    "weak_images",
]

Supervision = Literal["box", "point", "coarse", "none"]

_LEAST_TOLERANCE_PX, _TOLERANCE = 3.0, 0.05  # of a rough mask's polygon

_SERVED_METHODS = ("direct", "wesam", "lora", "sam-adapter", "auto")

WESAM_VARIANTS: dict[str, Callable[[WesamConfig], WesamConfig]] = {
    "wesam": lambda config: config,
    "supervised": lambda config: replace(config, targets="masks"),
    "no self-training": lambda config: replace(
        config, focal_weight=0.0, dice_weight=0.0, iou_weight=0.0
    ),
    "no anchor": lambda config: replace(config, anchor_weight=0.0),
    "no contrast": lambda config: replace(config, contrastive_weight=0.0),
    "no projection": lambda config: replace(config, projection_weight=0.0),
    "no colours": lambda config: replace(config, pairwise_weight=0.0),
    "no trust": lambda config: replace(config, trust=1.0),
    "hard targets": lambda config: replace(config, sharpness=math.inf),
    "no correction": lambda config: replace(config, correct_pseudo_masks=False),
    "no loose prompts": lambda config: replace(config, loose_prompts=0.0),
    "no box of points": lambda config: replace(config, box_of_points=False),
    "as published": lambda config: _as_published(config),
    "as published but no anchor": lambda config: replace(_as_published(config), anchor_weight=0.0),
}
"""WeSAM as it is, on the true masks in the teacher's place, and with one part switched off; `as
published` has the source's weights and nothing that is not in it."""


def _as_published(config: WesamConfig) -> WesamConfig:
    return replace(
        config,
        focal_weight=20.0,
        contrastive_weight=1.0,
        strong_chance=0.5,
        sharpness=math.inf,
        trust=1.0,
        projection_weight=0.0,
        pairwise_weight=0.0,
        correct_pseudo_masks=False,
        loose_prompts=0.0,
        box_of_points=False,
    )


METHODS = tuple(dict.fromkeys((*_SERVED_METHODS, *WESAM_VARIANTS)))
"""What is compared: the model as it is; WeSAM on weak labels; LoRA and SAM-Adapter on full masks;
what `choose_method` takes when all masks are there; and the rest of `WESAM_VARIANTS`."""


@dataclass(frozen=True, kw_only=True)
class AdaptationRow:
    """One line of the table."""

    dataset: str
    split: str
    method: str
    """One of `METHODS`."""
    trained: str | None
    """The same, or what `auto` chose; None for the model as it is."""
    labels: str | None
    """What the training images' labels were; None without training."""
    images: int
    """How many images were learnt from."""
    seed: int
    prompt: str
    """How the objects of the test images were asked for: the tight box; the point farthest from the
    outline; five points inside and five outside; or not at all: `nothing` is the prompt-free mode,
    measured with the objects' union, and `grid` the union of automatic masks."""
    objects: int
    """What the means are over: objects, or images where nothing was asked for."""
    miou: float
    """Mean of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""
    s_measure: float | None
    """Of maps without prompt, as `MapScores` has it; so the next three."""
    e_measure: float | None
    weighted_f: float | None
    mae: float | None
    train_s: float
    """Seconds of training."""


def weak_images(
    folder: CocoFolder,
    indexes: Sequence[int],
    supervision: Supervision | Literal["masks"],
    *,
    seed: int,
) -> list[LabelledImage]:
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
        LabelledImage(
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


def _weak_object(
    mask: NDArray[np.bool_], supervision: str, rng: np.random.Generator
) -> LabelledObject:
    nothing = LabelledObject(
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


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """One answer, measured."""

    iou: float
    boundary_iou: float
    maps: MapScores | None = None


def measure(
    sam: Sam,
    folder: CocoFolder,
    indexes: Sequence[int],
    *,
    seed: int,
    stable_sam: StableSam | None = None,
) -> dict[str, list[AnswerScore]]:
    """Ask a model for every object as it is served, in three ways.

    Args:
        sam: Of plain modules.
        folder: The images and masks.
        indexes: Which images.
        seed: Draws the points.
        stable_sam: The plugin that it is served with.

    Returns:
        How every object was answered, by prompt.
    """
    predictor = served_predictor(sam, stable_sam)
    scores: defaultdict[str, list[AnswerScore]] = defaultdict(list)
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
                refine=default_refine(predictor.image_size),
            )
            scores[name] += [
                AnswerScore(
                    iou=iou(answer.mask, mask), boundary_iou=boundary_iou(answer.mask, mask)
                )
                for answer, mask in zip(answers, wanted, strict=True)
            ]
    return scores


def measure_without_prompts(
    sam: Sam,
    folder: CocoFolder,
    indexes: Sequence[int],
    *,
    has_mode: bool,
    stable_sam: StableSam | None = None,
) -> dict[str, list[AnswerScore]]:
    """Hold what a model finds without prompts against the union of each image's objects.

    Args:
        sam: Of plain modules.
        folder: The images and masks; images without objects are left out.
        indexes: Which images.
        has_mode: Whether the model was trained to answer without prompts; otherwise the union of
            its automatic masks is taken.
        stable_sam: The plugin that it is served with.

    Returns:
        How every image was answered, under `nothing` or `grid`.
    """
    predictor = served_predictor(sam, stable_sam)
    scores: list[AnswerScore] = []
    for index in indexes:
        scene = folder.scene(index)
        masks = object_masks(scene)
        if not masks:
            continue
        wanted = np.logical_or.reduce(masks)
        embedding = predictor.embed(scene.image)
        if has_mode:
            answer = answer_prompt_free(predictor, embedding)
            mask, probabilities = answer.mask, answer.probabilities
        else:
            grid = default_grid(predictor.image_size)
            found = [one.mask for one in generate_masks(predictor, embedding, **grid)]
            mask = np.logical_or.reduce([np.zeros_like(wanted), *found])
            probabilities = mask
        scores.append(
            AnswerScore(
                iou=iou(mask, wanted),
                boundary_iou=boundary_iou(mask, wanted),
                maps=map_scores(probabilities, wanted),
            )
        )
    return {"nothing" if has_mode else "grid": scores}


def evaluate_adaptation(
    sam: Sam,
    train: CocoFolder,
    test: CocoFolder,
    *,
    wesam: WesamConfig,
    finetuning: FinetuneConfig,
    dataset: str,
    split: str,
    supervision: Supervision,
    methods: Sequence[str] = _SERVED_METHODS,
    images: Sequence[int | None] = (None,),
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    stable_sam: StableSam | None = None,
    file: RowFile[AdaptationRow] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[AdaptationRow]:
    """Adapt a model in several ways, and measure each as it would be served.

    Args:
        sam: The model; it is not changed.
        train: The images to adapt to; WeSAM only sees their masks through `supervision`.
        test: The images to measure on.
        wesam: The adaptation to weak labels; its seed and prompts are set here.
        finetuning: The adaptation to full masks; its seed and method are set here.
        dataset: Name in the rows.
        split: Name in the rows.
        supervision: What the training images' labels are for WeSAM.
        methods: Some of `METHODS`.
        images: Numbers of images to adapt to, each of which holds the smaller ones'; None is all.
        seeds: Of the weak labels, of the choice of training images, and of the training.
        limit: At most this many images to measure on, the same ones for every seed.
        stable_sam: The plugin that the model is served with, adapted or not.
        file: What is there is not trained and measured again; None keeps nothing.
        on_progress: Told what was done, in a line of text.

    Returns:
        A row for each seed, number of images, method and prompt; none of them twice.

    Raises:
        ConfigError: If a method is none of `METHODS`.
    """
    if unknown := set(methods) - set(METHODS):
        raise ConfigError(f"methods must be among {', '.join(METHODS)}, got {unknown.pop()!r}")
    bench = _Bench(
        sam=sam,
        train=train,
        test=test,
        wesam=wesam,
        finetuning=finetuning,
        dataset=dataset,
        split=split,
        supervision=supervision,
        limit=limit,
        stable_sam=stable_sam,
        file=file or RowFile(None, AdaptationRow),
        on_progress=on_progress or (lambda line: None),
    )
    rows: dict[AdaptationRow, None] = {}
    for seed, count, method in itertools.product(seeds, images, methods):
        rows |= dict.fromkeys(bench.rows(method, count, seed))
    return list(rows)


class _Training(NamedTuple):
    """One training."""

    method: str
    """One of `METHODS`, and not `auto`."""
    labels: Supervision | Literal["masks"] | None
    images: Sequence[int]
    config: WesamConfig | FinetuneConfig | None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """What `evaluate_adaptation` was asked for."""

    sam: Sam
    train: CocoFolder
    test: CocoFolder
    wesam: WesamConfig
    finetuning: FinetuneConfig
    dataset: str
    split: str
    supervision: Supervision
    limit: int | None
    stable_sam: StableSam | None
    file: RowFile[AdaptationRow]
    on_progress: Callable[[str], None]

    def rows(self, method: str, count: int | None, seed: int) -> tuple[AdaptationRow, ...]:
        """Look up what a method reached, or train and measure."""
        chosen = chosen_images(self.train, count, seed)
        if method == "auto":
            training = self._chosen(chosen, seed)
        else:
            training = self._training(method, chosen, seed)
        # `auto` may have what it chose from there, under that name.
        own = self._key(training.method, training, seed)
        measured = partial(self.file.get, own, partial(self._measured, training, seed))
        if method != "auto":
            return measured()
        return self.file.get(
            self._key(method, training, seed),
            lambda: [replace(row, method="auto") for row in measured()],
        )

    def _chosen(self, chosen: Sequence[int], seed: int) -> _Training:
        """Let `choose_method` choose, as for a project all of whose objects have full masks."""
        objects = sum(len(object_masks(self.train.scene(index))) for index in chosen)
        method, _ = choose_method(images=len(chosen), objects=objects, masks=objects)
        if method == "wesam":  # which then takes them for rough ones
            return _Training(method, "masks", chosen, replace(self.wesam, seed=seed))
        return self._training(method, chosen, seed)

    def _key(self, method: str, training: _Training, seed: int) -> dict[str, Any]:
        return {
            "model": served_predictor(self.sam, self.stable_sam).fingerprint,
            "dataset": self.dataset,
            "split": self.split,
            "limit": self.limit,
            "method": method,
            "trained": training.method,
            "labels": training.labels,
            "images": list(training.images),
            "learnt": self.train.digest(training.images),
            "measured": self.test.digest(chosen_images(self.test, self.limit, 0)),
            "seed": seed,
            "config": None if training.config is None else asdict(training.config),
        }

    def _training(self, method: str, chosen: Sequence[int], seed: int) -> _Training:
        if method == "direct":
            return _Training(method, None, (), None)
        if method in get_args(FinetuneMethod):
            finetuning = replace(self.finetuning, method=cast(FinetuneMethod, method), seed=seed)
            return _Training(method, "masks", chosen, finetuning)
        config = WESAM_VARIANTS[method](replace(self.wesam, seed=seed, prompts=self.supervision))
        if config.targets == "teacher":
            return _Training(method, self.supervision, chosen, config)
        # Full supervision learns masks, and is asked as the weak labels would be.
        asked: Literal["box", "point"] = "point" if self.supervision == "point" else "box"
        return _Training(method, "masks", chosen, replace(config, prompts=asked))

    def _measured(self, training: _Training, seed: int) -> list[AdaptationRow]:
        started = time.monotonic()
        model, has_mode = self._trained(training, seed)
        train_s = time.monotonic() - started
        measured = chosen_images(self.test, self.limit, 0)
        scores = measure(model, self.test, measured, seed=seed, stable_sam=self.stable_sam)
        if has_mode or training.method == "direct":
            scores |= measure_without_prompts(
                model, self.test, measured, has_mode=has_mode, stable_sam=self.stable_sam
            )
        rows = [
            AdaptationRow(
                dataset=self.dataset,
                split=self.split,
                method=training.method,
                trained=None if training.config is None else training.method,
                labels=training.labels,
                images=len(training.images),
                seed=seed,
                prompt=prompt,
                objects=len(answers),
                train_s=round(train_s, 1),
                **_means(answers),
            )
            for prompt, answers in scores.items()
        ]
        reached = ", ".join(f"{row.prompt} {row.miou:.3f}" for row in rows)
        labels = f" from {training.labels}" if training.labels else ""
        self.on_progress(
            f"{self.dataset}, {training.method}{labels}, images {len(training.images)}, "
            f"seed {seed}: {reached} ({train_s:.0f} s training, "
            f"{time.monotonic() - started - train_s:.0f} s measuring)"
        )
        return rows

    def _trained(self, training: _Training, seed: int) -> tuple[Sam, bool]:
        """Give the model of plain modules, and say whether it answers without prompts."""
        config, plugin = training.config, training_plugin(self.stable_sam)
        if config is None or training.labels is None:
            return self.sam, False
        images = weak_images(self.train, training.images, training.labels, seed=seed)
        if isinstance(config, FinetuneConfig):
            tuned = finetune(self.sam, images, config, stable_sam=plugin)
            return merge_lora(tuned), config.prompt_free_chance > 0
        return merge_lora(adapt(self.sam, images, config, stable_sam=plugin)), False


def _means(answers: Sequence[AnswerScore]) -> dict[str, Any]:
    """Average over answers, of one kind of prompt."""
    maps = [asdict(one.maps) for one in answers if one.maps is not None]
    return {
        "miou": round(float(np.mean([one.iou for one in answers])), 4),
        "mbiou": round(float(np.mean([one.boundary_iou for one in answers])), 4),
        **{
            field.name: round(float(np.mean([one[field.name] for one in maps])), 4)
            if maps
            else None
            for field in fields(MapScores)
        },
    }


def markdown(rows: Sequence[AdaptationRow]) -> str:
    """Write two tables as Markdown, of means over seeds: objects asked for, and images not."""
    asked = [row for row in rows if row.mae is None]
    columns = list(dict.fromkeys(_column(row) for row in asked))
    lines: list[dict[str, Any]] = []
    for place in dict.fromkeys((row.dataset, row.split, row.prompt) for row in asked):
        here = [row for row in asked if (row.dataset, row.split, row.prompt) == place]
        for count in sorted({row.images for row in here if row.images}) or [0]:
            seen = [row for row in here if row.images in (0, count)]
            names = dict(zip(("dataset", "split", "prompt"), place, strict=True))
            cells = {name: _cell([r for r in seen if _column(r) == name]) for name in columns}
            lines.append(names | {"images": count} | cells)
    unasked: defaultdict[tuple[Any, ...], list[AdaptationRow]] = defaultdict(list)
    for row in rows:
        if row.mae is not None:
            found = (row.dataset, row.split, row.images, _column(row), row.prompt)
            unasked[found].append(row)
    maps = [
        dict(zip(("dataset", "split", "images", "method", "prompt"), found, strict=True))
        | {
            name: f"{np.mean([getattr(row, name) for row in same]):.3f}"
            for name in ("miou", "s_measure", "e_measure", "weighted_f", "mae")
        }
        for found, same in unasked.items()
    ]
    return "\n".join(markdown_table(table) for table in (lines, maps) if table)


def _column(row: AdaptationRow) -> str:
    return row.method if row.labels is None else f"{row.method} ({row.labels})"


def _cell(rows: Sequence[AdaptationRow]) -> str | None:
    """Write the mean IoU of one method's rows, and what it was if `auto` chose it."""
    if not rows:
        return None
    chosen = {row.trained for row in rows if row.method == "auto" and row.trained}
    return " ".join([f"{np.mean([row.miou for row in rows]):.3f}", *sorted(chosen)])


def plot_adaptation(rows: Sequence[AdaptationRow], path: Path) -> None:
    """Draw IoU into an image file, the mean over seeds: a panel for each set and kind of prompt.

    Over the number of training images, a line a method; a bar each where there is one number only.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    places = list(dict.fromkeys((row.dataset, row.split) for row in rows))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    methods = list(dict.fromkeys(_column(row) for row in rows))
    figure = new_figure(3.2 * len(kinds) + 1.6, 2.8 * len(places) + 0.4)
    panels = figure.subplots(len(places), len(kinds), squeeze=False, sharey="row")
    for place, line in zip(places, panels, strict=True):
        here = [row for row in rows if (row.dataset, row.split) == place]
        for kind, axes in zip(kinds, line, strict=True):
            _draw_panel(axes, [row for row in here if _kind(row) == kind], methods)
            axes.set(title=kind if axes in panels[0] else "")
        line[0].set(ylabel=f"{' '.join(place)}\nIoU")
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, fontsize=8, loc="outside right upper")
    figure.savefig(path)


def _draw_panel(axes: Any, rows: Sequence[AdaptationRow], methods: Sequence[str]) -> None:
    """Draw one set's rows of one kind of prompt; each method has its colour in all panels."""
    counts = sorted({row.images for row in rows if row.images}) or [0]
    for place, method in enumerate(methods):
        reached = {
            count: [row.miou for row in rows if _column(row) == method and row.images in (0, count)]
            for count in counts
        }
        known = [count for count in counts if reached[count]]
        heights = [float(np.mean(reached[count])) for count in known]
        look = {"label": method, "color": f"C{place}"}
        if len(counts) > 1:
            style = "--" if method == "direct" else "-"
            axes.plot(known, heights, style, marker="o", markersize=4, **look)
        else:
            axes.bar([place] * len(known), heights, **look)
    if len(counts) > 1:
        axes.set(xscale="log", xlabel="training images")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
    else:
        axes.set_xticks([])
    axes.grid(axis="y", alpha=0.3)


def _kind(row: AdaptationRow) -> str:
    return "without prompt" if row.prompt in ("nothing", "grid") else row.prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    add_rows_argument(parser)
    parser.add_argument(
        "--train", type=Path, required=True, help="folder of the COCO-format set to adapt to"
    )
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test", type=Path, required=True, help="folder of the set to measure on")
    parser.add_argument("--split", default="test", help="of the set to measure on")
    parser.add_argument(
        "--methods",
        type=_names,
        default=_SERVED_METHODS,
        metavar="NAME,...",
        help=f"some of: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--supervision",
        choices=get_args(Supervision),
        default="box",
        help="what the labels are that WeSAM gets; LoRA and SAM-Adapter get the masks",
    )
    parser.add_argument(
        "--images",
        type=_counts,
        default=(None,),
        metavar="10,30,all",
        help="how many images to adapt to; several make a line of the plot",
    )
    parser.add_argument("--seeds", type=_numbers, default=(0,), metavar="0,1,...")
    parser.add_argument("--steps", type=int, help="of each training; by default as for a project")
    parser.add_argument(
        "--prompt-free",
        type=float,
        default=PROMPT_FREE_CHANCE,
        metavar="CHANCE",
        help="how often LoRA and SAM-Adapter learn to answer without a prompt; 0: not at all",
    )
    parser.add_argument("--limit", type=int, help="at most this many images to measure on")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table, too")


def run(options: argparse.Namespace) -> list[AdaptationRow]:
    """Measure as the command line says."""
    sam = open_model(options)
    plugin = find_stable_sam(options.model, weights_dir=options.weights_dir)
    stable_sam = None
    if plugin is not None:
        stable_sam = load_stable_sam(plugin, base=weights_fingerprint(sam))
    ba_sam = default_ba_sam(sam.image_encoder.img_size)
    console = Console(stderr=True)
    rows = evaluate_adaptation(
        sam,
        CocoFolder(options.train, splits=(options.train_split,)),
        CocoFolder(options.test, splits=(options.split,)),
        wesam=WesamConfig(steps=options.steps, ba_sam=ba_sam),
        finetuning=FinetuneConfig(
            steps=options.steps, ba_sam=ba_sam, prompt_free_chance=options.prompt_free
        ),
        dataset=options.test.name,
        split=options.split,
        supervision=options.supervision,
        methods=options.methods,
        images=options.images,
        seeds=options.seeds,
        limit=options.limit,
        stable_sam=stable_sam,
        file=RowFile(options.rows, AdaptationRow),
        on_progress=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    if options.plot is not None:
        plot_adaptation(rows, options.plot)
    return rows


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _counts(text: str) -> tuple[int | None, ...]:
    counts = tuple(None if part.strip() == "all" else int(part) for part in text.split(","))
    if any(count is not None and count < 1 for count in counts):
        raise ValueError
    return counts
