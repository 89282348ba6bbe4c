"""The model and its store of embeddings, as the settings say; for serving and for warming."""

from __future__ import annotations

import re

from ml_backend.embeddings import EmbeddingStore
from ml_backend.settings import Settings
from sam_ext.ba_sam import DEFAULT_BA_SAM
from sam_ext.checkpoints import load_sam, resolve_device
from sam_ext.predictor import Predictor
from sam_ext.resolution import ResolutionPolicy, default_policy

__all__ = ["load_predictor", "open_store", "resolution_policy"]


def load_predictor(settings: Settings) -> Predictor:
    """Load the model.

    Raises:
        CheckpointError: If its weights are missing, damaged or do not fit.
        ConfigError: If the device is none, or is not there.
    """
    sam = load_sam(
        settings.sam_model,
        weights_dir=settings.weights_dir,
        device=resolve_device(settings.sam_device),
        mirror_url=settings.sam_weights_url,
        offline=settings.sam_offline,
    )
    return Predictor(
        sam,
        ba_sam=DEFAULT_BA_SAM if settings.sam_ba_sam else None,
        policy=resolution_policy(settings.sam_resolution, sam.image_encoder.img_size),
        precision=settings.sam_precision,
    )


def open_store(settings: Settings) -> EmbeddingStore | None:
    """Give the embeddings on disk; None if they are switched off."""
    if not settings.embedding_disk_bytes:
        return None
    return EmbeddingStore(settings.embeddings_dir, max_bytes=settings.embedding_disk_bytes)


def resolution_policy(setting: str, train_side: int) -> ResolutionPolicy:
    """Read `SAM_RESOLUTION`, which the settings have checked.

    Args:
        setting: Its value.
        train_side: Side of the model's training square in pixels.
    """
    mode, _, rest = setting.partition(":")
    numbers = [int(number) for number in re.findall(r"\d+", rest)]
    if mode == "square":
        return ResolutionPolicy()
    if mode == "budget":
        (tokens,) = numbers or [(train_side // 16) ** 2]
        return ResolutionPolicy(mode="budget", max_tokens=tokens)
    if numbers:
        return ResolutionPolicy(mode="native", min_side=numbers[0], max_side=numbers[1])
    return default_policy(train_side)
