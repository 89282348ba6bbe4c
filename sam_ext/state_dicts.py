"""State dicts of a model or a plugin: told apart, checked, and written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sam_ext.errors import CheckpointError

__all__ = ["check_state", "save_state", "state_fingerprint"]


def check_state(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse what a file holds if it is not what a module has.

    Args:
        path: The file, for the message.
        state: What it holds.
        wanted: The module's state dict.

    Raises:
        CheckpointError: If keys are missing, unknown, or of another shape.
    """
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state.keys())
        if state[key].shape != wanted[key].shape
    ]
    if missing or unexpected or shapes:
        raise CheckpointError.from_keys(
            str(path), missing=missing, unexpected=unexpected, shapes=shapes
        )


def save_state(state: dict[str, Tensor], path: Path, *, metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors; the file appears whole or not at all.

    Args:
        state: Contiguous tensors on the CPU.
        path: The file, replaced if it is there.
        metadata: Texts for its header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def state_fingerprint(module: nn.Module) -> str:
    """Digest the names, types, shapes and values of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
