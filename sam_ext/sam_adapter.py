"""SAM-Adapter: what an image's patches and high frequencies say, added before every encoder block.

A small network reads the frozen patch embedding and task-specific inputs, the image's high
frequencies first of all. The encoder stays as it is; what is added tells its blocks what matters in
this domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_ext.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

__all__ = [
    "TASK_INPUTS",
    "SamAdapter",
    "SamAdapterConfig",
    "TaskInput",
    "attach_sam_adapter",
    "detach_sam_adapter",
    "high_frequency",
    "read_task_inputs",
    "sam_adapter_of",
    "sam_adapter_parameters",
]


def high_frequency(images: Tensor, rate: float = 0.25) -> Tensor:
    r"""Keep what changes fast across an image, and how much it does.

    .. math:: |F^{-1}(M \odot F(x))|, \quad
        M = 0 \text{ where } |f_y| < \sqrt{rate} / 2 \text{ and } |f_x| < \sqrt{rate} / 2

    Args:
        images: [..., H, W], without padding, whose edge is a high frequency of its own.
        rate: The share of all frequencies that is removed, in 0..1; 0 gives the absolute value.

    Returns:
        [..., H, W], at least 0; 0 for a constant image if `rate` is above 0.

    Raises:
        ConfigError: If `rate` is not in 0..1.

    Source:
        Liu et al., arXiv:2303.10883; Chen et al., arXiv:2304.09148, and the official code.

    Differs from the source:
        The frequencies f are in cycles per pixel along both axes, so that the cut is the same one
        at every size and in images that are not square. At the cut itself the official code
        removes one of f and -f; here both are kept.
    """
    _check_rate(rate)
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, device=images.device).abs()
    columns = torch.fft.rfftfreq(width, device=images.device)
    cut = math.sqrt(rate) / 2
    is_low = (rows[:, None] < cut) & (columns < cut)
    spectrum = torch.fft.rfft2(images).masked_fill(is_low, 0)
    changes: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return changes.abs()


@dataclass(frozen=True, kw_only=True)
class SamAdapterConfig:
    """What is added to the encoder's blocks, and what that is made of."""

    reduction: int = 32
    """The adapter has so many times fewer channels than the encoder."""
    frequency_rate: float = 0.25
    """As `high_frequency` takes it."""
    patch_weight: float = 1.0
    """Weight of the patch embedding's feature in the sum."""
    input_weights: tuple[tuple[str, float], ...] = (("high_frequency", 1.0),)
    """Names of `TASK_INPUTS` and their weights in the sum."""

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ConfigError(
                f"SamAdapterConfig.reduction must be at least 1, got {self.reduction}"
            )
        _check_rate(self.frequency_rate)
        names = [name for name, _ in self.input_weights]
        if len(set(names)) < len(names) or set(names) - set(TASK_INPUTS):
            raise ConfigError(
                "SamAdapterConfig.input_weights must name different ones of "
                f"{', '.join(TASK_INPUTS)}, got {names}"
            )
        weights = [self.patch_weight, *(weight for _, weight in self.input_weights)]
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise ConfigError(
                "SamAdapterConfig's weights must be finite and not all 0, got "
                f"{self.patch_weight} and {self.input_weights}"
            )


TaskInput: TypeAlias = Callable[[Tensor, SamAdapterConfig], Tensor]
"""Makes an input [B, 3, H, W] of normalised images [B, 3, H, W] without padding."""

TASK_INPUTS: dict[str, TaskInput] = {
    "high_frequency": lambda images, config: high_frequency(images, config.frequency_rate)
}
"""What can be weighted in beside the patch embedding, by name; a task may add its own."""


