"""The forward pass over SAM's image encoder modules, for any grid of tokens.

At the training size it computes what `segment_anything`'s own forward pass computes; elsewhere the
position embedding and the relative position tables are resized to the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sam_ext.ba_sam import BaSamConfig, axis_bias, scaling_factor
from sam_ext.errors import ConfigError
from sam_ext.sam_adapter import read_task_inputs, sam_adapter_of

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

# What is computed together without gradients, so that it stays in the processor's cache.
_LOGITS_AT_ONCE = 3 << 19  # of attention; 3 MB of bf16
_TOKENS_AT_ONCE = 1024  # of all but global attention


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
    """Return an encoder that multiplies matrices in `dtype`: itself if it does, else a copy.

    Norms, tables and the neck keep their precision: they cost little, and most of the error would
    be theirs.
    """
    if image_encoder.patch_embed.proj.weight.dtype == dtype:
        return image_encoder
    prepared = copy.deepcopy(image_encoder)
    prepared.patch_embed.to(dtype)
    for block in prepared.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp):
            layer.to(dtype)
    return prepared


def encode_image(
    image_encoder: ImageEncoderViT,
    images: Tensor,
    *,
    ba_sam: BaSamConfig | None = None,
    pause: Callable[[], None] | None = None,
    checkpointing: bool = False,
    task_inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Embed normalised images.

    Args:
        image_encoder: SAM's encoder module, or what `prepare_encoder` made of it.
        images: [B, 3, H, W], normalised by SAM's pixel mean and standard deviation; H and W are
            multiples of the patch size and need not be equal.
        ba_sam: What global blocks do away from the training size; None is plain SAM.
        pause: Called between the blocks and within long attention; it may wait, while somebody
            more urgent works, or raise, to abandon the embedding.
        checkpointing: With gradients, keep the blocks' inputs alone and compute each block again
            on the way back: a third more work for a fraction of the memory.
        task_inputs: What `read_task_inputs` gave for these images, for an encoder with a
            SAM-Adapter; None reads them as images without padding.

    Returns:
        Image embeddings [B, 256, H / 16, W / 16], in the precision of the encoder's matrices.

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
    dtype = projection.weight.dtype
    x = image_encoder.patch_embed(images.to(dtype)).contiguous()  # [B, H, W, C]
    adapter = sam_adapter_of(image_encoder)
    if adapter is not None:
        if task_inputs is None:
            task_inputs = read_task_inputs(image_encoder, images)
        features = adapter.features(x, task_inputs)
    # From here to the end the sum that all blocks add to is in single precision at least.
    x = x + resize_position_embedding(image_encoder.pos_embed, x.shape[1:3])
    terms = _global_terms(image_encoder, ba_sam or BaSamConfig(), (x.shape[1], x.shape[2]))
    for index, block in enumerate(image_encoder.blocks):
        if pause is not None:
            pause()
        if adapter is not None:
            x = x + adapter(features, index)
        here = terms if block.window_size == 0 else _Terms()
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, here, pause, use_reentrant=False)
        elif block.window_size == 0 or torch.is_grad_enabled():
            x = _block(block, x, here, pause)
        else:
            # Strips of windows do not see each other, and one stays in the processor's cache.
            tokens = x.shape[0] * x.shape[2] * block.window_size
            rows = block.window_size * max(1, round(_TOKENS_AT_ONCE / tokens))
            for strip in torch.split(x, rows, dim=1):
                strip.copy_(_block(block, strip, here, pause))
    embeddings: Tensor = image_encoder.neck(x.permute(0, 3, 1, 2))
    return embeddings.to(dtype)


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
    if ba_sam.bias in ("full", "extrapolation", "stretch"):
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


def _block(block: Any, x: Tensor, terms: _Terms, pause: Callable[[], None] | None) -> Tensor:
    """Run one transformer block on tokens [B, H, W, C]."""
    size_hw = x.shape[1:3]
    dtype = block.mlp.lin1.weight.dtype
    qkv = block.attn.qkv(block.norm1(x).to(dtype))  # [B, H, W, 3C]
    if block.window_size > 0:
        # SAM fills windows up with zeros before the projection; one projected zero is enough.
        padding = block.attn.qkv(x.new_zeros(x.shape[3], dtype=dtype))
        windows = _split_windows(qkv, block.window_size, padding)
        attended = _join_windows(_attention(block.attn, windows, terms, pause), size_hw)
    else:
        attended = _attention(block.attn, qkv, terms, pause)
    x = x + block.attn.proj(attended)
    if torch.is_grad_enabled():
        return x + block.mlp(block.norm2(x).to(dtype))  # type: ignore[no-any-return]
    for part in torch.split(x.view(-1, x.shape[3]), _TOKENS_AT_ONCE):
        part += block.mlp(block.norm2(part).to(dtype))
    return x


def _split_windows(x: Tensor, window: int, padding: Tensor) -> Tensor:
    """Cut maps [B, H, W, C] into windows [M, S, S, C], filled up with `padding` [C]."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // window), -(-width // window)
    if height % window or width % window:
        filled = padding.expand(batch, rows * window, columns * window, channels).clone()
        filled[:, :height, :width] = x
        x = filled
    x = x.view(batch, rows, window, columns, window, channels).transpose(2, 3)
    return x.reshape(-1, window, window, channels)


