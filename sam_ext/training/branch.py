"""One SAM asked about one view, with gradients: what every adaptation does in a step."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_ext.ba_sam import BaSamConfig
from sam_ext.image_encoder import encode_image
from sam_ext.mask_decoder import decode_masks
from sam_ext.predictor import ObjectPrompt, prompt_tokens
from sam_ext.prompt_encoder import dense_position_encoding, embed_dense, embed_tokens
from sam_ext.sam import Sam
from sam_ext.sam_adapter import read_task_inputs
from sam_ext.stable_sam import StableSam, plugin_for
from sam_ext.training.parts import MASK_STRIDE

__all__ = ["Branch", "Group", "Seen", "chosen_masks", "pixels_of", "token_groups", "unpadded"]


class Group(NamedTuple):
    """Objects asked for by equally many tokens, all of them by several points, or none."""

    places: Tensor
    """[K], where they stand among all objects."""
    coords: Tensor
    """[K, T, 2] in pixels of the view."""
    labels: Tensor
    """[K, T], as `embed_tokens` takes them."""
    is_several_points: bool
    """Whether a plugin for these alone takes part."""


class Seen(NamedTuple):
    """What a branch sees of P objects, padding left out."""

    embeddings: Tensor
    """[256, H / 16, W / 16]."""
    logits: Tensor
    """[P, 4, H / 4, W / 4]: the single mask, then the three of a point."""
    ious: Tensor
    """[P, 4]."""


class Branch(nn.Module):
    """One SAM, with the plugin that it is served with."""

    def __init__(
        self,
        sam: Sam,
        stable_sam: StableSam | None,
        *,
        ba_sam: BaSamConfig | None,
        checkpointing: bool,
    ) -> None:
        """Take the model over.

        Args:
            sam: What learns.
            stable_sam: Copied, and frozen: gradients pass through it, and reach nothing in it.
            ba_sam: What the encoder does away from its training size; None is plain SAM.
            checkpointing: As `encode_image` takes it.
        """
        super().__init__()
        self.sam = sam
        self.stable_sam = copy.deepcopy(stable_sam)
        if self.stable_sam is not None:
            self.stable_sam.to(sam.device).requires_grad_(False)
        self._ba_sam, self._checkpointing = ba_sam, checkpointing

    def forward(self, image: Tensor, groups: Sequence[Group], padded_size: tuple[int, int]) -> Seen:
        """Ask for objects of an image; all groups together have P.

        Args:
            image: [3, H, W] uint8, of the encoder's input size.
            groups: How the objects are asked for.
            padded_size: To which (H, W) it is padded, as `Predictor.padded_size` has it.
        """
        sam = self.sam
        patch: int = sam.image_encoder.patch_embed.proj.kernel_size[0]
        height, width = image.shape[-2:]
        pixels = (image.float() - sam.pixel_mean) / sam.pixel_std
        pixels = F.pad(pixels, (0, padded_size[1] - width, 0, padded_size[0] - height))
        embeddings = encode_image(
            sam.image_encoder,
            pixels[None],
            ba_sam=self._ba_sam,
            checkpointing=self._checkpointing,
            task_inputs=read_task_inputs(sam.image_encoder, pixels[None], (height, width)),
        )
        grid = (embeddings.shape[-2], embeddings.shape[-1])
        image_pe = dense_position_encoding(sam.prompt_encoder, grid)
        dense = embed_dense(sam.prompt_encoder, None, grid_hw=grid)
        decoded = [
            decode_masks(
                sam.mask_decoder,
                embeddings,
                image_pe=image_pe,
                sparse_prompt_embeddings=embed_tokens(
                    sam.prompt_encoder, group.coords, group.labels, input_size=padded_size
                ),
                dense_prompt_embeddings=dense,
                stable_sam=plugin_for(self.stable_sam, is_several_points=group.is_several_points),
            )
            for group in groups
        ]
        order = torch.cat([group.places for group in groups]).argsort()
        logits = torch.cat([one.low_res_logits for one in decoded])[order]
        return Seen(
            embeddings=unpadded(embeddings, image, patch)[0].float(),
            logits=unpadded(logits, image, MASK_STRIDE).float(),
            ious=torch.cat([one.iou_predictions for one in decoded])[order].float(),
        )


def token_groups(prompts: Sequence[ObjectPrompt | None], device: torch.device) -> list[Group]:
    """Write prompts as SAM's labelled points, one group for each pass of the decoder.

    Args:
        prompts: P objects; None asks without any prompt.
        device: Of the model.
    """
    tokens = [prompt_tokens(prompt) for prompt in prompts]
    alike: defaultdict[tuple[int, bool], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        is_several_points = prompt is not None and prompt.is_several_points
        alike[len(tokens[index][1]), is_several_points].append(index)
    return [
        Group(
            places=torch.tensor(members, device=device),
            coords=torch.tensor(
                np.stack([tokens[i][0] for i in members]), dtype=torch.float32, device=device
            ),
            labels=torch.tensor(np.stack([tokens[i][1] for i in members]), device=device),
            is_several_points=is_several_points,
        )
        for (_, is_several_points), members in alike.items()
    ]


def unpadded(maps: Tensor, image: Tensor, stride: int) -> Tensor:
    """Cut maps [..., h, w], one pixel for `stride` of the image's, off where the image ends."""
    height, width = image.shape[-2:]
    return maps[..., : -(-height // stride), : -(-width // stride)]


def pixels_of(image: Any, device: torch.device) -> Tensor:
    """Bring an array [H, W, 3] to the device as [3, H, W]."""
    return torch.tensor(image).permute(2, 0, 1).to(device)


def chosen_masks(logits: Tensor, token: Tensor) -> Tensor:
    """Take one of the four masks [P, 4, H, W] of each object: [P, H, W]."""
    return logits[torch.arange(len(token), device=logits.device), token]
