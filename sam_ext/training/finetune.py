"""Adaptation to full masks: SAM-Adapter or LoRA, and the decoder, learn what annotators drew.

Source:
    Chen et al., arXiv:2304.09148, and the official code, for SAM-Adapter and the losses.

Differs from the source:
    - Objects are asked for as annotators do, by boxes, drawn loosely, and clicks; the source knows
      no prompts. Its mode without prompts is there beside them, and gives all objects at once.
    - The dense positional encoding and the no-mask embedding are SAM's. The official code loses
      them.
    - The predicted IoUs are trained, so that scores keep their meaning.
    - Losses are taken at the decoder's resolution, not at the input's.
    - The encoder's input is served as it is trained: whole images and crops, by `ResolutionPolicy`.
    - Steps, not epochs, and nothing is chosen by a test split: the last step's model comes out.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from sam_ext.ba_sam import BaSamConfig
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import Precision, resolve_precision
from sam_ext.interactive import CropPolicy, default_crops
from sam_ext.labels import LabelledImage
from sam_ext.lora import attach_lora, lora_parameters
from sam_ext.predictor import ObjectPrompt, Predictor
from sam_ext.resolution import ResolutionPolicy, default_policy
from sam_ext.sam import Sam
from sam_ext.sam_adapter import SamAdapterConfig, attach_sam_adapter, sam_adapter_parameters
from sam_ext.stable_sam import StableSam, plugin_for
from sam_ext.training.branch import Branch, Seen, pixels_of, token_groups
from sam_ext.training.losses import cross_entropy, mask_iou, mean_where, soft_iou_loss
from sam_ext.training.parts import MASK_STRIDE, Kept, PartSource, View, empty_view
from sam_ext.training.robust import noisy_boxes, random_points
from sam_ext.training.steps import (
    LastStep,
    TrainingStep,
    run_identity,
    run_steps,
    single_device,
)
from sam_ext.training.views import FLIPS, strong_view

__all__ = [
    "PROMPT_FREE_CHANCE",
    "FinetuneConfig",
    "FinetuneMethod",
    "MaskLoss",
    "default_finetune_steps",
    "default_sam_adapter",
    "finetune",
]

FinetuneMethod = Literal["sam-adapter", "lora"]
MaskLoss = Literal["bce", "balanced bce"]

PROMPT_FREE_CHANCE = 0.75
"""`FinetuneConfig.prompt_free_chance` for a project of one class."""

_LOOSE_BOX = 0.2  # strength of `noisy_boxes`
_BOXES, _SINGLE_POINTS = 0.5, 0.25  # shares of the prompts; the others are several points
_LEAST_PROMPTS = 8  # of one step, if its view has an object for each
_MOST_POINTS = 5  # on an object, and as many beside it
_LEAST_CHANNELS = 24  # of a SAM-Adapter, as in ViT-B's


def default_finetune_steps(images: int) -> int:
    """Choose how long to adapt to the masks of so many images."""
    return min(max(20 * images, 300), 800)


def default_sam_adapter(channels: int) -> SamAdapterConfig:
    """Choose the adapter of an encoder with so many channels: as in the source, or 24 channels."""
    return SamAdapterConfig(reduction=max(1, min(32, channels // _LEAST_CHANNELS)))


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One adaptation; losses are switched off by a weight of 0."""

    method: FinetuneMethod = "sam-adapter"
    """What learns beside the decoder: the network of `attach_sam_adapter`, or LoRA."""
    steps: int | None = None
    """None takes `default_finetune_steps`."""
    learning_rate: float = 1e-3
    """Of the adapter or LoRA, after the warm-up; a cosine brings it to 0."""
    decoder_learning_rate: float = 1e-4
    """The same of the decoder and the no-mask embedding."""
    weight_decay: float = 1e-4
    warmup_steps: int = 20
    gradient_clip: float = 1.0
    rank: int = 4
    """LoRA's."""
    sam_adapter: SamAdapterConfig | None = None
    """None takes `default_sam_adapter`."""
    loss: MaskLoss = "bce"
    """What is added to the soft IoU loss: `balanced bce` for shadows and the like."""
    prompt_free_loss: MaskLoss = "balanced bce"
    """The same where the model is asked without a prompt: all objects together may be little of an
    image, or most of it."""
    bce_weight: float = 1.0
    soft_iou_weight: float = 1.0
    iou_weight: float = 1.0
    """Of the predicted IoUs' squared error."""
    prompt_free_chance: float = 0.0
    """How often the model sees a whole image and is also asked without a prompt, for all objects
    together; for projects of one class. Images some of whose objects have no mask are not asked
    so; those without any object are, and only so: nothing is there to find."""
    policies: tuple[ResolutionPolicy, ...] | None = None
    """At which sizes images are encoded, one drawn for each step; None takes `default_policy`.
    Several are mixed resolutions, which go with `ba_sam`."""
    ba_sam: BaSamConfig | None = None
    """What the encoder does away from its training size; None is plain SAM."""
    max_objects: int = 20
    """Objects of one step, at most."""
    crops: CropPolicy | None = None
    """In which crops small objects are served; None takes `default_crops`."""
    crop_chance: float = 0.75
    """How often an object that is served in a crop is seen there; else in the whole image."""
    strong_chance: float = 0.25
    """How often each transform of `strong_view` is applied."""
    precision: Precision = "auto"
    """Of training, as `resolve_precision` takes it."""
    gradient_checkpointing: bool = False
    """Compute the encoder's blocks twice instead of keeping what is in them."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("method", FinetuneMethod),
            ("loss", MaskLoss),
            ("prompt_free_loss", MaskLoss),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"FinetuneConfig.{name} must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        numbers = {
            name: getattr(self, name)
            for name in (field.name for field in dataclasses.fields(self))
            if name.endswith(("_weight", "_rate", "_decay", "_clip")) or name == "warmup_steps"
        }
        if bad := {n: v for n, v in numbers.items() if not 0 <= v < math.inf}:
            raise ConfigError(f"FinetuneConfig's numbers must be at least 0 and finite, got {bad}")
        for name in ("prompt_free_chance", "crop_chance", "strong_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"FinetuneConfig.{name} must be in 0..1, got {getattr(self, name)}"
                )
        least = {
            "steps": 1 if self.steps is None else self.steps,
            "rank": self.rank,
            "max_objects": self.max_objects,
            "policies": 1 if self.policies is None else len(self.policies),
        }
        if bad := {name: value for name, value in least.items() if value < 1}:
            raise ConfigError(f"FinetuneConfig's counts must be at least 1, got {bad}")


def finetune(
    sam: Sam,
    images: Sequence[LabelledImage],
    config: FinetuneConfig,
    *,
    run_dir: Path | None = None,
    on_step: Callable[[TrainingStep], None] | None = None,
    stable_sam: StableSam | None = None,
    fabric: Fabric | None = None,
) -> Sam:
    """Adapt a copy of a SAM to images and the masks of their objects.

    Args:
        sam: The model, on the device to train on; it is not changed.
        images: With what is known of their objects; those without a mask are left out. An image
            without any object is one in which nothing is to be found without a prompt.
        config: The run.
        run_dir: Gets `last.pt` every 20 steps or 30 seconds. Where there is one of the same run, it
            goes on from there, to the same end. None keeps nothing.
        on_step: Called after each step; what it raises ends the run.
        stable_sam: The plugin that the model is served with; it is not changed.
        fabric: Already launched, to train on several devices, each with its own parts of the
            images; None trains on the model's device alone.

    Returns:
        A new SAM in evaluation mode, with LoRA or SAM-Adapter attached and trained, and a trained
        decoder; `save_adapter` writes what is new of it, `merge_lora` makes LoRA's plain.

    Raises:
        ConfigError: If no object has a mask, or the loss is not finite.
        DataError: If a mask has not its image's size.
        CheckpointError: If `run_dir/last.pt` is of another run, or damaged.
    """
    empty = [image for image in images if not image.objects and config.prompt_free_chance]
    masked = [_with_masks_only(image) for image in images]
    is_complete = [
        len(one.objects) == len(image.objects)
        for one, image in zip(masked, images, strict=True)
        if one.objects
    ]
    masked = [one for one in masked if one.objects]
    if not masked:
        raise ConfigError(
            f"images must have objects with masks, got {len(images)} images and no mask; "
            "draw some, or adapt to boxes and points by WeSAM"
        )
    device = sam.device
    if fabric is None:
        fabric = single_device(device, resolve_precision(device, config.precision))
    anchors = [
        Predictor(sam, ba_sam=config.ba_sam, policy=policy, stable_sam=stable_sam)
        for policy in config.policies or (default_policy(sam.image_encoder.img_size),)
    ]
    crops = config.crops or default_crops(sam.image_encoder.img_size)
    sources = [
        PartSource(
            masked,
            anchor=anchor,
            kind="box",
            box_of_points=False,
            crops=crops if config.crop_chance else None,
            max_objects=config.max_objects,
            crop_chance=config.crop_chance,
            seed=config.seed,
        )
        for anchor in anchors
    ]
    empty_views = Kept(max_entries=128)

    def view_of(number: int, which: int) -> View:
        return empty_views.get(
            (number, which), lambda: empty_view(empty[number].read(), anchors[which])
        )

    adapted, optimizer = _prepared(sam, config)
    branch = Branch(
        adapted, stable_sam, ba_sam=config.ba_sam, checkpointing=config.gradient_checkpointing
    )

    def backward(
        module: nn.Module, own: int, generator: torch.Generator
    ) -> tuple[dict[str, float], float]:
        which = int(torch.randint(len(sources), (), generator=generator))
        is_free = float(torch.rand((), generator=generator)) < config.prompt_free_chance
        number = int(torch.randint(len(masked) + len(empty), (), generator=generator))
        flip = FLIPS[int(torch.randint(len(FLIPS), (), generator=generator))]
        prompts: list[ObjectPrompt | None] = []
        if is_free and number < len(empty):
            view = view_of(number, which).flipped(flip)
        else:
            part = sources[which].part(own, whole=is_free)
            view = _asked_again(part.view.flipped(flip))
            prompts += _prompts(view, generator)
            is_free = is_free and is_complete[part.key[0]]
        if is_free:
            prompts.append(None)
        image = strong_view(
            pixels_of(view.image, device), generator=generator, chance=config.strong_chance
        )
        padded_size = anchors[which].padded_size((view.image.shape[0], view.image.shape[1]))
        seen: Seen = module(image, token_groups(prompts, device), padded_size)
        losses, mean_iou = _losses(
            seen,
            view,
            prompts,
            config,
            is_ambiguous=plugin_for(stable_sam, is_several_points=False) is None,
        )
        weighed = {
            name: getattr(config, f"{name.removeprefix('free_')}_weight") * value
            for name, value in losses.items()
        }
        total = torch.stack(list(weighed.values())).sum()
        fabric.backward(total)
        told = {name: float(value.detach()) for name, value in weighed.items()}
        return told | {"total": float(total.detach())}, float(mean_iou)

    last = None
    if run_dir is not None:
        identity = run_identity(anchors[0].fingerprint, images, config)
        last = LastStep(run_dir / "last.pt", identity)
    run_steps(
        adapted,
        branch,
        optimizer,
        backward,
        steps=config.steps or default_finetune_steps(len(masked)),
        warmup_steps=config.warmup_steps,
        gradient_clip=config.gradient_clip,
        seed=config.seed,
        fabric=fabric,
        last=last,
        on_step=on_step,
    )
    return adapted.eval()


def _with_masks_only(image: LabelledImage) -> LabelledImage:
    """Leave out what has no mask, and ask for the rest by its mask."""
    return replace(
        image,
        objects=tuple(replace(one, box_xyxy=None) for one in image.objects if one.mask is not None),
    )


def _prepared(sam: Sam, config: FinetuneConfig) -> tuple[Sam, torch.optim.Optimizer]:
    """Copy a SAM, attach what is to learn, the same for the same seed, and free the decoder."""
    adapted: Sam = copy.deepcopy(sam)
    adapted.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.method == "lora":
            attach_lora(adapted.image_encoder, rank=config.rank)
            attached = lora_parameters(adapted)
        else:
            channels: int = adapted.image_encoder.patch_embed.proj.out_channels
            attach_sam_adapter(
                adapted.image_encoder, config.sam_adapter or default_sam_adapter(channels)
            )
            attached = sam_adapter_parameters(adapted)
    decoder = [*adapted.mask_decoder.parameters(), adapted.prompt_encoder.no_mask_embed.weight]
    for parameter in decoder:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": attached, "lr": config.learning_rate},
            {"params": decoder, "lr": config.decoder_learning_rate},
        ],
        weight_decay=config.weight_decay,
    )
    return adapted, optimizer


def _asked_again(view: View) -> View:
    """Ask for few objects several times, each time in another way; the image is encoded once."""
    times = max(1, _LEAST_PROMPTS // len(view.prompts))
    return replace(view, prompts=times * view.prompts, masks=view.masks.repeat(times, 1, 1))


def _prompts(view: View, generator: torch.Generator) -> list[ObjectPrompt]:
    """Draw how each object of a view is asked for: by its box, loosely or not, or by points."""
    size_hw = (view.image.shape[0], view.image.shape[1])
    count = 2 + int(torch.randint(_MOST_POINTS - 1, (), generator=generator))
    beside = int(torch.randint(count + 1, (), generator=generator))
    on_it = random_points(view.masks, count, stride=MASK_STRIDE, generator=generator).numpy()
    off_it = random_points(
        1 - view.masks, max(beside, 1), stride=MASK_STRIDE, generator=generator
    ).numpy()
    has_beside = (view.masks < 0.5).flatten(1).any(1).tolist()
    prompts = []
    for index, prompt in enumerate(view.prompts):
        drawn, is_loose = torch.rand(2, generator=generator).tolist()
        if drawn < _BOXES:
            if is_loose < 0.5:
                assert prompt.box_xyxy is not None
                boxes = torch.from_numpy(prompt.box_xyxy)[None]
                box = noisy_boxes(boxes, image_hw=size_hw, scale=_LOOSE_BOX, generator=generator)
                prompt = replace(prompt, box_xyxy=box[0].numpy())
        else:
            single = drawn < _BOXES + _SINGLE_POINTS
            not_on_it = 0 if single or not has_beside[index] else beside
            points = [on_it[index, :1] if single else on_it[index], off_it[index, :not_on_it]]
            labels = np.repeat([1, 0], [len(points[0]), not_on_it])
            prompt = ObjectPrompt(
                point_coords=np.concatenate(points).astype(np.float64), point_labels=labels
            )
        prompts.append(prompt)
    return prompts


def _losses(
    seen: Seen,
    view: View,
    prompts: Sequence[ObjectPrompt | None],
    config: FinetuneConfig,
    *,
    is_ambiguous: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Measure answers against the masks: the single one, or the best of a single point's three.

    Returns:
        The losses, and the mean IoU of what was asked for by a prompt, if anything was.
    """
    losses: dict[str, Tensor] = {}
    mean_iou = seen.logits.new_zeros(())
    if view.prompts:
        losses, mean_iou = _prompted_losses(seen, view, prompts, config, is_ambiguous=is_ambiguous)
    if len(prompts) > len(view.prompts):
        covered = view.covered.to(seen.logits.device)[None]
        free, guessed = seen.logits[len(view.prompts) :, 0], seen.ious[len(view.prompts) :, 0]
        # Of an image of nothing, the balanced loss would be nothing, too.
        loss = config.prompt_free_loss if covered.any() else "bce"
        bce, soft_iou = _mask_losses(free, covered, loss)
        reached = mask_iou(free, covered) if covered.any() else ~(free > 0).flatten(1).any(1)
        errors = (guessed - reached.float()).square()
        for name, value in (("bce", bce), ("soft_iou", soft_iou), ("iou", errors)):
            losses[f"free_{name}"] = value.mean()
        if not view.prompts:
            mean_iou = reached.float().mean()
    return losses, mean_iou


