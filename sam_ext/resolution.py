"""At which size an image enters the encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sam_ext.errors import ConfigError

__all__ = ["ResolutionPolicy", "default_policy"]


@dataclass(frozen=True, kw_only=True)
class ResolutionPolicy:
    """How large an image is resized for the encoder; the aspect is always kept.

    With `square`, the default, everything is as in SAM: the long side becomes the training side,
    and the rest of the training square is padded. The others pad to whole patches only.
    """

    mode: Literal["square", "native", "budget"] = "square"
    """`square`: the training square. `native`: the image's own size, its long side clamped.
    `budget`: as large as a number of tokens allows, whatever the image's size."""
    min_side: int | None = None
    """With `native`, images with a shorter long side (pixels) are enlarged to it."""
    max_side: int | None = None
    """With `native`, images with a longer long side (pixels) are reduced to it."""
    max_tokens: int | None = None
    """With `budget`, the largest number of tokens, those of the padding included."""
    pad_to: int = 1
    """With `native` and `budget`, pad to multiples of so many pixels, a multiple of the patches, so
    that few shapes occur; 1 pads to whole patches."""

    def __post_init__(self) -> None:
        needed = {"square": (), "native": ("min_side", "max_side"), "budget": ("max_tokens",)}
        if self.mode not in needed:
            raise ConfigError(
                f"ResolutionPolicy.mode must be square, native or budget, got {self.mode!r}"
            )
        for name in ("min_side", "max_side", "max_tokens"):
            value = getattr(self, name)
            if name not in needed[self.mode]:
                if value is not None:
                    raise ConfigError(
                        f"ResolutionPolicy.{name} must be None with mode {self.mode!r}, "
                        f"got {value}; it would do nothing"
                    )
            elif value is None or value < 1:
                raise ConfigError(
                    f"ResolutionPolicy.{name} must be at least 1 with mode {self.mode!r}, "
                    f"got {value}"
                )
        if self.pad_to < 1:
            raise ConfigError(
                f"ResolutionPolicy.pad_to must be at least 1, got {self.pad_to}; 1 pads to whole "
                "patches"
            )
        if self.min_side and self.max_side and self.min_side > self.max_side:
            raise ConfigError(
                "ResolutionPolicy.min_side must be at most max_side, "
                f"got {self.min_side} and {self.max_side}"
            )

    def input_size(
        self, image_hw: tuple[int, int], *, train_side: int, patch_size: int = 16
    ) -> tuple[int, int]:
        """Return the size (H, W) to which an image is resized, padding left out.

        Args:
            image_hw: The image's size.
            train_side: Side of the model's training square in pixels.
            patch_size: Side of a token's patch in pixels.
        """
        longest = max(image_hw)
        if self.max_tokens is not None:
            scale = _budget_scale(image_hw, max_tokens=self.max_tokens, patch_size=patch_size)
        elif self.min_side is not None and self.max_side is not None:
            scale = min(max(longest, self.min_side), self.max_side) / longest
        else:
            scale = train_side / longest
        # Rounded as segment-anything rounds it; a very thin image keeps a row.
        height, width = (max(1, int(side * scale + 0.5)) for side in image_hw)
        return height, width

    def padded_size(
        self, input_size: tuple[int, int], *, train_side: int, patch_size: int = 16
    ) -> tuple[int, int]:
        """Return the size (H, W) of the encoder's input for an image resized to `input_size`."""
        if self.mode == "square":
            return train_side, train_side
        unit = math.lcm(self.pad_to, patch_size)
        height, width = (-(-side // unit) * unit for side in input_size)
        return height, width


def default_policy(train_side: int) -> ResolutionPolicy:
    """Choose the policy that suits a model trained on squares of `train_side` pixels.

    Models trained below 1024 px get every image at one and a half times their training side, not
    padded. That is measured with `tiny` on train splits, mean IoU of tight boxes:

    ===============  ======  ====  ====  ====  ====
    long side        square   256   320   384   512
    ===============  ======  ====  ====  ====  ====
    coco200           0.537 0.538 0.551 0.555 0.552
    bsds500           0.578 0.576 0.593 0.608 0.602
    feralcat          0.647 0.647 0.651 0.660 0.662
    treepheno_hr      0.206 0.131 0.200 0.227 0.228
    ===============  ======  ====  ====  ====  ====

    A budget of 576 tokens (0.558, 0.608, 0.660, 0.228) is the same at the cost of more tokens.
    Small images are enlarged as well: coco200 at 128 px reaches 0.399, 0.523 and 0.560 at 128, 256
    and 384. A model loses much below its training size, even where the image holds no more.

    Models of 1024 px therefore get SAM's own long side, not padded. That is not measured.
    """
    side = train_side if train_side >= 1024 else train_side * 3 // 2
    return ResolutionPolicy(mode="native", min_side=side, max_side=side)


def _budget_scale(image_hw: tuple[int, int], *, max_tokens: int, patch_size: int) -> float:
    """Find the largest scale at which an image covers at most `max_tokens` patches."""
    height, width = image_hw
    rows = np.arange(1, max_tokens + 1)
    scales = np.minimum(rows * patch_size / height, max_tokens // rows * patch_size / width)
    return float(scales.max())
