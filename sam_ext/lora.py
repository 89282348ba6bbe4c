"""LoRA: a few parameters beside a frozen image encoder, trained, and merged into it."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_ext.errors import ConfigError
from sam_ext.sam import Sam

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

__all__ = [
    "LoraLinear",
    "attach_lora",
    "load_lora_state",
    "lora_parameters",
    "lora_state",
    "merge_lora",
]


class LoraLinear(nn.Linear):
    r"""A fused projection to q, k and v, with a low-rank update of q and v that starts at zero.

    .. math:: q = (W_q + B_q A_q) x, \quad k = W_k x, \quad v = (W_v + B_v A_v) x

    Weight and bias keep their names, so that SAM's state dict is a part of this module's.

    Source:
        Hu et al., arXiv:2106.09685, equation 3, where Zhang et al., arXiv:2312.03502, put it.

    Differs from the source:
        The update is not scaled, as in WeSAM's code: alpha is the rank.
    """

    lora_a: nn.Parameter
    """[2, r, C], for q and for v."""
    lora_b: nn.Parameter
    """[2, C, r], for q and for v."""

    def __init__(self, plain: nn.Linear, *, rank: int) -> None:
        """Take over a projection's weight [3C, C] and bias [3C], frozen.

        Raises:
            ConfigError: If `rank` is below 1 or `plain` is not a fused projection.
        """
        channels = plain.in_features
        if rank < 1:
            raise ConfigError(f"LoRA's rank must be at least 1, got {rank}")
        if plain.out_features != 3 * channels:
            raise ConfigError(
                f"LoRA wants a projection to q, k and v, {channels} to {3 * channels} channels, "
                f"got {plain.out_features}"
            )
        super().__init__(channels, 3 * channels, bias=plain.bias is not None, device="meta")
        self.weight = plain.weight
        self.bias = plain.bias
        self.rank = rank
        # As `nn.Linear` starts: kaiming_uniform_ with a = sqrt(5).
        bound = 1 / math.sqrt(channels)
        self.lora_a = nn.Parameter(
            torch.empty(2, rank, channels, device=plain.weight.device).uniform_(-bound, bound)
        )
        self.lora_b = nn.Parameter(torch.zeros(2, channels, rank, device=plain.weight.device))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens [..., C] to q, k and v, concatenated as [..., 3C]."""
        down = F.linear(x, self.lora_a.flatten(0, 1))  # [..., 2r]
        return F.linear(x, self.weight, self.bias) + F.linear(down, self._spread())

    def merged_weight(self) -> Tensor:
        """Add the update to the weight: [3C, C], computed in double precision."""
        # On the CPU: Apple's GPUs have no double precision.
        spread, down, weight = (
            one.detach().cpu().double()
            for one in (self._spread(), self.lora_a.flatten(0, 1), self.weight)
        )
        return (weight + spread @ down).to(self.weight)

    def _spread(self) -> Tensor:
        """Put both B into one matrix [3C, 2r] whose rows for k are zero."""
        b_q, b_v = self.lora_b.unbind()
        nothing = torch.zeros_like(b_q)
        return torch.cat(
            [
                torch.cat([b_q, nothing], dim=1),
                torch.cat([nothing, nothing], dim=1),
                torch.cat([nothing, b_v], dim=1),
            ]
        )


def attach_lora(image_encoder: ImageEncoderViT, rank: int = 4) -> list[str]:
    """Freeze an encoder and give every block's projection a low-rank update, in place.

    Every check runs before the first change: a refused call leaves the encoder as it was.

    Args:
        image_encoder: SAM's module.
        rank: r.

    Returns:
        The names of the new parameters, in module order.

    Raises:
        ConfigError: If `rank` is below 1, or the encoder has LoRA already.

    Source:
        Zhang et al., arXiv:2312.03502: rank 4 in every block, on q and v.
    """
    if lora_parameters(image_encoder):
        raise ConfigError("this image_encoder has LoRA already; build a fresh SAM to attach it")
    adapted = [LoraLinear(block.attn.qkv, rank=rank) for block in image_encoder.blocks]
    image_encoder.requires_grad_(False)
    for block, layer in zip(image_encoder.blocks, adapted, strict=True):
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
        block.attn.qkv = layer
    return [name for name, p in image_encoder.named_parameters() if p.requires_grad]


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """List a module's low-rank parameters, in module order."""
    return [
        parameter
        for layer in module.modules()
        if isinstance(layer, LoraLinear)
        for parameter in (layer.lora_a, layer.lora_b)
    ]


def lora_state(sam: Sam) -> dict[str, Tensor]:
    """Copy the low-rank tensors to the CPU, by their names in the SAM's state dict."""
    wanted = {id(parameter) for parameter in lora_parameters(sam)}
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in sam.named_parameters()
        if id(parameter) in wanted
    }


def load_lora_state(sam: Sam, state: dict[str, Tensor]) -> None:
    """Copy low-rank tensors into a SAM with LoRA, in place.

    Args:
        sam: With LoRA attached.
        state: What `lora_state` gave.
    """
    parameters = dict(sam.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def merge_lora(sam: Sam) -> Sam:
    """Make a SAM with plain projections that answers as this one with LoRA does.

    Args:
        sam: With LoRA attached or without; it is not changed.

    Returns:
        A new SAM, in evaluation mode.
    """
    merged: Sam = copy.deepcopy(sam)
    for block in merged.image_encoder.blocks:
        layer = block.attn.qkv
        if isinstance(layer, LoraLinear):
            plain = nn.Linear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
            )
            plain.weight = nn.Parameter(layer.merged_weight().detach())
            plain.bias = layer.bias
            block.attn.qkv = plain
    merged.requires_grad_(True)
    return merged.eval()
