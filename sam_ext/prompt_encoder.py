"""The forward pass over SAM's prompt encoder modules, for any image size and mixed prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from segment_anything.modeling import PromptEncoder

__all__ = [
    "BACKGROUND",
    "BOX_BOTTOM_RIGHT",
    "BOX_TOP_LEFT",
    "FOREGROUND",
    "NOT_A_POINT",
    "dense_position_encoding",
    "embed_dense",
    "embed_tokens",
]

NOT_A_POINT, BACKGROUND, FOREGROUND, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 0, 1, 2, 3


def embed_tokens(
    prompt_encoder: PromptEncoder, coords: Tensor, labels: Tensor, *, input_size: tuple[int, int]
) -> Tensor:
    """Embed points and box corners, all as labelled points.

    Args:
        prompt_encoder: SAM's module.
        coords: [P, T, 2], (x, y) in pixels of the encoder's input.
        labels: [P, T], integers: one of the five constants of this module. SAM gives every object
            prompted by points alone one `NOT_A_POINT` token after the points, and puts a box's
            corners after the points.
        input_size: (H, W) of the encoder's input, padding included.

    Returns:
        Sparse prompt embeddings [P, T, 256].

    Source:
        Kirillov et al., arXiv:2304.02643, section A; `segment_anything`'s `PromptEncoder`.
    """
    height, width = input_size
    scale = torch.tensor([width, height], dtype=torch.float32, device=coords.device)
    encoding = prompt_encoder.pe_layer._pe_encoding((coords.float() + 0.5) / scale)
    kinds = torch.cat(
        [prompt_encoder.not_a_point_embed.weight]
        + [embedding.weight for embedding in prompt_encoder.point_embeddings]
    )  # [5, 256]
    encoding = encoding * (labels != NOT_A_POINT).unsqueeze(-1)
    embeddings: Tensor = encoding + kinds[labels.long() + 1]
    return embeddings


def embed_dense(
    prompt_encoder: PromptEncoder, mask_input: Tensor | None, *, grid_hw: tuple[int, int]
) -> Tensor:
    """Embed mask inputs, or say that there are none.

    Args:
        prompt_encoder: SAM's module.
        mask_input: Logits [P, 1, 4H, 4W] of an earlier answer, or None.
        grid_hw: The grid of image tokens (H, W).

    Returns:
        Dense prompt embeddings [P, 256, H, W]; [1, 256, H, W] when there is no mask.
    """
    if mask_input is not None:
        embedded: Tensor = prompt_encoder.mask_downscaling(mask_input)
        return embedded
    weight: Tensor = prompt_encoder.no_mask_embed.weight
    return weight.reshape(1, -1, 1, 1).expand(-1, -1, *grid_hw)


def dense_position_encoding(prompt_encoder: PromptEncoder, grid_hw: tuple[int, int]) -> Tensor:
    """Encode the position of every image token: [1, 256, H, W]."""
    encoding: Tensor = prompt_encoder.pe_layer(grid_hw)
    return encoding.unsqueeze(0)
