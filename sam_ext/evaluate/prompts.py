"""IoU, boundary IoU and stability by the kind and quality of the prompt, against baselines."""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from sam_ext.checkpoints import find_stable_sam
from sam_ext.errors import ConfigError
from sam_ext.evaluate.common import (
    add_data_arguments,
    add_model_arguments,
    add_rows_argument,
    box_prompt,
    center_point,
    chosen_images,
    measured_key,
    new_figure,
    object_masks,
    open_folder,
    open_model,
    points_prompt,
    served_predictor,
)
from sam_ext.evaluate.records import RowFile
from sam_ext.interactive import (
    Answer,
    CropPolicy,
    answer_prompts,
    default_crops,
    default_refine,
    embed_once,
)
from sam_ext.metrics import (
    boundary_iou,
    calibration_error,
    ellipse_in_box,
    iou,
    rectangle_mask,
    stability,
    tight_box,
)
from sam_ext.predictor import Crop, Embedding, ObjectPrompt, Predictor
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import PluginScope, StableSam, load_stable_sam
from sam_ext.training.data import CocoFolder
from sam_ext.training.robust import noisy_boxes

__all__ = [
    "PROMPTS",
    "ContactSheet",
    "PromptRow",
    "Variant",
    "add_arguments",
    "evaluate_prompts",
    "plot_prompts",
    "run",
]

_Mask = NDArray[np.bool_]
_BOX_NOISE = {"box, noise 0.1": 0.1, "box, noise 0.2": 0.2, "box, noise 0.4": 0.4}
_POINTS = {"1 point": 1, "3 points": 3, "5 points": 5}
_TIGHT, _CENTER = "tight box", "center point"
_ORACLE = f"{_CENTER}, best candidate"

PROMPTS = (_TIGHT, *_BOX_NOISE, *_POINTS, _CENTER)
"""The tight box; boxes with noise of `noisy_boxes`; points drawn evenly from the object; and the
point farthest from its outline, which is also answered by the best of what it was chosen from."""

