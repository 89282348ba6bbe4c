"""Adapter files: what a training left behind, put on the SAM that it was trained on."""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.lora import attach_lora, load_lora_state, lora_state, merge_lora
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.state_dicts import check_state

__all__ = ["apply_adapter"]


def apply_adapter(sam: Sam, path: Path) -> Sam:
    """Make the SAM that an adapter file describes.

    Nothing is built before the whole file was read and found to fit.

    Args:
        sam: The model that the adapter was trained on; it is not changed.
        path: What `save_lora` wrote.

    Returns:
        A new SAM of plain modules, in evaluation mode, on the same device.

    Raises:
        CheckpointError: If the file is missing or damaged, of an unknown method, of another base
            model, or holds tensors that do not fit or are not finite.
    """
    state, metadata = _read(path)
    method = metadata.get("method")
    if method != "lora":
        raise CheckpointError(
            f"{path} must be an adapter of the method 'lora', got {method!r}; "
            "it is of a newer version of this software, or no adapter"
        )
    fingerprint = weights_fingerprint(sam)
    if metadata.get("base") != fingerprint:
        raise CheckpointError(
            f"{path} must be an adapter of the model {fingerprint[:8]}, got one of "
            f"{str(metadata.get('base'))[:8]}; load the model it was trained on, or train anew"
        )
    adapted: Sam = copy.deepcopy(sam)
    try:
        attach_lora(adapted.image_encoder, rank=int(metadata.get("rank", "")))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{path} must have LoRA's rank in its header, got {metadata.get('rank')!r}; "
            "it is damaged, train anew"
        ) from error
    check_state(path, state, lora_state(adapted))
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{path} must hold finite numbers, got {len(bad)} tensors that do not "
            f"(first: {bad[0]}); it is damaged, train anew"
        )
    load_lora_state(adapted, state)
    return merge_lora(adapted)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: what safetensors gives is a view of a file that may change.
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except Exception as error:  # a damaged file can raise anything
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise CheckpointError(
            f"{path} ({size}) cannot be read as an adapter ({type(error).__name__}): it is missing "
            "or damaged; use another version, or train anew"
        ) from error
