"""Adapter files: what a training left behind, put on the SAM that it was trained on.

A file holds any of the parts below, and says so in its header. Reading one makes a new model; the
SAM that it belongs to is not changed.

============  ===================================================================================
part          what it holds
============  ===================================================================================
lora          low-rank updates of the encoder's projections, merged when they are read
sam-adapter   the network of `sam_adapter.py`, and its settings
decoder       the mask decoder and the no-mask embedding, whole
ba-sam        the settings of BA-SAM that it was trained with, and coefficients if there are any
stable-sam    a plugin for sloppy prompts that was trained with this very model
============  ===================================================================================

A Stable-SAM plugin with a file of its own, trained with the base model, may be used with an adapted
one, as long as the adaptation was made with it: `adapt` and `finetune` take it, and train the model
around it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from sam_ext.ba_sam import BaSamConfig, attach_coefficients
from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.lora import attach_lora, lora_parameters, merge_lora
from sam_ext.sam import Sam, weights_fingerprint
from sam_ext.sam_adapter import SamAdapterConfig, attach_sam_adapter, sam_adapter_of
from sam_ext.stable_sam import StableSam, plugin_scope
from sam_ext.state_dicts import check_state, save_state

__all__ = [
    "Adapted",
    "AdapterInfo",
    "AdapterMethod",
    "adapter_state",
    "apply_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
]

AdapterMethod = Literal["wesam", "lora", "sam-adapter"]

_PLUGIN = "stable_sam."  # what its tensors' names begin with
_PARTS = ("lora", "sam-adapter", "decoder", "ba-sam", "stable-sam")

_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What the header of an adapter file says."""

    method: AdapterMethod
    """How it was trained."""
    parts: tuple[str, ...]
    """What it holds, of the five parts above."""
    prompt_free: bool
    """Whether the model learnt to answer without a prompt, with all objects of an image."""
    base: str
    """`weights_fingerprint` of the SAM that it belongs to."""


class Adapted(NamedTuple):
    """The model that an adapter file describes."""

    sam: Sam
    """Of plain modules, and the adapter of `attach_sam_adapter` if there is one."""
    stable_sam: StableSam | None
    """The plugin in the file, in evaluation mode; None if there is none."""
    ba_sam: BaSamConfig | None
    """The settings in the file; None if it says nothing of them."""
    info: AdapterInfo


def adapter_state(sam: Sam, base: Sam) -> dict[str, Tensor]:
    """Copy to the CPU what an adapted SAM has that its base has not, by names in its state dict.

    Args:
        sam: With LoRA, SAM-Adapter or coefficients attached, a trained decoder, or several of them.
        base: What it was made of.

    Returns:
        Low-rank tensors, the adapter's and coefficients as far as they are attached, and the whole
        decoder if anything in it changed.
    """
    before, after = base.state_dict(), sam.state_dict()
    new = {key for key in after if key not in before}
    adapter = sam_adapter_of(sam.image_encoder)
    if adapter is not None:
        new |= {f"image_encoder.sam_adapter.{name}" for name in adapter.state_dict()}
    decoder = _decoder_keys(sam)
    if any(not torch.equal(after[key].cpu(), before[key].cpu()) for key in decoder):
        new |= decoder
    return {key: value.detach().cpu().clone() for key, value in after.items() if key in new}