_SHEET_PROMPTS: dict[PluginScope, tuple[str, ...]] = {
    "all": ("box, noise 0.4", "1 point"),
    "points": ("3 points", "5 points"),
}
"""Where a plugin is to be looked at, by what it is for."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One line of the table by prompt."""

    dataset: str
    split: str
    variant: str
    """What answered: the model by itself (SAM's square, no crops), with a plugin, as served, or a
    baseline, which takes the drawn box itself, or the ellipse in it, as the mask."""
    prompt: str
    objects: int
    miou: float
    """Mean over objects, and draws of their prompts, of the IoU in the image's own pixels."""
    mbiou: float
    """The same of the boundary IoU."""
    stability: float | None
    """Mean over objects of `stability` over the draws; None where a prompt is not drawn."""
    routing: float | None
    """Mean of how much was read from shifted places; None without a plugin."""
    iou_error: float | None
    """Mean absolute difference of the predicted IoU and the real one; None for baselines."""
    calibration_error: float | None
    """The same of their means over masks of like predictions, as `calibration_error` has it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Variant:
    """A model, and how it is asked."""

    predictor: Predictor
    crops: CropPolicy | None = None
    """When it looks at crops."""
    refine: bool = False
    """Whether several points are answered click upon click, as `answer_prompts` takes it."""


@dataclass
class _Scores:
    iou: list[float]
    boundary_iou: list[float]
    stability: list[float]
    routing: list[float]
    predicted: list[float]
    """One for each IoU; none for baselines."""


def evaluate_prompts(
    variants: Mapping[str, Variant],
    folder: CocoFolder,
    *,
    dataset: str,
    split: str,
    prompts: Sequence[str] = PROMPTS,
    draws: int = 3,
    limit: int | None = None,
    seed: int | None = None,
    sheet: ContactSheet | None = None,
) -> list[PromptRow]:
    """Prompt every object in several ways, and compare the answers with it.

    Every variant gets the same prompts. What is drawn depends on `draws` and the image alone.

    Args:
        variants: The models, by name in the rows.
        folder: The images and masks.
        dataset: Name in the rows.
        split: Name in the rows.
        prompts: Some of `PROMPTS`.
        draws: How often each noisy box and each set of points is drawn anew.
        limit: At most this many images.
        seed: Which images a limit leaves, as `chosen_images` takes it.
        sheet: Shown the answers of the first and the last variant.

    Returns:
        For each prompt rows of the baselines, where it is a box, and of the variants.

    Raises:
        ConfigError: If a prompt is none of `PROMPTS`, or no object is left to measure.
    """
    if unknown := set(prompts) - set(PROMPTS):
        raise ConfigError(f"prompts must be among {', '.join(PROMPTS)}, got {unknown.pop()}")
    scores: defaultdict[tuple[str, str], _Scores] = defaultdict(lambda: _Scores([], [], [], [], []))
    for index in chosen_images(folder, limit, seed):
        scene = folder.scene(index)
        wanted = object_masks(scene)
        if not wanted:
            continue
        size_hw = (scene.image.shape[0], scene.image.shape[1])
        ask = _askers(variants, scene.image)
        for kind in prompts:
            drawn = [_draw(kind, wanted, draw, index) for draw in range(_draws(kind, draws))]
            for name, answer in itertools.chain(_baselines(kind, size_hw), ask.items()):
                answers = [answer(one) for one in drawn]
                _add(scores[kind, name], answers, wanted)
                if kind == _CENTER:
                    best = [_best_candidate(a, m) for a, m in zip(answers[0], wanted, strict=True)]
                    _add(scores[_ORACLE, name], [best], wanted)
                if sheet is not None:
                    sheet.see(kind, name, scene.image, drawn[0], wanted, answers[0])
    if not scores:
        raise ConfigError(f"{dataset} must have an object in its split {split}, got none")
    return [
        PromptRow(
            dataset=dataset,
            split=split,
            variant=name,
            prompt=kind,
            objects=len(one.iou) // _draws(kind, draws),
            miou=round(float(np.mean(one.iou)), 4),
            mbiou=round(float(np.mean(one.boundary_iou)), 4),
            stability=_rounded_mean(one.stability),
            routing=_rounded_mean(one.routing),
            iou_error=_rounded_mean(
                [abs(p - r) for p, r in zip(one.predicted, one.iou, strict=False)]
            ),
            calibration_error=round(calibration_error(one.predicted, one.iou), 4)
            if one.predicted
            else None,
        )
        for (kind, name), one in scores.items()
    ]


_Ask = Callable[[list[ObjectPrompt]], list[Answer]]


def _askers(variants: Mapping[str, Variant], image: NDArray[np.uint8]) -> dict[str, _Ask]:
    """Make what answers prompts on one image, by variant; equal embeddings are made once."""
    embedders: dict[str, Callable[[Crop | None], Embedding]] = {}
    size_hw = (image.shape[0], image.shape[1])
    ask: dict[str, _Ask] = {}
    for name, variant in variants.items():
        predictor = variant.predictor
        embed = embedders.setdefault(predictor.embedding_fingerprint, embed_once(predictor, image))
        ask[name] = partial(
            answer_prompts,
            predictor,
            image_hw=size_hw,
            embed=embed,
            crops=variant.crops,
            refine=variant.refine,
        )
    return ask


def _draws(kind: str, draws: int) -> int:
    return draws if kind in _BOX_NOISE or kind in _POINTS else 1


def _draw(kind: str, wanted: Sequence[_Mask], draw: int, index: int) -> list[ObjectPrompt]:
    """Prompt each of an image's objects once."""
    generator = torch.Generator().manual_seed(1_000_003 * index + draw)
    if kind in _POINTS:
        return [points_prompt(_random_points(mask, _POINTS[kind], generator)) for mask in wanted]
    if kind == _CENTER:
        return [points_prompt(center_point(mask)[None]) for mask in wanted]
    boxes = [tight_box(mask) for mask in wanted]
    if kind in _BOX_NOISE:
        drawn = noisy_boxes(
            torch.from_numpy(np.stack(boxes)),
            image_hw=(wanted[0].shape[0], wanted[0].shape[1]),
            scale=_BOX_NOISE[kind],
            generator=generator,
        )
        boxes = list(drawn.numpy())
    return [box_prompt(box) for box in boxes]


def _random_points(mask: _Mask, count: int, generator: torch.Generator) -> NDArray[np.float64]:
    """Draw pixels (x, y) of a mask evenly, with replacement: [count, 2]."""
    ys, xs = np.nonzero(mask)
    chosen = torch.randint(len(ys), (count,), generator=generator).numpy()
    return np.stack([xs[chosen], ys[chosen]], 1).astype(np.float64)