class SamAdapter(nn.Module):
    r"""Makes what is added before each block.

    .. math:: P_i = U\, GELU(T_i F), \quad F = \sum_j w_j F_j

    One F is a projection of the encoder's frozen patch embedding, without positions; each task
    input has a patch embedding of its own. T_i is a block's own, U is shared by all.

    Source:
        Chen et al., arXiv:2304.09148, and the official code.

    Differs from the source:
        U starts at 0, so that a fresh adapter is exactly SAM; the official one starts near it.
        Frequencies are read without the padding.
    """

    def __init__(
        self, *, channels: int, depth: int, patch_size: int, config: SamAdapterConfig
    ) -> None:
        """Build the adapter of an encoder at its start.

        Args:
            channels: The encoder's, D.
            depth: Its blocks.
            patch_size: Side of a token's patch in pixels.
            config: Sizes and inputs.

        Raises:
            ConfigError: If the reduction leaves no channel.
        """
        super().__init__()
        reduced = channels // config.reduction
        if reduced < 1:
            raise ConfigError(
                "SamAdapterConfig.reduction must leave at least one channel of "
                f"{channels}, got {config.reduction}"
            )
        self.config = config
        self.patch_projection = nn.Linear(channels, reduced)
        self.input_embeddings = nn.ModuleDict(
            {
                name: nn.Conv2d(3, reduced, patch_size, stride=patch_size)
                for name, _ in config.input_weights
            }
        )
        self.tune = nn.ModuleList(nn.Linear(reduced, reduced) for _ in range(depth))
        self.up = nn.Linear(reduced, channels)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)

    def features(self, patches: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Weigh and sum what is known of an image: F.

        Args:
            patches: The encoder's patch embedding [B, h, w, D].
            inputs: The task inputs [B, 3, H, W], by name.

        Returns:
            [B, h, w, D / reduction].
        """
        weight = self.patch_projection.weight
        total: Tensor = self.config.patch_weight * self.patch_projection(patches.to(weight.dtype))
        for name, share in self.config.input_weights:
            embedded = self.input_embeddings[name](inputs[name].to(weight.dtype))
            total = total + share * embedded.permute(0, 2, 3, 1)
        return total

    def forward(self, features: Tensor, block: int) -> Tensor:
        """Make what is added before a block: [B, h, w, D] of F [B, h, w, D / reduction]."""
        added: Tensor = self.up(F.gelu(self.tune[block](features)))
        return added


def attach_sam_adapter(
    image_encoder: ImageEncoderViT, config: SamAdapterConfig | None = None
) -> list[str]:
    """Freeze an encoder and give it an adapter, in place.

    Every check runs before the first change: a refused call leaves the encoder as it was.

    Args:
        image_encoder: SAM's module.
        config: Sizes and inputs; None takes the source's.

    Returns:
        The names of the new parameters, in module order.

    Raises:
        ConfigError: If the encoder has an adapter already, or the reduction leaves no channel.
    """
    if sam_adapter_of(image_encoder) is not None:
        raise ConfigError("this image_encoder has a SAM-Adapter already; detach it first")
    projection = image_encoder.patch_embed.proj
    adapter = SamAdapter(
        channels=projection.out_channels,
        depth=len(image_encoder.blocks),
        patch_size=projection.kernel_size[0],
        config=config or SamAdapterConfig(),
    )
    image_encoder.requires_grad_(False)
    image_encoder.sam_adapter = adapter.to(image_encoder.pos_embed.device)
    return [name for name, p in image_encoder.named_parameters() if p.requires_grad]


def detach_sam_adapter(image_encoder: ImageEncoderViT) -> SamAdapter | None:
    """Take an encoder's adapter off, in place; None if it has none."""
    adapter = sam_adapter_of(image_encoder)
    if adapter is not None:
        del image_encoder.sam_adapter
    return adapter


def sam_adapter_of(image_encoder: ImageEncoderViT) -> SamAdapter | None:
    """Give an encoder's adapter; None if it has none."""
    return getattr(image_encoder, "sam_adapter", None)


def sam_adapter_parameters(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters of the adapters in a module, in module order."""
    return [
        parameter
        for adapter in module.modules()
        if isinstance(adapter, SamAdapter)
        for parameter in adapter.parameters()
    ]


def read_task_inputs(
    image_encoder: ImageEncoderViT, images: Tensor, content_hw: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Make what an encoder's adapter wants to know of images beside their patches.

    Args:
        image_encoder: SAM's module, with an adapter or without.
        images: [B, 3, H, W], normalised, padded at the bottom and right.
        content_hw: (H, W) without the padding; None if there is none. Frequencies are those of the
            content: the edge of the padding is no part of the image, and would be another one in
            another size. In the padding inputs are 0.

    Returns:
        [B, 3, H, W] by name; empty without an adapter.
    """
    adapter = sam_adapter_of(image_encoder)
    if adapter is None:
        return {}
    height, width = images.shape[-2:]
    rows, columns = content_hw or (height, width)
    content = images[..., :rows, :columns]
    padding = (0, width - columns, 0, height - rows)
    return {
        name: F.pad(TASK_INPUTS[name](content, adapter.config), padding)
        for name, _ in adapter.config.input_weights
    }


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ConfigError(f"the rate of removed frequencies must be in 0..1, got {rate}")
