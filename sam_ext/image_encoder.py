"""The forward pass over SAM's image encoder modules, for any grid of tokens.

At the training size it computes what `segment_anything`'s own forward pass computes; attention is
one fused call, and the position embedding and relative position tables are resized to the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_ext.ba_sam import BaSamConfig, axis_bias, scaling_factor
from sam_ext.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

__all__ = [
    "Precision",
    "encode_image",
    "prepare_encoder",
    "relative_position_terms",
    "resize_position_embedding",
    "resolve_precision",
]

Precision = Literal["auto", "bf16", "fp32"]


def resolve_precision(device: torch.device, wanted: Precision = "auto") -> torch.dtype:
    """Choose the encoder's precision.

    `auto` is bf16 where the device multiplies bf16 matrices faster than single precision: CPUs with
    AVX-512-BF16 or AMX, NVIDIA GPUs of compute capability 8.0 and later. Elsewhere it is fp32.

    Raises:
        ConfigError: If `wanted` is none of the three.
    """
    if wanted not in get_args(Precision):
        raise ConfigError(
            f"precision must be one of {', '.join(get_args(Precision))}, got {wanted!r}"
        )
    fast = wanted == "bf16"
    if wanted == "auto" and device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif wanted == "auto" and device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def prepare_encoder(image_encoder: ImageEncoderViT, dtype: torch.dtype) -> ImageEncoderViT:
    """Return the encoder with weights of `dtype`: itself if it has them, else a copy."""
    if image_encoder.patch_embed.proj.weight.dtype == dtype:
        return image_encoder
    return copy.deepcopy(image_encoder).to(dtype)


def encode_image(
    image_encoder: ImageEncoderViT,
    images: Tensor,
    *,
    ba_sam: BaSamConfig | None = None,
    pause: Callable[[], None] | None = None,
) -> Tensor:
    """Embed normalised images.

    Args:
        image_encoder: SAM's encoder module; its weights' precision is that of the computation.
        images: [B, 3, H, W], normalised by SAM's pixel mean and standard deviation; H and W are
            multiples of the patch size and need not be equal.
        ba_sam: What global blocks do away from the training size; None is plain SAM.
        pause: Called between the blocks and within long attention; it may wait, while somebody
            more urgent works, or raise, to abandon the embedding.

    Returns:
        Image embeddings [B, 256, H / 16, W / 16].

    Raises:
        ConfigError: If H or W is not a multiple of the patch size, or `ba_sam` is `official` and
            the encoder has no coefficients.
    """
    projection = image_encoder.patch_embed.proj
    patch_h, patch_w = projection.kernel_size
    if images.shape[-2] % patch_h or images.shape[-1] % patch_w:
        raise ConfigError(
            f"images must have sides that are multiples of {patch_h}, "
            f"got {tuple(images.shape[-2:])}; pad them at the bottom and right"
        )
    x: Tensor = image_encoder.patch_embed(images.to(projection.weight.dtype))  # [B, H, W, C]
    x = x + resize_position_embedding(image_encoder.pos_embed, x.shape[1:3])
    terms = _global_terms(image_encoder, ba_sam or BaSamConfig(), (x.shape[1], x.shape[2]))
    for block in image_encoder.blocks:
        if pause is not None:
            pause()
        x = _block(block, x, terms)
    embeddings: Tensor = image_encoder.neck(x.permute(0, 3, 1, 2))
    return embeddings


class _Terms(NamedTuple):
    """What BA-SAM changes in the attention among some tokens; the defaults are plain SAM."""

    factor: float = 1.0
    """Multiplies `q . k`."""
    bias_h: Tensor | None = None
    """[H, H], added to the logits by the rows of query and key."""
    bias_w: Tensor | None = None
    """[W, W], the same by columns."""
    coefficient: bool = False
    """Whether the layer's coefficient multiplies its relative position bias."""


def _global_terms(
    image_encoder: ImageEncoderViT, ba_sam: BaSamConfig, grid_hw: tuple[int, int]
) -> _Terms:
    """Work out what the config asks of the global blocks at this grid."""
    height, width = grid_hw
    train_side = image_encoder.img_size // image_encoder.patch_embed.proj.kernel_size[0]
    factor, bias_h, bias_w = 1.0, None, None
    if ba_sam.scaling_factor:
        factor = scaling_factor(height * width, train_side**2)
    if ba_sam.bias in ("full", "extrapolation"):
        bias_h = axis_bias(height, train_side, ba_sam.bias, ba_sam.beta)
        bias_w = axis_bias(width, train_side, ba_sam.bias, ba_sam.beta)
    official = ba_sam.bias == "official"
    if official and not all(
        hasattr(block.attn, "ba_sam_coefficient")
        for block in image_encoder.blocks
        if block.window_size == 0
    ):
        raise ConfigError(
            "BaSamConfig.bias must not be official for an image_encoder without coefficients; "
            "call attach_coefficients first"
        )
    return _Terms(factor, bias_h, bias_w, official)


