"""The forward pass over SAM's mask decoder modules, for prompts of several images at once.

It computes what `segment_anything`'s own forward pass computes, in another order. An object has few
tokens and an image has many, so the projections of cross-attention are applied to the few: a
logit `(W_q x) . (W_k y)` is `(W_k^T W_q x) . y`, and the image's tokens are neither projected nor
split into heads. What all objects of an image share is computed once. The transposed convolutions,
whose strides are their kernels, are linear layers on tokens, and only the finished masks are put
into rows and columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_ext.stable_sam import StableSam

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder

__all__ = ["Decoded", "decode_masks"]

_SHIFTED_LAYER = 1  # where Stable-SAM's tokens are read: the decoder's second layer
_SINGLE_MASK_TOKEN = 1  # the first one predicts the IoUs


class Decoded(NamedTuple):
    """The answers to O prompted objects."""

    low_res_logits: Tensor
    """[O, 4, 4H, 4W]: the single mask, then the three of a point."""
    iou_predictions: Tensor
    """[O, 4]."""
    routing: Tensor | None
    """[O, 2]: how much of the shifted and the plain image tokens was read; None for plain SAM."""


def decode_masks(
    mask_decoder: MaskDecoder,
    image_embeddings: Tensor,
    *,
    image_pe: Tensor,
    sparse_prompt_embeddings: Tensor,
    dense_prompt_embeddings: Tensor,
    stable_sam: StableSam | None = None,
    routing: Tensor | None = None,
) -> Decoded:
    """Predict the four masks of every prompted object: the single mask, then the three of a point.

    Args:
        mask_decoder: SAM's module.
        image_embeddings: [B, 256, H, W].
        image_pe: [1, 256, H, W], the positions of the image tokens.
        sparse_prompt_embeddings: [B * P, T, 256]; the P objects of one image lie together.
        dense_prompt_embeddings: [B * P, 256, H, W], or [1, 256, H, W] for all.
        stable_sam: Plugin for sloppy prompts.
        routing: [2], weights in place of the plugin's router.
    """
    objects = sparse_prompt_embeddings.shape[0]
    images, _, height, width = image_embeddings.shape
    output_tokens = torch.cat([mask_decoder.iou_token.weight, mask_decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(objects, -1, -1), sparse_prompt_embeddings], dim=1)
    keys = image_embeddings
    if dense_prompt_embeddings.shape[0] != 1:
        keys = keys.repeat_interleave(objects // images, dim=0)
    dtype = _compute_dtype(image_embeddings)
    keys = _as_tokens((keys + dense_prompt_embeddings).to(dtype))
    tokens, keys, routed = _two_way(
        mask_decoder.transformer,
        tokens,
        keys,
        _as_tokens(image_pe.to(dtype)),
        grid_hw=(height, width),
        stable_sam=stable_sam,
        routing=routing,
    )
    hyper = torch.stack(
        [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(mask_decoder.output_hypernetworks_mlps)],
        dim=1,
    )  # [B * P, 4, 32]
    upscaled = _upscale(mask_decoder.output_upscaling, keys)  # [B * P, H * W * 16, 32]
    masks = (upscaled @ hyper.transpose(1, 2)).view(objects, height, width, 2, 2, 2, 2, -1)
    low_res_masks = masks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(
        objects, -1, 4 * height, 4 * width
    )
    iou_predictions: Tensor = mask_decoder.iou_prediction_head(tokens[:, 0])
    return Decoded(low_res_masks, iou_predictions, routed)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Tell in what precision the image's tokens are kept."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _as_tokens(x: Tensor) -> Tensor:
    """Bring [B, C, H, W] into the order [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2).contiguous()


