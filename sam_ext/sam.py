"""Builds SAM out of the segment-anything package's own modules."""

from __future__ import annotations

import hashlib
from functools import partial

from torch import nn

from sam_ext import _torchvision  # noqa: F401  # makes `import segment_anything` possible

# isort: split
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

from sam_ext.config import SamConfig
from sam_ext.sam_adapter import sam_adapter_of
from sam_ext.state_dicts import state_fingerprint

__all__ = ["Sam", "build_sam", "weights_fingerprint"]

PIXEL_MEAN = [123.675, 116.28, 103.53]
PIXEL_STD = [58.395, 57.12, 57.375]


def build_sam(config: SamConfig) -> Sam:
    """Build a SAM with random weights, in evaluation mode, on the CPU.

    Its state-dict keys are the official checkpoints' keys.

    Source:
        Kirillov et al., arXiv:2304.02643; sizes of ViT-B, L and H as in `segment_anything`.
    """
    sam = Sam(
        image_encoder=ImageEncoderViT(
            depth=config.depth,
            embed_dim=config.embed_dim,
            img_size=config.image_size,
            mlp_ratio=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=config.global_attn_indexes,
            window_size=config.window_size,
            out_chans=config.prompt_embed_dim,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.prompt_embed_dim,
            image_embedding_size=(config.grid_size, config.grid_size),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=config.prompt_embed_dim, mlp_dim=2048, num_heads=8
            ),
            transformer_dim=config.prompt_embed_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=PIXEL_MEAN,
        pixel_std=PIXEL_STD,
    )
    return sam.eval()


def weights_fingerprint(sam: Sam) -> str:
    """Digest a SAM's weights and sizes: equal exactly if every answer is equal."""
    # The tensors' shapes tell all sizes but the windows'.
    windows = [block.window_size for block in sam.image_encoder.blocks]
    text = f"{sam.image_encoder.img_size} {windows} {state_fingerprint(sam)}"
    if (adapter := sam_adapter_of(sam.image_encoder)) is not None:
        text += f" {adapter.config}"
    return hashlib.sha256(text.encode()).hexdigest()
