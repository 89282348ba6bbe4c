"""Simulated annotators: first prompts, and further clicks where the last answer was wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_ext.prompt_encoder import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
)

__all__ = ["correction_clicks", "first_prompts", "jitter_boxes"]


def jitter_boxes(
    boxes_xyxy: Tensor,
    *,
    image_size: int,
    generator: torch.Generator,
    std: float = 0.1,
    most: float = 20 / 1024,
) -> Tensor:
    """Move each side of each box a little, as a hurried annotator would.

    Args:
        boxes_xyxy: [P, 4] in pixels.
        image_size: Side of the image in pixels; boxes stay inside.
        generator: Decides the noise.
        std: Standard deviation, as a share of the box's side.
        most: The largest move, as a share of `image_size` (SAM: 20 of 1024 px).

    Returns:
        [P, 4]; never inside out.

    Source:
        Kirillov et al., arXiv:2304.02643, section A.
    """
    sides = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).repeat(1, 2)
    noise = torch.randn(boxes_xyxy.shape, generator=generator) * sides * std
    moved = boxes_xyxy + noise.clamp(-most * image_size, most * image_size)
    moved = moved.clamp(0, image_size)
    return torch.cat(
        [torch.minimum(moved[:, :2], moved[:, 2:]), torch.maximum(moved[:, :2], moved[:, 2:])], 1
    )


def first_prompts(boxes_xyxy: Tensor, points: Tensor, is_box: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt each object by its box or by one point.

    Args:
        boxes_xyxy: [P, 4] in pixels.
        points: [P, 2] in pixels, (x, y).
        is_box: [P] bool.

    Returns:
        Coordinates [P, 2, 2] and labels [P, 2] as `embed_tokens` takes them: a box's two corners,
        or the point and the token that says there is no box.
    """
    by_box = boxes_xyxy.view(-1, 2, 2)
    by_point = torch.stack([points, torch.zeros_like(points)], dim=1)
    coords = torch.where(is_box[:, None, None], by_box, by_point)
    corners = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT])
    click = torch.tensor([FOREGROUND, NOT_A_POINT])
    return coords, torch.where(is_box[:, None], corners, click)


def correction_clicks(
    logits: Tensor, targets: Tensor, *, stride: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Click once per object, uniformly where the answer is wrong.

    Args:
        logits: The last answer [P, H, W], low resolution.
        targets: The objects' coverage [P, H, W] in 0..1.
        stride: Image pixels per low-resolution pixel.
        generator: Decides the places.

    Returns:
        Coordinates [P, 1, 2] in image pixels and labels [P, 1]: foreground where the object was
        missed, background where it was not the object. An answer without error is clicked
        anywhere inside the object.

    Source:
        Kirillov et al., arXiv:2304.02643, section A.
    """
    wanted = targets > 0.5
    wrong = (logits > 0) != wanted
    chances = torch.where(wrong.flatten(1).any(1)[:, None], wrong.flatten(1), wanted.flatten(1))
    nowhere = ~chances.any(1)
    chances = chances.float()
    chances[nowhere] = 1.0
    index = torch.multinomial(chances.cpu(), 1, generator=generator).to(logits.device)  # [P, 1]
    width = logits.shape[-1]
    cell = torch.stack([index % width, index // width], dim=-1)  # [P, 1, 2]
    labels = torch.where(wanted.flatten(1).gather(1, index), FOREGROUND, BACKGROUND)
    return (cell + 0.5) * stride - 0.5, labels