def resize_position_embedding(pos_embed: Tensor, grid_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Resize the absolute position embedding [1, H, W, C] to another grid, bilinearly.

    At its own grid it is returned as it is.
    """
    if pos_embed.shape[1:3] == tuple(grid_hw):
        return pos_embed
    channels_first = _at_least_float(pos_embed.permute(0, 3, 1, 2))
    resized = F.interpolate(channels_first, size=tuple(grid_hw), mode="bilinear")
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


def relative_position_terms(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, size_hw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    r"""Compute the two terms of one attention layer's relative position bias.

    .. math:: B_{(i,j),(i',j')} = q_{ij} \cdot R^h_{i-i'} + q_{ij} \cdot R^w_{j-j'}

    Args:
        q: Unscaled queries [B, heads, H * W, D].
        rel_pos_h: Table [2S - 1, D] for rows; resized linearly when S is not H.
        rel_pos_w: The same for columns.
        size_hw: The grid (H, W).

    Returns:
        The first term by the key's row i', [B, heads, H, W, H], and the second by its column j',
        [B, heads, H, W, W].

    Source:
        Kirillov et al., arXiv:2304.02643; the arithmetic is `segment_anything`'s
        `add_decomposed_rel_pos`.
    """
    height, width = size_hw
    table_h = _relative_table(rel_pos_h, height).to(q.dtype)  # [H, H, D]
    table_w = _relative_table(rel_pos_w, width).to(q.dtype)  # [W, W, D]
    grid = q.reshape(*q.shape[:2], height, width, q.shape[3])
    # One matrix product per row (column) index instead of an einsum over all of them.
    rows = grid @ table_h.transpose(1, 2)
    columns = (grid.transpose(2, 3) @ table_w.transpose(1, 2)).transpose(2, 3)
    return rows, columns


def _relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """Index a table of relative positions as [query, key, D]."""
    length = 2 * size - 1
    if rel_pos.shape[0] != length:
        channels_first = _at_least_float(rel_pos).t()[None]
        rel_pos = F.interpolate(channels_first, size=length, mode="linear")[0].t()
    position = torch.arange(size, device=rel_pos.device)
    return rel_pos[position[:, None] - position[None, :] + size - 1]


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _block(block: Any, x: Tensor, global_terms: _Terms) -> Tensor:
    """Run one transformer block on tokens [B, H, W, C]."""
    shortcut = x
    x = block.norm1(x)
    if block.window_size > 0:
        x = _windowed_attention(block.attn, x, block.window_size)
    else:
        x = _attention(block.attn, x, global_terms)
    x = shortcut + x
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def _windowed_attention(attn: Any, x: Tensor, window: int) -> Tensor:
    batch, height, width, channels = x.shape
    pad_h, pad_w = -height % window, -width % window
    if pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // window, (width + pad_w) // window
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    x = _attention(attn, x.reshape(-1, window, window, channels), _Terms())
    x = x.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(batch, height + pad_h, width + pad_w, channels)
    return x[:, :height, :width] if pad_h or pad_w else x


def _attention(attn: Any, x: Tensor, terms: _Terms) -> Tensor:
    """Attend among the tokens of each map [B, H, W, C]."""
    batch, height, width, channels = x.shape
    qkv = attn.qkv(x).view(batch, height * width, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, H * W, D]
    rows, columns = relative_position_terms(q, attn.rel_pos_h, attn.rel_pos_w, (height, width))
    if terms.coefficient:
        rows, columns = rows * attn.ba_sam_coefficient, columns * attn.ba_sam_coefficient
    if terms.bias_h is not None and terms.bias_w is not None:
        rows = rows + terms.bias_h[:, None].to(rows)
        columns = columns + terms.bias_w.to(columns)
    bias = rows.unsqueeze(-1) + columns.unsqueeze(-2)  # [B, heads, H, W, H, W]
    bias = bias.flatten(4).flatten(2, 3)  # [B, heads, H * W, H * W]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale * terms.factor)
    x = x.transpose(1, 2).reshape(batch, height, width, channels)
    out: Tensor = attn.proj(x)
    return out
