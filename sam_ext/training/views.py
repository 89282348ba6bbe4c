"""Two views of one image: a weak one that only moves pixels, a strong one that only recolours them.

A prompt drawn on the weak view is therefore right on the strong view too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sam_ext import _torchvision  # noqa: F401  # makes `import torchvision` possible

# isort: split
from torchvision.transforms.v2 import functional as transforms

__all__ = [
    "FLIPS",
    "Flip",
    "flip_boxes",
    "flip_image",
    "flip_points",
    "strong_view",
]


class Flip(NamedTuple):
    """A weak view: which axes of an image are turned round."""

    horizontal: bool
    vertical: bool


FLIPS = (Flip(False, False), Flip(True, False), Flip(False, True), Flip(True, True))
"""All weak views. The source's three transforms (flip, horizontal flip, vertical flip, each every
other time) come out at one of these, each equally often."""


def flip_image(image: Tensor, flip: Flip) -> Tensor:
    """Turn an image or masks [..., H, W] round."""
    axes = [axis for axis, turned in ((-1, flip.horizontal), (-2, flip.vertical)) if turned]
    return image.flip(axes)


def flip_boxes(boxes_xyxy: Tensor, flip: Flip, *, image_hw: tuple[int, int]) -> Tensor:
    """Turn boxes [P, 4] round with their image; they are in pixel edges and stay upright."""
    height, width = image_hw
    x0, y0, x1, y1 = boxes_xyxy.unbind(-1)
    if flip.horizontal:
        x0, x1 = width - x1, width - x0
    if flip.vertical:
        y0, y1 = height - y1, height - y0
    return torch.stack([x0, y0, x1, y1], dim=-1)


def flip_points(points: Tensor, flip: Flip, *, image_hw: tuple[int, int]) -> Tensor:
    """Turn points [..., 2] round with their image; as in SAM, 0 is the middle of a pixel."""
    height, width = image_hw
    x, y = points.unbind(-1)
    if flip.horizontal:
        x = width - 1 - x
    if flip.vertical:
        y = height - 1 - y
    return torch.stack([x, y], dim=-1)


def strong_view(image: Tensor, *, generator: torch.Generator, chance: float = 0.5) -> Tensor:
    """Recolour a weak view; no pixel moves.

    Args:
        image: [3, H, W] uint8.
        generator: Decides everything, on the CPU.
        chance: How often each of the six transforms is applied.

    Returns:
        [3, H, W] uint8.

    Source:
        Zhang et al., arXiv:2312.03502, whose code names Posterize, Equalize, Sharpen, Solarize,
        RandomBrightnessContrast and RandomShadow of Albumentations; strengths are its defaults.

    Differs from the source:
        The transforms are torchvision's, but for the shadow. Sharpening mixes with torchvision's
        kernel, and a shadow is one or two quadrangles, darkened by half.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    applied = (torch.rand(6, generator=generator) < chance).tolist()
    posterize, equalize, sharpen, solarize, brightness, shadow = applied
    if posterize:
        image = transforms.posterize(image, bits=4)
    if equalize:
        image = transforms.equalize(image)
    if sharpen:
        image = transforms.adjust_sharpness(image, 1 + draw(0.2, 0.5) * 4)
    if solarize:
        image = transforms.solarize(image, threshold=128)
    if brightness:
        image = transforms.adjust_brightness(image, 1 + draw(-0.2, 0.2))
        image = transforms.adjust_contrast(image, 1 + draw(-0.2, 0.2))
    if shadow:
        image = _shadowed(image, generator=generator)
    return image


def _shadowed(image: Tensor, *, generator: torch.Generator) -> Tensor:
    """Darken one or two quadrangles in an image's lower half by half."""
    height, width = image.shape[-2:]
    ys = (torch.arange(height, device=image.device) + 0.5)[:, None]
    xs = (torch.arange(width, device=image.device) + 0.5)[None]
    dark = torch.zeros((height, width), dtype=torch.bool, device=image.device)
    for _ in range(1 + int(torch.randint(2, (), generator=generator))):
        corners = torch.rand((4, 2), generator=generator)
        corners = corners * torch.tensor([width, height / 2]) + torch.tensor([0, height / 2])
        middle = corners.mean(0)
        turn = torch.atan2(corners[:, 1] - middle[1], corners[:, 0] - middle[0]).argsort()
        corners = corners[turn]
        inside = torch.zeros_like(dark)
        for (ax, ay), (bx, by) in zip(corners.tolist(), corners.roll(-1, 0).tolist(), strict=True):
            # Even-odd rule: each side crosses the ray to the right of some pixels.
            crossing = (ys < ay) != (ys < by)
            slope = (bx - ax) / (by - ay) if by != ay else 0.0
            inside ^= crossing & (xs < ax + (ys - ay) * slope)
        dark |= inside
    return torch.where(dark, image // 2, image)
