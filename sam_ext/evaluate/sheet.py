"""What a model makes of some images, to look at: truth, boxes and clicks side by side."""

from __future__ import annotations

import argparse
import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from sam_ext.evaluate.common import (
    add_data_arguments,
    add_model_arguments,
    box_prompt,
    center_point,
    chosen_images,
    new_figure,
    object_masks,
    open_folder,
    open_model,
    points_prompt,
    served_predictor,
)
from sam_ext.interactive import answer_prompts, default_crops, embed_once
from sam_ext.metrics import iou, tight_box
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.training.data import CocoFolder

__all__ = ["SheetRow", "add_arguments", "draw_sheet", "run"]

_Mask = NDArray[np.bool_]
_PANEL_INCHES = 3.2


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One image and one kind of prompt."""

    image: str
    prompt: str
    objects: int
    miou: float
    """Mean over the image's objects, in its own pixels."""


def draw_sheet(
    predictor: Predictor, folder: CocoFolder, indexes: Sequence[int], path: Path
) -> list[SheetRow]:
    """Draw a row of panels for each image: its objects, and the answers to boxes and to clicks.

    Args:
        predictor: What answers, as it is served.
        folder: The images and masks.
        indexes: Which images.
        path: The image file that is written.

    Returns:
        How good the answers are, a row for each image and kind of prompt.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    figure = new_figure(_PANEL_INCHES * 3, _PANEL_INCHES * len(indexes))
    grid = figure.subplots(len(indexes), 3, squeeze=False)
    rows = []
    for panels, index in zip(grid, indexes, strict=True):
        scene = folder.scene(index)
        wanted = object_masks(scene)
        name = folder.file(index).name
        drawn = {
            "tight box": [box_prompt(tight_box(mask)) for mask in wanted],
            "center point": [points_prompt(center_point(mask)[None]) for mask in wanted],
        }
        ask = partial(
            answer_prompts,
            predictor,
            image_hw=(scene.image.shape[0], scene.image.shape[1]),
            embed=embed_once(predictor, scene.image),
            crops=default_crops(predictor.image_size),
        )
        panels[0].imshow(_painted(scene.image, wanted, ()))
        panels[0].set_title(f"{name}: {len(wanted)} objects", fontsize=8)
        for panel, (prompt, asked) in zip(panels[1:], drawn.items(), strict=True):
            masks = [answer.mask for answer in ask(asked)]
            reached = float(np.mean([iou(m, w) for m, w in zip(masks, wanted, strict=True)]))
            panel.imshow(_painted(scene.image, masks, asked))
            panel.set_title(f"{prompt}: IoU {reached:.2f}", fontsize=8)
            rows.append(
                SheetRow(image=name, prompt=prompt, objects=len(wanted), miou=round(reached, 4))
            )
        for panel in panels:
            panel.axis("off")
    figure.savefig(path, dpi=110)
    return rows


def _painted(
    image: NDArray[np.uint8], masks: Sequence[_Mask], prompts: Sequence[ObjectPrompt]
) -> NDArray[np.uint8]:
    """Lay each mask over an image in a colour of its own, with what it was asked for by."""
    painted = image.copy()
    thickness = max(round(max(image.shape[:2]) / 250), 1)
    for number, mask in enumerate(masks):
        hue = number * 0.61803 % 1  # neighbours get colours far apart
        colour = np.array([round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0)])
        painted[mask] = (0.6 * painted[mask] + 0.4 * colour).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(painted, outlines, -1, colour.tolist(), thickness)
    for prompt in prompts:
        if prompt.box_xyxy is not None:
            x0, y0, x1, y1 = (round(float(v)) for v in prompt.box_xyxy)
            cv2.rectangle(painted, (x0, y0), (x1, y1), (255, 255, 255), thickness)
        for x, y in prompt.point_coords:
            center = (round(float(x)), round(float(y)))
            cv2.circle(painted, center, 3 * thickness, (255, 255, 255), -1)
    return painted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--sheet", type=Path, required=True, metavar="FILE.png")


def run(options: argparse.Namespace) -> list[SheetRow]:
    """Draw as the command line says."""
    folder = open_folder(options)
    predictor = served_predictor(open_model(options), None)
    chosen = chosen_images(folder, options.limit, options.seed)
    return draw_sheet(predictor, folder, chosen, options.sheet)
