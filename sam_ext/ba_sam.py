"""BA-SAM: attention that keeps its habits when an image has more or fewer tokens than in training.

It concerns the blocks that attend to the whole image; windows have as many tokens as ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from sam_ext.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

__all__ = [
    "DEFAULT_BA_SAM",
    "BaSamConfig",
    "BiasMode",
    "attach_coefficients",
    "axis_bias",
    "default_ba_sam",
    "scaling_factor",
]

BiasMode = Literal["none", "full", "extrapolation", "stretch", "official"]


@dataclass(frozen=True, kw_only=True)
class BaSamConfig:
    """What the image encoder does away from its training size; the defaults are plain SAM."""

    scaling_factor: bool = False
    """Multiply `q . k` by `scaling_factor`; the relative position bias stays as it is."""
    bias: BiasMode = "none"
    """`full`, `extrapolation`, `stretch`: add `axis_bias` along both axes. `official`: multiply the
    relative position bias by the coefficients of `attach_coefficients`."""
    beta: float = 0.0
    """Strength of `axis_bias`, at least 0."""

    def __post_init__(self) -> None:
        if self.bias not in get_args(BiasMode):
            raise ConfigError(
                f"BaSamConfig.bias must be one of {', '.join(get_args(BiasMode))}, "
                f"got {self.bias!r}"
            )
        if not 0 <= self.beta < math.inf:
            raise ConfigError(f"BaSamConfig.beta must be at least 0 and finite, got {self.beta}")


DEFAULT_BA_SAM = BaSamConfig(bias="stretch", beta=32.0)
"""What suited a model best that knew one size only (`tiny` after 77,000 images of 256 px), measured
on training images, among the modes and strengths 2 to 64; the scaling factor alone or beside a bias
gained nothing there. At the training size and below it is SAM."""


def default_ba_sam(train_side: int) -> BaSamConfig | None:
    """Choose what suits a model trained on squares of `train_side` pixels; None is plain SAM.

    SAM's published models know one size and get `DEFAULT_BA_SAM`. `tiny` was trained on from 256 to
    512 px in the end and has nothing to win back. Measured with it on train splits, as it is served
    (384 px, crops), mean IoU of tight boxes:

    ============  ========  =======  =======
    set           off       factor   bias
    ============  ========  =======  =======
    coco200          0.609    0.608    0.610
    bsds500          0.689    0.687    0.685
    feralcat         0.774    0.773    0.769
    treepheno_hr     0.429    0.428    0.432
    ============  ========  =======  =======
    """
    return DEFAULT_BA_SAM if train_side >= 1024 else None


def scaling_factor(tokens: int, train_tokens: int) -> float:
    r"""Compute by how much `q . k` grows, so that the softmax stays as sharp as in training.

    .. math:: \log_{T_{train}} T

    Args:
        tokens: Tokens of the image, H * W.
        train_tokens: The same in training.

    Returns:
        1 where nothing changed since training.

    Raises:
        ConfigError: If `tokens` is below 1 or `train_tokens` below 2, where the logarithm says
            nothing.

    Source:
        Song et al., arXiv:2401.02317, the new scaling factor; form as in the authors' code.

    Differs from the source:
        The authors' code takes `img_size // 1024`, which is 0 below 1024 px and 1 up to 2047 px.
    """
    if tokens < 1 or train_tokens < 2:
        raise ConfigError(
            f"tokens must be at least 1 and train_tokens at least 2, got {tokens}, {train_tokens}"
        )
    return math.log(tokens) / math.log(train_tokens)


def axis_bias(length: int, train_length: int, mode: BiasMode, beta: float) -> Tensor:
    r"""Compute the distance bias along one axis of the token grid.

    .. math:: -\beta g(|i - i'|), \quad g_{full}(u) = u / S, \quad
        g_{extrapolation}(u) = \max(0, u - (S - 1)) / S, \quad
        g_{stretch}(u) = \max(0, u / S - u / L)

    L is the axis's length, S that in training. Resized tables of relative positions tell a token
    what share of the image lies between it and another, u / L. `stretch` penalises by how much
    farther away the other one is than that was in training.

    The bias of two tokens is the sum over both axes. Of the distances that one could take, this one
    (Manhattan) adds nothing to the cost: like SAM's relative positions it is a term for the row and
    a term for the column.

    Args:
        length: Tokens along the axis, L.
        train_length: The same in training, S. With `extrapolation` distances that occurred in
            training cost nothing, with `stretch` none does on a grid that is no longer.
        mode: `none` and `official` give zeros.
        beta: At least 0.

    Returns:
        [length, length], float64, query by key, to be added to the attention logits.

    Source:
        Song et al., arXiv:2401.02317, the bias-mode attention mask: a penalty that grows with the
        distance of query and key. The forms of g are ours.
    """
    position = torch.arange(length, dtype=torch.float64)
    distance = (position[:, None] - position[None, :]).abs()
    if mode == "extrapolation":
        distance = (distance - (train_length - 1)).clamp(min=0)
    elif mode == "stretch":
        distance = distance * max(0.0, 1 - train_length / length)
    elif mode != "full":
        return torch.zeros_like(distance)
    return distance * (-beta / train_length)


def attach_coefficients(image_encoder: ImageEncoderViT, initial: float = 1.0) -> list[nn.Parameter]:
    """Give every global block the learnable coefficient that `BaSamConfig.bias` `official` needs.

    It multiplies the block's relative position bias and is called `attn.ba_sam_coefficient`.

    Args:
        image_encoder: SAM's encoder module, changed in place.
        initial: The coefficients' first value; 1 is exactly SAM, the authors start at 0.1.

    Returns:
        The new parameters, one a global block, in the blocks' order.

    Raises:
        ConfigError: If the encoder has them already.

    Source:
        Song et al., arXiv:2401.02317, the authors' code.

    Differs from the source:
        The authors also drop SAM's relative position tables; here they are kept and resized. They
        give window blocks a coefficient too.
    """
    layers = [block.attn for block in image_encoder.blocks if block.window_size == 0]
    if any(hasattr(attn, "ba_sam_coefficient") for attn in layers):
        raise ConfigError("image_encoder has its coefficients already; set their values instead")
    for attn in layers:
        weight = attn.qkv.weight
        attn.ba_sam_coefficient = nn.Parameter(
            torch.tensor(initial, dtype=weight.dtype, device=weight.device)
        )
    return [attn.ba_sam_coefficient for attn in layers]
