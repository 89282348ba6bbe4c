"""The forward pass over SAM's image encoder modules, for any grid of tokens.

At the training size it computes what `segment_anything`'s own forward pass computes; attention is
one fused call, and the position embedding and relative position tables are resized to the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_ext.errors import ConfigError

if TYPE_CHECKING:
    from segment_anything.modeling import ImageEncoderViT

__all__ = ["encode_image", "relative_position_bias", "resize_position_embedding"]


def encode_image(image_encoder: ImageEncoderViT, images: Tensor) -> Tensor:
    """Embed normalised images.

    Args:
        image_encoder: SAM's encoder module.
        images: [B, 3, H, W], normalised by SAM's pixel mean and standard deviation; H and W are
            multiples of the patch size and need not be equal.

    Returns:
        Image embeddings [B, 256, H / 16, W / 16].

    Raises:
        ConfigError: If H or W is not a multiple of the patch size.
    """
    patch_h, patch_w = image_encoder.patch_embed.proj.kernel_size
    if images.shape[-2] % patch_h or images.shape[-1] % patch_w:
        raise ConfigError(
            f"images must have sides that are multiples of {patch_h}, "
            f"got {tuple(images.shape[-2:])}; pad them at the bottom and right"
        )
    x: Tensor = image_encoder.patch_embed(images)  # [B, H, W, C]
    if image_encoder.pos_embed is not None:
        x = x + resize_position_embedding(image_encoder.pos_embed, x.shape[1:3])
    for block in image_encoder.blocks:
        x = _block(block, x)
    embeddings: Tensor = image_encoder.neck(x.permute(0, 3, 1, 2))
    return embeddings


def resize_position_embedding(pos_embed: Tensor, grid_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Resize the absolute position embedding [1, H, W, C] to another grid, bilinearly.

    At its own grid it is returned as it is.
    """
    if pos_embed.shape[1:3] == tuple(grid_hw):
        return pos_embed
    resized = F.interpolate(
        pos_embed.permute(0, 3, 1, 2).float(), size=tuple(grid_hw), mode="bilinear"
    )
    return resized.permute(0, 2, 3, 1).to(pos_embed.dtype)


def relative_position_bias(
    q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, size_hw: tuple[int, int]
) -> Tensor:
    r"""Compute the decomposed relative position bias of one attention layer.

    .. math:: B_{(i,j),(i',j')} = q_{ij} \cdot R^h_{i-i'} + q_{ij} \cdot R^w_{j-j'}

    Args:
        q: Unscaled queries [B, heads, H * W, D].
        rel_pos_h: Table [2S - 1, D] for rows; resized linearly when S is not H.
        rel_pos_w: The same for columns.
        size_hw: The grid (H, W).

    Returns:
        [B, heads, H * W, H * W], to be added to the attention logits.

    Source:
        Kirillov et al., arXiv:2304.02643; the arithmetic is `segment_anything`'s
        `add_decomposed_rel_pos`.
    """
    batch, heads, _, dim = q.shape
    height, width = size_hw
    table_h = _relative_table(rel_pos_h, height)  # [H, H, D]
    table_w = _relative_table(rel_pos_w, width)  # [W, W, D]
    grid = q.reshape(batch * heads, height, width, dim)
    # One matrix product per row (column) index instead of an einsum over all of them.
    rows = torch.matmul(grid, table_h.transpose(1, 2).to(q.dtype))  # [B * heads, H, W, H]
    columns = torch.matmul(grid.transpose(1, 2), table_w.transpose(1, 2).to(q.dtype)).transpose(
        1, 2
    )  # [B * heads, H, W, W]
    bias = rows.unsqueeze(-1) + columns.unsqueeze(-2)  # [B * heads, H, W, H, W]
    return bias.reshape(batch, heads, height * width, height * width)


def _relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """Index a table of relative positions as [query, key, D]."""
    length = 2 * size - 1
    if rel_pos.shape[0] != length:
        rel_pos = F.interpolate(rel_pos.float().t()[None], size=length, mode="linear")[0].t()
    position = torch.arange(size, device=rel_pos.device)
    return rel_pos[position[:, None] - position[None, :] + size - 1]


def _block(block: Any, x: Tensor) -> Tensor:
    """Run one transformer block on tokens [B, H, W, C]."""
    shortcut = x
    x = block.norm1(x)
    if block.window_size > 0:
        x = _windowed_attention(block.attn, x, block.window_size)
    else:
        x = _attention(block.attn, x)
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
    x = _attention(attn, x.reshape(-1, window, window, channels))
    x = x.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(batch, height + pad_h, width + pad_w, channels)
    return x[:, :height, :width] if pad_h or pad_w else x


def _attention(attn: Any, x: Tensor) -> Tensor:
    """Attend among the tokens of each map [B, H, W, C]."""
    batch, height, width, channels = x.shape
    qkv = attn.qkv(x).view(batch, height * width, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, H * W, D]
    bias = None
    if attn.use_rel_pos:
        bias = relative_position_bias(q, attn.rel_pos_h, attn.rel_pos_w, (height, width))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attn.scale)
    x = x.transpose(1, 2).reshape(batch, height, width, channels)
    out: Tensor = attn.proj(x)
    return out
