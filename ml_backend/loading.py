"""The models and their store of embeddings, as the settings say; for serving and for warming."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

from ml_backend.embeddings import EmbeddingStore
from ml_backend.models import Models, ServedModel
from ml_backend.registry import VERSION_PREFIX, Registry, Version
from ml_backend.settings import Settings
from sam_ext.adapters import load_adapter
from sam_ext.ba_sam import DEFAULT_BA_SAM, BaSamConfig, default_ba_sam
from sam_ext.checkpoints import find_stable_sam, load_sam, resolve_device
from sam_ext.colours import ColourConfig, default_colours
from sam_ext.config import MODELS
from sam_ext.errors import CheckpointError
from sam_ext.predictor import Predictor
from sam_ext.resolution import ResolutionPolicy, default_policy
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.stable_sam import StableSam, load_stable_sam

__all__ = [
    "ba_sam_config",
    "colour_config",
    "load_base",
    "load_models",
    "load_plugin",
    "load_predictor",
    "load_version",
    "make_predictor",
    "model_name",
    "open_registry",
    "open_store",
    "resolution_policy",
]


_COMPILED_PAD_TO = 128  # pixels: eight shapes of a long side of 1024


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


def load_version(
    sam: Sam, adapter: Path, settings: Settings, stable_sam: StableSam | None
) -> Predictor:
    """Make the predictor of a version.

    Args:
        sam: What `load_base` gave; it is not changed.
        adapter: The version's file; a plugin and settings in it come first.
        settings: How the service is set up.
        stable_sam: What `load_plugin` gave.

    Raises:
        CheckpointError: If the file is damaged, or belongs to another model.
    """
    adapted = load_adapter(sam, adapter)
    plugin = adapted.stable_sam or stable_sam
    return make_predictor(adapted.sam, settings, plugin, ba_sam=adapted.ba_sam)


def make_predictor(
    sam: Sam,
    settings: Settings,
    stable_sam: StableSam | None,
    *,
    ba_sam: BaSamConfig | None = None,
) -> Predictor:
    """Make the predictor of a model, the base or an adapted one, as the settings say.

    Args:
        sam: The model.
        settings: How the service is set up.
        stable_sam: The plugin, if there is one.
        ba_sam: Instead of what the settings say.
    """
    side: int = sam.image_encoder.img_size
    policy = resolution_policy(settings.sam_resolution, side)
    return Predictor(
        sam,
        ba_sam=ba_sam or ba_sam_config(settings, side),
        policy=replace(policy, pad_to=_COMPILED_PAD_TO) if settings.sam_compile else policy,
        precision=settings.sam_precision,
        stable_sam=stable_sam,
        colours=colour_config(settings, side),
        compiled=settings.sam_compile,
    )


def ba_sam_config(settings: Settings, train_side: int) -> BaSamConfig | None:
    """Read `SAM_BA_SAM` for a model that was trained on squares of `train_side` pixels."""
    if settings.sam_ba_sam is None:
        return default_ba_sam(train_side)
    return DEFAULT_BA_SAM if settings.sam_ba_sam else None


def colour_config(settings: Settings, train_side: int) -> ColourConfig | None:
    """Read `SAM_COLOURS` for a model that was trained on squares of `train_side` pixels."""
    if settings.sam_colours is None:
        return default_colours(train_side)
    return ColourConfig() if settings.sam_colours else None


def model_name(settings: Settings) -> str:
    """Give the base model's name as it stands in the names of versions."""
    model = settings.sam_model
    return model if model in MODELS else Path(model).stem


def load_models(
    settings: Settings,
    *,
    registry: Registry,
    store: EmbeddingStore | None = None,
    predictor: Predictor | None = None,
) -> Models:
    """Load the base model, and be ready to load the versions of projects.

    Args:
        settings: How the service is set up.
        registry: The versions.
        store: Where the embeddings of the models go; told whose they are.
        predictor: The base model, instead of the one that the settings name.

    Raises:
        CheckpointError: If its weights, or the plugin's, are missing, damaged or do not fit.
        ConfigError: If the device is none, or is not there.
    """

    @cache
    def base() -> Sam:
        return load_base(settings)

    @cache
    def plugin() -> StableSam | None:
        return load_plugin(base(), settings)

    if predictor is None:
        predictor = make_predictor(base(), settings, plugin())

    def load(version: Version) -> Predictor:
        adapted = load_version(base(), version.adapter, settings, plugin())
        if store is not None:
            store.belongs_to(adapted.embedding_fingerprint, version.folder)
        return adapted

    name = f"{VERSION_PREFIX}{model_name(settings)}-{predictor.fingerprint[:8]}"
    return Models(
        ServedModel(predictor=predictor, model_version=name),
        registry=registry,
        load=load,
        max_loaded=settings.models_loaded,
    )


def open_registry(settings: Settings) -> Registry:
    """Give the versions of all projects."""
    return Registry(settings.projects_dir, keep=settings.keep_versions)


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
