"""The steps of an adaptation: warmed up, cooled down, reported, and resumable to the same end."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.labels import LabelledImage
from sam_ext.sam import Sam

__all__ = ["LastStep", "TrainingStep", "run_identity", "run_steps", "single_device"]

_LOG = logging.getLogger(__name__)

_SAVE_STEPS = 20
_SAVE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """How far an adaptation is."""

    step: int
    """Steps done, at least 1."""
    steps: int
    """Steps of the whole run."""
    losses: dict[str, float]
    """This step's losses by name, each times its weight, and their sum as `total`."""
    mean_iou: float
    """Of this step's masks with those that they are to be."""
    eta_s: float
    """Seconds that are left, by the pace since the run was begun or resumed."""


class LastStep:
    """Where a run goes on after it was ended."""

    def __init__(self, path: Path, identity: str) -> None:
        """Name the file, and what tells the run from others."""
        self._path, self._identity = path, identity
        self._saved_at, self._saved_step = time.monotonic(), 0

    def resume(self, sam: Sam, optimizer: torch.optim.Optimizer) -> int:
        """Bring what is trained and the optimizer to where they were; return the steps done.

        Raises:
            CheckpointError: If the file is damaged, or of another run.
        """
        if not self._path.exists():
            return 0
        try:
            saved = torch.load(self._path, map_location="cpu", weights_only=True)
            identity, trained = saved["identity"], saved["trained"]
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(
                f"{self._path} cannot be read ({type(error).__name__}): it is damaged; "
                "delete it to begin the run again"
            ) from error
        if identity != self._identity:
            raise CheckpointError(
                f"{self._path} must be of the same model, images, labels and settings, and is of "
                "others; name an empty run_dir"
            )
        with torch.no_grad():
            for name, parameter in _trained(sam).items():
                parameter.copy_(trained[name])
        optimizer.load_state_dict(saved["optimizer"])
        self._saved_step = int(saved["step"])
        _LOG.info("resuming %s at step %d", self._path, self._saved_step)
        return self._saved_step

    def save_if_due(
        self, sam: Sam, optimizer: torch.optim.Optimizer, step: int, *, is_end: bool
    ) -> None:
        """Write the file every so many steps or seconds, and at the end, whole or not at all."""
        is_late = time.monotonic() - self._saved_at >= _SAVE_S
        if not is_end and not is_late and step - self._saved_step < _SAVE_STEPS:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".partial")
        saved = {
            "trained": {name: one.detach().cpu().clone() for name, one in _trained(sam).items()},
            "optimizer": optimizer.state_dict(),
            "step": step,
            "identity": self._identity,
        }
        with unfinished.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path)
        self._saved_at, self._saved_step = time.monotonic(), step


def run_identity(fingerprint: str, images: Sequence[LabelledImage], config: Any) -> str:
    """Digest what must not change between the parts of one run.

    Args:
        fingerprint: Of the model that is trained, and of all that it is used with.
        images: What it is trained on.
        config: A dataclass.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    digest.update(fingerprint.encode())
    for image in images:
        digest.update(repr((image.name, len(image.objects))).encode())
        for one in image.objects:
            digest.update(repr(one.label).encode())
            for array in (one.box_xyxy, one.point_coords, one.point_labels, one.mask):
                digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def run_steps(
    sam: Sam,
    branch: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[nn.Module, int, torch.Generator], tuple[dict[str, float], float]],
    *,
    steps: int,
    warmup_steps: int,
    gradient_clip: float,
    seed: int,
    fabric: Fabric,
    last: LastStep | None,
    on_step: Callable[[TrainingStep], None] | None,
) -> None:
    """Train a SAM's parameters that want gradients, in place.

    Args:
        sam: The model.
        branch: The module around it that is asked.
        optimizer: Of those parameters; its learning rates are reached after the warm-up, and a
            cosine brings them to 0.
        backward: Given the branch as it is to be called, the step's number among those of all
            devices and a generator that is the step's own, adds gradients to those of the
            parameters, and returns the losses by name, with their weighed sum as `total`, and the
            mean IoU.
        steps: Of the whole run.
        warmup_steps: Of these, to begin with.
        gradient_clip: The largest norm.
        seed: Of the generators.
        fabric: Already launched.
        last: Where the run goes on and what it leaves; None keeps nothing.
        on_step: Called after each step; what it raises ends the run.

    Raises:
        ConfigError: If the loss is not finite.
        CheckpointError: If what `last` reads is of another run, or damaged.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    step = 0 if last is None else last.resume(sam, optimizer)
    module, optimizer = fabric.setup(branch, optimizer)
    generator = torch.Generator()
    started, first_step = time.monotonic(), step
    while step < steps:
        own = step * fabric.world_size + fabric.global_rank
        generator.manual_seed(seed * 1_000_003 + own)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _pace(step, steps, warmup_steps)
        losses, mean_iou = backward(module, own, generator)
        if not math.isfinite(losses["total"]):
            raise ConfigError(
                f"the loss must be finite, got {losses['total']} at step {step}; "
                "lower the learning rate"
            )
        fabric.clip_gradients(module, optimizer, max_norm=gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if last is not None and fabric.is_global_zero:
            last.save_if_due(sam, optimizer, step, is_end=step == steps)
        if on_step is not None:
            pace_s = (time.monotonic() - started) / (step - first_step)
            on_step(
                TrainingStep(
                    step=step,
                    steps=steps,
                    losses=losses,
                    mean_iou=mean_iou,
                    eta_s=pace_s * (steps - step),
                )
            )


def single_device(device: torch.device, precision: torch.dtype) -> Fabric:
    """Make a Fabric that trains where the model is."""
    return Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if precision == torch.bfloat16 else "32-true",
    )


def _trained(sam: Sam) -> dict[str, Tensor]:
    return {name: one for name, one in sam.named_parameters() if one.requires_grad}


def _pace(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min((step + 1) / max(warmup_steps, 1), 1.0)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