def _prompted_losses(
    seen: Seen,
    view: View,
    prompts: Sequence[ObjectPrompt | None],
    config: FinetuneConfig,
    *,
    is_ambiguous: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Measure the answers to prompts; losses and the mean IoU."""
    device = seen.logits.device
    count = len(view.prompts)
    wanted = view.masks.to(device)
    single = torch.tensor(
        [p is not None and p.is_single_point and is_ambiguous for p in prompts[:count]],
        device=device,
    )
    asked = torch.stack([~single, *(3 * [single])], 1)  # [P, 4]
    rows = asked.nonzero()[:, 0]
    logits, targets = seen.logits[:count][asked], wanted[rows]
    bce, soft_iou = _mask_losses(logits, targets, config.loss)
    combined = config.bce_weight * bce + config.soft_iou_weight * soft_iou
    per_mask = torch.full(asked.shape, math.inf, device=device)
    best = per_mask.masked_scatter(asked, combined.detach()).argmin(1)
    at_best = F.one_hot(best, 4).bool()[asked]
    ious = mask_iou(logits, targets)
    errors = (seen.ious[:count][asked] - ious).square()
    # What covers no pixel of the targets by half has an IoU of 0 whatever is answered.
    known = (targets > 0.5).flatten(1).any(1)
    losses = {
        "bce": bce[at_best].mean(),
        "soft_iou": soft_iou[at_best].mean(),
        "iou": mean_where(known, errors),
    }
    return losses, ious[at_best].mean()


def _mask_losses(logits: Tensor, targets: Tensor, loss: MaskLoss) -> tuple[Tensor, Tensor]:
    """Compute both losses of masks [K, H, W]: two of [K]."""
    bce = cross_entropy(logits, targets, balanced=loss == "balanced bce")
    return bce, soft_iou_loss(logits, targets)