def _baselines(kind: str, size_hw: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """What a mask has to beat: the drawn box itself, and for the tight one the ellipse in it."""
    if kind == _TIGHT or kind in _BOX_NOISE:
        yield "rectangle", lambda drawn: [rectangle_mask(p.box_xyxy, size_hw) for p in drawn]
    if kind == _TIGHT:
        yield "ellipse", lambda drawn: [ellipse_in_box(p.box_xyxy, size_hw) for p in drawn]


def _add(
    scores: _Scores, draws: Sequence[Sequence[Answer | _Mask]], wanted: Sequence[_Mask]
) -> None:
    """Measure the answers to the draws of one kind of prompt, each about all objects."""
    for position, truth in enumerate(wanted):
        answers = [answers[position] for answers in draws]
        masks = [a.mask if isinstance(a, Answer) else a for a in answers]
        for answer, mask in zip(answers, masks, strict=True):
            scores.iou.append(iou(mask, truth))
            scores.boundary_iou.append(boundary_iou(mask, truth))
            if isinstance(answer, Answer):
                scores.predicted.append(answer.iou_prediction)
                if answer.candidates.routing is not None:
                    scores.routing.append(answer.candidates.routing)
        if len(masks) > 1:
            scores.stability.append(stability(masks))


def _best_candidate(answer: Answer, wanted: _Mask) -> Answer:
    best = int(np.argmax([iou(mask, wanted) for mask in answer.candidates.masks]))
    return replace(answer, chosen=best)


def _rounded_mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


@dataclass(order=True)
class _Case:
    """One object as two variants answer it; ordered by how much the second one gains."""

    gain: float
    number: int
    pixels: Any


class ContactSheet:
    """Collects the objects that one variant answers most better, and most worse, than another.

    Each case is a row: the image with the prompt and the object's outline, the answer of the first
    variant, the answer of the second.
    """

    def __init__(
        self,
        first: str,
        second: str,
        *,
        prompts: Sequence[str] = _SHEET_PROMPTS["all"],
        cases: int = 4,
    ) -> None:
        """Begin an empty sheet.

        Args:
            first: Name of the variant that is compared with.
            second: Name of the variant that gains or loses.
            prompts: The kinds of prompts to collect.
            cases: How many gains and how many losses are kept for each of them.
        """
        self._names = (first, second)
        self._prompts = tuple(prompts)
        self._cases = cases
        self._first: dict[str, Sequence[Answer]] = {}
        self._gains: defaultdict[str, list[_Case]] = defaultdict(list)
        self._losses: defaultdict[str, list[_Case]] = defaultdict(list)
        self._count = itertools.count()

    def see(
        self,
        kind: str,
        name: str,
        image: NDArray[np.uint8],
        prompts: Sequence[ObjectPrompt],
        wanted: Sequence[_Mask],
        answers: Sequence[Any],
    ) -> None:
        """Take note of one variant's answers about an image; the first variant comes first."""
        if kind not in self._prompts or name not in self._names:
            return
        if name == self._names[0]:
            self._first[kind] = answers
            return
        for prompt, mask, before, after in zip(
            prompts, wanted, self._first[kind], answers, strict=True
        ):
            gain = iou(after.mask, mask) - iou(before.mask, mask)
            for heap, key in ((self._gains[kind], gain), (self._losses[kind], -gain)):
                if key > 0 and (len(heap) < self._cases or key > heap[0].gain):
                    pixels = _draw_case(image, prompt, mask, before.mask, after.mask)
                    heapq.heappush(heap, _Case(key, next(self._count), pixels))
                    if len(heap) > self._cases:
                        heapq.heappop(heap)

    def save(self, path: Path) -> None:
        """Draw the cases, best first: gains on the left, losses on the right, into an image file.

        Raises:
            ConfigError: If matplotlib is not installed, or nothing was collected.
        """
        kinds = [kind for kind in self._prompts if self._gains[kind] or self._losses[kind]]
        if not kinds:
            raise ConfigError(
                f"a contact sheet must have answers of {self._names} to {self._prompts}, got none"
            )
        figure = new_figure(13, 1.55 * self._cases * len(kinds))
        grid = figure.subplots(self._cases * len(kinds), 2, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for place, kind in enumerate(kinds):
            for column, (heap, sign) in enumerate(((self._gains, 1), (self._losses, -1))):
                for row, case in enumerate(sorted(heap[kind], reverse=True)):
                    axes = grid[place * self._cases + row, column]
                    axes.imshow(case.pixels)
                    axes.set_title(f"{kind}: {sign * case.gain:+.2f} IoU", fontsize=8)
        figure.suptitle(f"prompt and object, {self._names[0]}, {self._names[1]}")
        figure.savefig(path, dpi=110)


_PANEL = 224
_GREEN, _RED, _YELLOW = (40, 200, 60), (230, 40, 40), (250, 220, 40)


def _draw_case(
    image: NDArray[np.uint8], prompt: ObjectPrompt, wanted: _Mask, before: _Mask, after: _Mask
) -> NDArray[np.uint8]:
    """Draw a row of three panels [h, w, 3]."""
    scale = _PANEL / max(image.shape[:2])
    size_wh = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    small = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)

    def outlined(mask: _Mask, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
        panel: NDArray[np.uint8] = small.copy()
        reduced = cv2.resize(mask.astype(np.uint8), size_wh, interpolation=cv2.INTER_AREA)
        panel[reduced > 0] = (0.6 * panel[reduced > 0] + 0.4 * np.array(colour)).astype(np.uint8)
        outlines, _ = cv2.findContours(reduced, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(panel, outlines, -1, colour, 1)
        return panel

    shown = outlined(wanted, _GREEN)
    if prompt.box_xyxy is not None:
        x0, y0, x1, y1 = (round(float(v) * scale) for v in prompt.box_xyxy)
        cv2.rectangle(shown, (x0, y0), (x1, y1), _YELLOW, 2)
    for x, y in prompt.point_coords:
        cv2.circle(shown, (round(float(x) * scale), round(float(y) * scale)), 5, _YELLOW, -1)
    row: NDArray[np.uint8] = np.concatenate(
        [shown, outlined(before, _RED), outlined(after, _RED)], axis=1
    )
    return row


def plot_prompts(rows: Sequence[PromptRow], path: Path) -> None:
    """Draw IoU and stability by prompt, a line a variant, into an image file.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    figure = new_figure(11, 4.5)
    kinds = [kind for kind in PROMPTS if any(row.prompt == kind for row in rows)]
    for axes, column, title in zip(
        figure.subplots(1, 2), ("miou", "stability"), ("IoU", "stability"), strict=True
    ):
        for variant in dict.fromkeys(row.variant for row in rows):
            values = {row.prompt: getattr(row, column) for row in rows if row.variant == variant}
            places = [place for place, kind in enumerate(kinds) if values.get(kind) is not None]
            if places:
                heights = [values[kinds[place]] for place in places]
                axes.plot(places, heights, marker="o", label=variant)
        axes.set_title(title)
        axes.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(f"{rows[0].dataset} {rows[0].split}")
    figure.savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_rows_argument(parser)
    parser.add_argument(
        "--prompts", type=_kinds, default=PROMPTS, metavar="KIND;...", help="; ".join(PROMPTS)
    )
    parser.add_argument("--draws", type=int, default=3, help="of each noisy box and set of points")
    parser.add_argument(
        "--stable-sam",
        type=Path,
        action="append",
        metavar="FILE",
        help="plugins to compare; by default the model's own, if it has one",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the table, too")
    parser.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="draw where the last plugin gains and loses most",
    )


def _kinds(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";"))


def run(options: argparse.Namespace) -> list[PromptRow]:
    """Measure as the command line says."""
    sam = open_model(options)
    model = Path(options.model).stem
    own = find_stable_sam(options.model, weights_dir=options.weights_dir)
    files = options.stable_sam or ([] if own is None else [own])
    base = weights_fingerprint(sam)
    plugins = {path: load_stable_sam(path, base=base) for path in files}
    variants = {model: Variant(predictor=Predictor(sam))}
    for path, plugin in plugins.items():
        name = f"{model}+dsp+drp" if plugin.router is not None else f"{model}+dsp"
        if len(plugins) > 1:
            name = f"{name} {path}"
        variants[name] = Variant(predictor=Predictor(sam, stable_sam=plugin))
    *_, last = variants
    sheet = None
    if options.sheet is not None:
        if not plugins:
            raise ConfigError("--sheet must have a plugin to show, got none; give --stable-sam")
        scope = list(plugins.values())[-1].scope
        sheet = ContactSheet(model, last, prompts=_SHEET_PROMPTS[scope])
    plain = _served(sam, None)
    if plugins:
        variants[f"{model} as served, no plugin"] = plain
        variants[f"{model} as served"] = _served(sam, list(plugins.values())[-1])
    else:
        variants[f"{model} as served"] = plain
    key = measured_key(options, sam) | {
        "variants": {
            name: f"{one.predictor.fingerprint}{' refined' if one.refine else ''}"
            for name, one in variants.items()
        },
        "prompts": list(options.prompts),
        "draws": options.draws,
    }
    measure = partial(
        evaluate_prompts,
        variants,
        open_folder(options),
        dataset=options.data.name,
        split=options.split,
        prompts=options.prompts,
        draws=options.draws,
        limit=options.limit,
        seed=options.seed,
        sheet=sheet,
    )
    # A contact sheet is drawn of the answers themselves, which no file of rows holds.
    file = RowFile(options.rows if sheet is None else None, PromptRow)
    rows = list(file.get(key, measure))
    if options.plot is not None:
        plot_prompts(rows, options.plot)
    if sheet is not None:
        sheet.save(options.sheet)
    return rows


def _served(sam: Sam, plugin: StableSam | None) -> Variant:
    """What the backend answers with by its default settings."""
    predictor = served_predictor(sam, plugin)
    side = predictor.image_size
    return Variant(predictor=predictor, crops=default_crops(side), refine=default_refine(side))