def save_adapter(
    sam: Sam,
    path: Path,
    *,
    base: Sam,
    method: AdapterMethod,
    prompt_free: bool = False,
    ba_sam: BaSamConfig | None = None,
    stable_sam: StableSam | None = None,
) -> None:
    """Write what an adapted SAM has that its base has not; the file appears whole or not at all.

    Args:
        sam: What a training gave; it is not changed.
        path: The file, replaced if it is there.
        base: The SAM that the training was given.
        method: How it was trained.
        prompt_free: Whether it learnt to answer without a prompt.
        ba_sam: The settings that it was trained with, to be used wherever the file is; None leaves
            them open.
        stable_sam: A plugin that was trained with this model, to be used wherever the file is.

    Raises:
        ConfigError: If there is nothing to write, or `method` is none.
        CheckpointError: If a value is not finite.
    """
    if method not in get_args(AdapterMethod):
        raise ConfigError(
            f"method must be one of {', '.join(get_args(AdapterMethod))}, got {method!r}"
        )
    state = adapter_state(sam, base)
    low_rank = lora_parameters(sam)
    adapter = sam_adapter_of(sam.image_encoder)
    header = {
        "format": "pt",
        "method": method,
        "base": weights_fingerprint(base),
        "prompt_free": str(prompt_free).lower(),
    }
    parts = []
    if low_rank:
        parts.append("lora")
        header["rank"] = str(low_rank[0].shape[1])
    if adapter is not None:
        parts.append("sam-adapter")
        header["sam_adapter"] = json.dumps(dataclasses.asdict(adapter.config))
    if state.keys() & _decoder_keys(sam):
        parts.append("decoder")
    if ba_sam is not None or _has_coefficients(sam):
        parts.append("ba-sam")
        header["ba_sam"] = json.dumps(dataclasses.asdict(ba_sam or BaSamConfig(bias="official")))
        header["coefficients"] = str(_has_coefficients(sam)).lower()
    if stable_sam is not None:
        parts.append("stable-sam")
        header["stable_sam_scope"] = stable_sam.scope
        state |= {
            _PLUGIN + name: value.detach().cpu().clone()
            for name, value in stable_sam.state_dict().items()
        }
    if not state:
        raise ConfigError(
            "a SAM must be adapted to save what is new of it, got one that is its base; train it"
        )
    _check_finite(path, state, "it was not written")
    header["parts"] = ",".join(parts)
    save_state({key: value.contiguous() for key, value in state.items()}, path, metadata=header)


def read_adapter(path: Path) -> AdapterInfo:
    """Read what an adapter file says of itself, without its tensors.

    Raises:
        CheckpointError: If the file is missing or damaged, or of an unknown method or part.
    """
    return _info(path, _open(path, lambda file: file.metadata() or {}))


def apply_adapter(sam: Sam, path: Path) -> Sam:
    """Make the SAM that an adapter file describes.

    As `load_adapter`, of which this is the SAM alone: for files without settings or a plugin.
    """
    return load_adapter(sam, path).sam


def load_adapter(sam: Sam, path: Path) -> Adapted:
    """Make the model that an adapter file describes.

    Nothing is built before the whole file was read and found to fit.

    Args:
        sam: The model that the adapter was trained on; it is not changed.
        path: What `save_adapter` wrote.

    Returns:
        A new SAM in evaluation mode, on the same device, and what it is to be used with.

    Raises:
        CheckpointError: If the file is missing or damaged, of an unknown method, of another base
            model, or holds tensors that do not fit or are not finite.
    """
    state, header = _open(
        path,
        lambda file: (
            # Copied: what safetensors gives is a view of a file that may change.
            {key: file.get_tensor(key).clone() for key in file.keys()},  # noqa: SIM118
            file.metadata() or {},
        ),
    )
    info = _info(path, header)
    fingerprint = weights_fingerprint(sam)
    if info.base != fingerprint:
        raise CheckpointError(
            f"{path} must be an adapter of the model {fingerprint[:8]}, got one of "
            f"{info.base[:8]}; load the model it was trained on, or train anew"
        )
    adapted: Sam = copy.deepcopy(sam)
    ba_sam = _attach_parts(path, adapted, info, header)
    after = adapted.state_dict()
    new = after.keys() - sam.state_dict().keys()
    if "decoder" in info.parts:
        new |= _decoder_keys(adapted)
    wanted = {key: after[key] for key in new}
    plugin = None
    if "stable-sam" in info.parts:
        plugin = StableSam(
            adapted.mask_decoder.transformer_dim,
            is_routed=any(key.startswith(f"{_PLUGIN}router.") for key in state),
            scope=plugin_scope(path, header.get("stable_sam_scope", "all")),
        )
        wanted |= {_PLUGIN + key: value for key, value in plugin.state_dict().items()}
    check_state(path, state, wanted)
    _check_finite(path, state, "it is damaged, train anew")
    with torch.no_grad():
        for key in new:
            after[key].copy_(state[key])
    if plugin is not None:
        plugin.load_state_dict(
            {key.removeprefix(_PLUGIN): state[key] for key in state if key.startswith(_PLUGIN)}
        )
        plugin.eval().to(sam.device)
    return Adapted(sam=merge_lora(adapted), stable_sam=plugin, ba_sam=ba_sam, info=info)