def _two_way(
    transformer: Any,
    tokens: Tensor,
    keys: Tensor,
    image_pe: Tensor,
    *,
    grid_hw: tuple[int, int],
    stable_sam: StableSam | None,
    routing: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Let tokens [O, T, C] and an image's tokens attend to each other.

    Args:
        transformer: SAM's `TwoWayTransformer`.
        tokens: [O, T, C].
        keys: [G, N, C], G a divisor of O: the image's tokens, those of one image for O / G objects.
        image_pe: [1, N, C].
        grid_hw: (H, W), N of them.
        stable_sam: Shifts what the tokens read in the second layer, and nothing else.
        routing: See `decode_masks`.

    Returns:
        Tokens [O, T, C], the image's tokens [O, N, C] and the routing [O, 2].
    """
    queries, used = tokens, None
    for index, layer in enumerate(transformer.layers):
        if layer.skip_first_layer_pe:
            queries = layer.self_attn(q=queries, k=queries, v=queries)
        else:
            placed = queries + tokens
            queries = queries + layer.self_attn(q=placed, k=placed, v=queries)
        queries = layer.norm1(queries)
        placed_keys = keys + image_pe
        read, placed_read = keys, placed_keys
        if stable_sam is not None and index == _SHIFTED_LAYER:
            read, used = stable_sam(keys, queries[:, _SINGLE_MASK_TOKEN], grid_hw, routing=routing)
            placed_read = read + image_pe
        queries = queries + _tokens_to_image(
            layer.cross_attn_token_to_image, queries + tokens, placed_read, read
        )
        queries = layer.norm2(queries)
        queries = layer.norm3(queries + layer.mlp(queries))
        change = _image_to_tokens(
            layer.cross_attn_image_to_token, placed_keys, queries + tokens, queries
        )  # [O, N, C]
        groups, length, channels = keys.shape
        keys = keys[:, None] + change.view(groups, -1, length, channels)
        keys = layer.norm4(keys.view(-1, length, channels))
    queries = queries + _tokens_to_image(
        transformer.final_attn_token_to_image, queries + tokens, keys + image_pe, keys
    )
    return transformer.norm_final_attn(queries), keys, used


def _tokens_to_image(attn: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from tokens [O, T, C] to image tokens [G, N, C]; the keys' bias has no effect."""
    objects, length, channels = x.shape
    groups = keys.shape[0]
    scale = (attn.internal_dim // attn.num_heads) ** -0.5
    folded = _times_heads(attn.q_proj(x) * scale, _heads(attn, attn.k_proj.weight))
    folded = folded.view(groups, -1, channels)  # [G, O / G * heads * T, C]
    weights = (folded.to(keys.dtype) @ keys.transpose(1, 2)).softmax(dim=-1)
    pooled = (weights @ values).view(objects, attn.num_heads, length, channels)
    pooled = pooled.transpose(0, 1).reshape(attn.num_heads, -1, channels)
    heads = pooled @ _heads(attn, attn.v_proj.weight).transpose(1, 2).to(pooled.dtype)
    heads = heads.view(attn.num_heads, objects, length, -1).permute(1, 2, 0, 3)
    out: Tensor = attn.out_proj(heads.reshape(objects, length, -1) + attn.v_proj.bias)
    return out


def _image_to_tokens(attn: Any, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from image tokens [G, N, C] to tokens [O, T, C]: [O, N, C]."""
    objects, length, _ = keys.shape
    groups, count, channels = x.shape
    scale = (attn.internal_dim // attn.num_heads) ** -0.5
    projected = attn.k_proj(keys) * scale
    folded = _times_heads(projected, _heads(attn, attn.q_proj.weight)).view(groups, -1, channels)
    constant = _times_heads(projected, _heads(attn, attn.q_proj.bias[:, None]))
    logits = folded.to(x.dtype) @ x.transpose(1, 2)  # [G, O / G * heads * T, N]
    logits = logits.view(objects, attn.num_heads, length, count)
    weights = (logits + constant.view(objects, attn.num_heads, length, 1)).softmax(dim=2)
    projection = attn.out_proj.weight.t().reshape(attn.num_heads, -1, channels)
    folded_values = _times_heads(attn.v_proj(values), projection)  # [O, heads * T, C]
    out = weights.view(objects, -1, count).transpose(1, 2) @ folded_values.to(weights.dtype)
    biased: Tensor = out + attn.out_proj.bias.to(out.dtype)
    return biased


def _heads(attn: Any, weight: Tensor) -> Tensor:
    """Split a projection [heads * D, C] by heads: [heads, D, C]."""
    return weight.view(attn.num_heads, -1, weight.shape[1])


def _times_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply each head's share of x [O, T, heads * D] by its weight [heads, D, C].

    Returns:
        [O, heads * T, C].
    """
    heads, dim, channels = weight.shape
    objects, length, _ = x.shape
    by_head = x.view(objects, length, heads, dim).permute(2, 0, 1, 3).reshape(heads, -1, dim)
    product = (by_head @ weight.to(x.dtype)).view(heads, objects, length, channels)
    return product.transpose(0, 1).reshape(objects, heads * length, channels)


def _upscale(upscaling: Any, x: Tensor) -> Tensor:
    """Make 16 tokens of every image token: [O, N, C] to [O, N * 16, C / 8].

    The 16 are ordered as (row, column) of the first step, then of the second.
    """
    first, norm, activation, second, last_activation = upscaling
    x = _transposed_convolution(first, x)
    x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    x = activation(x)
    upscaled: Tensor = last_activation(_transposed_convolution(second, x))
    return upscaled


def _transposed_convolution(convolution: Any, x: Tensor) -> Tensor:
    """Apply a 2 x 2 convolution of stride 2 to tokens: [O, N, C] to [O, N * 4, C']."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 * 2 * C', C]
    out = F.linear(x, weight, convolution.bias.repeat(4))
    return out.view(x.shape[0], -1, convolution.out_channels)