def _join_windows(x: Tensor, size_hw: tuple[int, int] | torch.Size) -> Tensor:
    """Put windows [M, S, S, C] together to maps [B, H, W, C], leaving padding out."""
    height, width = size_hw
    window, channels = x.shape[2:]
    rows, columns = -(-height // window), -(-width // window)
    x = x.view(-1, rows, columns, window, window, channels).transpose(2, 3)
    x = x.reshape(-1, rows * window, columns * window, channels)
    return x[:, :height, :width]


def _attention(attn: Any, qkv: Tensor, terms: _Terms, pause: Callable[[], None] | None) -> Tensor:
    """Attend among the tokens of each map: [M, H, W, 3C] to [M, H, W, C].

    The relative position bias is a term for the key's row and one for its column. A query that is
    extended by its terms, times a key that is extended by its row and column as one-hot vectors, is
    the whole logit: no bias of H * W by H * W is built. On CPUs this beats adding it in pieces.
    """
    maps, height, width, _ = qkv.shape
    tokens, heads = height * width, attn.num_heads
    qkv = qkv.reshape(maps, tokens, 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [M, heads, H * W, D]
    rows, columns = relative_position_terms(q, attn.rel_pos_h, attn.rel_pos_w, (height, width))
    if terms.coefficient:
        rows, columns = rows * attn.ba_sam_coefficient, columns * attn.ba_sam_coefficient
    if terms.bias_h is not None and terms.bias_w is not None:
        rows = rows + terms.bias_h[:, None].to(rows)
        columns = columns + terms.bias_w.to(columns)
    row_is = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    column_is = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    place = torch.cat([row_is, column_is], 1).expand(maps, heads, -1, -1)
    q = torch.cat([q * (attn.scale * terms.factor), rows.flatten(2, 3), columns.flatten(2, 3)], 3)
    k = torch.cat([k, place], 3)  # [M, heads, H * W, D + H + W]
    x = _softmax_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), pause)
    return x.view(maps, heads, height, width, -1).permute(0, 2, 3, 1, 4).flatten(3)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, pause: Callable[[], None] | None) -> Tensor:
    """Compute softmax(q k^T) v for [G, N, E], [G, N, E] and [G, N, D], in pieces.

    On CPUs this is more than twice as fast as PyTorch's fused attention, as long as a piece's
    logits stay in the processor's cache.
    """
    groups, tokens, _ = q.shape
    if torch.is_grad_enabled():
        return (q @ k.transpose(1, 2)).softmax(2) @ v
    at_once = max(1, _LOGITS_AT_ONCE // tokens**2)
    queries = min(tokens, max(1, _LOGITS_AT_ONCE // tokens))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for group in range(0, groups, at_once):
        here = slice(group, group + at_once)
        k_t, v_here = k[here].transpose(1, 2), v[here].contiguous()
        for query in range(0, tokens, queries):
            if pause is not None:
                pause()
            # Not `@`, which copies a transposed operand.
            logits = torch.bmm(q[here, query : query + queries], k_t)
            out[here, query : query + queries] = torch.bmm(logits.softmax(2), v_here)
    return out
