"""The forward pass over SAM's mask decoder modules, for prompts of several images at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import MaskDecoder

__all__ = ["decode_masks"]


def decode_masks(
    mask_decoder: MaskDecoder,
    image_embeddings: Tensor,
    *,
    image_pe: Tensor,
    sparse_prompt_embeddings: Tensor,
    dense_prompt_embeddings: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predict the four masks of every prompted object: the single mask, then the three of a point.

    Args:
        mask_decoder: SAM's module.
        image_embeddings: [B, 256, H, W].
        image_pe: [1, 256, H, W], the positions of the image tokens.
        sparse_prompt_embeddings: [B * P, T, 256]; the P objects of one image lie together.
        dense_prompt_embeddings: [B * P, 256, H, W], or [1, 256, H, W] for all.

    Returns:
        Low-resolution logits [B * P, 4, 4H, 4W] and IoU predictions [B * P, 4].
    """
    objects = sparse_prompt_embeddings.shape[0]
    per_image = objects // image_embeddings.shape[0]
    output_tokens = torch.cat([mask_decoder.iou_token.weight, mask_decoder.mask_tokens.weight])
    tokens = torch.cat(
        [output_tokens.expand(objects, -1, -1), sparse_prompt_embeddings], dim=1
    )  # [B * P, 5 + T, 256]
    src = image_embeddings.repeat_interleave(per_image, dim=0) + dense_prompt_embeddings
    tokens, image_tokens = mask_decoder.transformer(src, image_pe.expand_as(src), tokens)
    src = image_tokens.transpose(1, 2).reshape(src.shape)
    upscaled = mask_decoder.output_upscaling(src)  # [B * P, 32, 4H, 4W]
    hyper = torch.stack(
        [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(mask_decoder.output_hypernetworks_mlps)],
        dim=1,
    )  # [B * P, 4, 32]
    low_res_masks = (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    iou_predictions: Tensor = mask_decoder.iou_prediction_head(tokens[:, 0])
    return low_res_masks, iou_predictions
