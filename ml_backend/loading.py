"""The model and its store of embeddings, as the settings say; for serving and for warming."""

from __future__ import annotations

import re

from ml_backend.embeddings import EmbeddingStore
from ml_backend.settings import Settings
from sam_ext.ba_sam import DEFAULT_BA_SAM, default_ba_sam
from sam_ext.checkpoints import find_stable_sam, load_sam, resolve_device
from sam_ext.errors import CheckpointError
from sam_ext.predictor import Predictor
from sam_ext.resolution import ResolutionPolicy, default_policy
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam, load_stable_sam

__all__ = [
    "load_base",
    "load_plugin",
    "load_predictor",
    "make_predictor",
    "open_store",
    "resolution_policy",
]


def load_predictor(settings: Settings) -> Predictor:
    """Load the model, with its plugin for sloppy prompts if it has one.

    Raises:
        CheckpointError: If its weights, or the plugin's, are missing, damaged or do not fit.
        ConfigError: If the device is none, or is not there.
    """
    sam = load_base(settings)
    return make_predictor(sam, settings, load_plugin(sam, settings))


def load_base(settings: Settings) -> Sam:
    """Load the model that everything starts from.

    Raises:
        CheckpointError: If its weights are missing, damaged or do not fit.
        ConfigError: If the device is none, or is not there.
    """
    return load_sam(
        settings.sam_model,
        weights_dir=settings.weights_dir,
        device=resolve_device(settings.sam_device),
        mirror_url=settings.sam_weights_url,
        offline=settings.sam_offline,
    )


def load_plugin(sam: Sam, settings: Settings) -> StableSam | None:
    """Load Stable-SAM's plugin as `SAM_STABLE` says; None if there is none to use.

    Args:
        sam: What `load_base` gave.
        settings: How the service is set up.

    Raises:
        CheckpointError: If it is damaged, belongs to another model, or is missing and wanted.
    """
    if settings.sam_stable is False:
        return None
    path = find_stable_sam(settings.sam_model, weights_dir=settings.weights_dir)
    if path is not None:
        return load_stable_sam(path, base=weights_fingerprint(sam))
    if settings.sam_stable:
        raise CheckpointError(
            f"SAM_STABLE must not be true without a plugin for {settings.sam_model}, which has "
            "none; train one (python -m sam_ext.training stable), or leave SAM_STABLE unset"
        )
    return None


def make_predictor(sam: Sam, settings: Settings, stable_sam: StableSam | None) -> Predictor:
    """Make the predictor of a model, the base or an adapted one, as the settings say."""
    side: int = sam.image_encoder.img_size
    default = default_ba_sam(side) if settings.sam_ba_sam is None else None
    return Predictor(
        sam,
        ba_sam=DEFAULT_BA_SAM if settings.sam_ba_sam else default,
        policy=resolution_policy(settings.sam_resolution, side),
        precision=settings.sam_precision,
        stable_sam=stable_sam,
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
