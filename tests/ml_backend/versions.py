"""Trained versions for the tests: real adapter files of the small SAM."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from ml_backend.registry import Registry, Version
from sam_ext.adapters import save_adapter
from sam_ext.lora import attach_lora, lora_parameters
from sam_ext.sam import Sam


def write_adapter(sam: Sam, path: Path, *, seed: int = 0) -> Path:
    """Write an adapter that changes the answers."""
    adapted = copy.deepcopy(sam)
    attach_lora(adapted.image_encoder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(adapted.image_encoder):
            parameter.normal_(std=0.5, generator=generator)
    save_adapter(adapted, path, base=sam, method="wesam")
    return path


def add_version(
    registry: Registry,
    project: str,
    sam: Sam,
    path: Path,
    *,
    seed: int = 0,
    name: str = "small",
    **manifest: object,
) -> Version:
    """Add a version to a project; it is not active."""
    adapter = write_adapter(sam, path, seed=seed)
    return registry.project(project).add(adapter, {"model": name} | manifest)