def _attach_parts(
    path: Path, sam: Sam, info: AdapterInfo, header: dict[str, str]
) -> BaSamConfig | None:
    """Give a SAM the modules whose tensors a file holds, in place; return BA-SAM's settings."""

    def read(key: str, what: str, make: Callable[[str], _Read]) -> _Read:
        try:
            return make(header[key])
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} must have {what} in its header, got {header.get(key)!r}; "
                "it is damaged, train anew"
            ) from error

    encoder = sam.image_encoder
    if "lora" in info.parts:
        read("rank", "LoRA's rank", lambda text: attach_lora(encoder, rank=int(text)))
    if "sam-adapter" in info.parts:
        read(
            "sam_adapter",
            "SAM-Adapter's settings",
            lambda text: attach_sam_adapter(encoder, _sam_adapter_config(text)),
        )
    if "ba-sam" not in info.parts:
        return None
    if header.get("coefficients") == "true" and not _has_coefficients(sam):
        attach_coefficients(encoder)
    return read("ba_sam", "BA-SAM's settings", lambda text: BaSamConfig(**json.loads(text)))


def _sam_adapter_config(text: str) -> SamAdapterConfig:
    settings = json.loads(text)
    weights = tuple((name, weight) for name, weight in settings.pop("input_weights"))
    return SamAdapterConfig(**settings, input_weights=weights)


def _has_coefficients(sam: Sam) -> bool:
    return any(hasattr(block.attn, "ba_sam_coefficient") for block in sam.image_encoder.blocks)


def _decoder_keys(sam: Sam) -> set[str]:
    """Name what is trained with the decoder, in a SAM's state dict."""
    names = {f"mask_decoder.{name}" for name in sam.mask_decoder.state_dict()}
    return names | {"prompt_encoder.no_mask_embed.weight"}


def _check_finite(path: Path, state: Mapping[str, Tensor], otherwise: str) -> None:
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(
            f"{path} must hold finite numbers, got {len(bad)} tensors that do not "
            f"(first: {bad[0]}); {otherwise}"
        )


def _info(path: Path, header: dict[str, str]) -> AdapterInfo:
    """Read a header; one without `parts` is of the time when there was LoRA by WeSAM alone."""
    method, parts = header.get("method", "none"), tuple(header.get("parts", "lora").split(","))
    if method == "lora" and "parts" not in header:
        method = "wesam"
    if method not in get_args(AdapterMethod) or set(parts) - set(_PARTS):
        raise CheckpointError(
            f"{path} must be an adapter of one of the methods {', '.join(get_args(AdapterMethod))} "
            f"with some of the parts {', '.join(_PARTS)}, got {method!r} with {', '.join(parts)}; "
            "it is of a newer version of this software, or no adapter"
        )
    return AdapterInfo(
        method=method,  # type: ignore[arg-type]  # checked above
        parts=parts,
        prompt_free=header.get("prompt_free") == "true",
        base=header.get("base", "none"),
    )


def _open(path: Path, read: Callable[[Any], _Read]) -> _Read:
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except Exception as error:  # a damaged file can raise anything
        size = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        raise CheckpointError(
            f"{path} ({size}) cannot be read as an adapter ({type(error).__name__}): it is missing "
            "or damaged; use another version, or train anew"
        ) from error
