"""Stable-SAM's robust training: SAM is frozen, and only the plugin learns to forgive prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_ext.ba_sam import BaSamConfig
from sam_ext.errors import ConfigError
from sam_ext.image_encoder import encode_image
from sam_ext.mask_decoder import decode_masks
from sam_ext.prompt_encoder import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    NOT_A_POINT,
    dense_position_encoding,
    embed_dense,
    embed_tokens,
)
from sam_ext.sam import Sam
from sam_ext.stable_sam import PluginScope, StableSam
from sam_ext.training.data import Source
from sam_ext.training.losses import dice_loss, focal_loss
from sam_ext.training.supervised import Batch, Stage, autocast, stage_loader, to_device

__all__ = [
    "PROMPT_KINDS",
    "PromptKind",
    "RobustConfig",
    "coarse_masks",
    "noisy_boxes",
    "random_points",
    "train_stable",
]

_MASK_STRIDE = 4

PromptKind = Literal[
    "box",
    "noisy box",
    "1 point",
    "2 points",
    "3 points",
    "5 points",
    "10 points",
    "2 + 2 points",
    "4 + 4 points",
    "mask",
]
PROMPT_KINDS: dict[PluginScope, tuple[PromptKind, ...]] = {
    "all": ("box", "noisy box", "1 point", "3 points", "5 points", "10 points", "mask"),
    "points": ("2 points", "3 points", "5 points", "10 points", "2 + 2 points", "4 + 4 points"),
}
"""What a plugin is trained on, by its scope: the source's mix, or points alone, some of them also
with as many points beside the object."""
_POINTS: dict[str, tuple[int, int]] = {
    "1 point": (1, 0),
    "2 points": (2, 0),
    "3 points": (3, 0),
    "5 points": (5, 0),
    "10 points": (10, 0),
    "2 + 2 points": (2, 2),
    "4 + 4 points": (4, 4),
}
"""How many points on the object, and beside it."""
_NEAR = 12  # pixels of the masks that a point beside an object is away from it at most, by axis


@dataclass(frozen=True, kw_only=True)
class RobustConfig:
    """One run of the robust training."""

    image_size: int
    """Side of the training images in pixels, a multiple of 16."""
    steps: int
    other_sizes: tuple[int, ...] = ()
    """Further sides in pixels; each step trains at one side, drawn among these and `image_size`."""
    batch_size: int = 8
    prompts: int = 12
    """Objects asked for in each image, each by a prompt of a kind drawn anew."""
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    noise: float = 0.4
    """Strength of `noisy_boxes`."""
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    ba_sam: BaSamConfig | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.warmup_steps) < 0 or self.noise < 0:
            raise ConfigError(f"RobustConfig's steps and noise must be >= 0, got {self}")
        self.stage  # noqa: B018  # which checks the sizes

    @property
    def stage(self) -> Stage:
        """The same as the supervised loop's stage."""
        return Stage(
            image_size=self.image_size,
            other_sizes=self.other_sizes,
            batch_size=self.batch_size,
            steps=self.steps,
            prompts=self.prompts,
        )


def noisy_boxes(
    boxes_xyxy: Tensor,
    *,
    image_hw: tuple[int, int],
    scale: float,
    generator: torch.Generator,
    min_iou: float = 0.5,
) -> Tensor:
    r"""Draw boxes as loosely as a hurried annotator.

    .. math:: (c_x, c_y, w, h) \mathrel{+}= u \odot (w / 2, h / 2, w, h) \cdot s,
        \quad u \sim U(-1, 1)^4

    Args:
        boxes_xyxy: [P, 4] in pixels.
        image_hw: (H, W) of the image in pixels; boxes stay inside.
        scale: s.
        generator: Decides the noise, on the CPU.
        min_iou: A box that overlaps its tight one by less is drawn again.

    Returns:
        [P, 4].

    Source:
        Li et al., arXiv:2203.01305, as Fan et al., arXiv:2311.15776, use it; the bound on the IoU
        is from memory of the latter.
    """
    height, width = image_hw
    limit = torch.tensor([width, height, width, height], dtype=boxes_xyxy.dtype)
    tight = boxes_xyxy
    center, size = (tight[:, :2] + tight[:, 2:]) / 2, tight[:, 2:] - tight[:, :2]
    drawn = tight.clone()
    left = torch.ones(len(tight), dtype=torch.bool)
    for _ in range(100):
        noise = (torch.rand((len(tight), 4), generator=generator) * 2 - 1) * scale
        moved_center = center + noise[:, :2] * size / 2
        moved_size = size * (1 + noise[:, 2:])
        moved = torch.cat([moved_center - moved_size / 2, moved_center + moved_size / 2], 1)
        moved = torch.minimum(moved.clamp(min=0), limit)
        accepted = left & (_box_iou(moved, tight) >= min_iou)
        drawn[accepted] = moved[accepted]
        left = left & ~accepted
        if not left.any():
            break
    return drawn


def _box_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of the boxes [P, 4] of two lists, pair by pair."""
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    overlap = sides.clamp(min=0).prod(1)
    areas = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1)
    return overlap / (areas - overlap).clamp(min=1e-6)


def random_points(
    targets: Tensor, count: int, *, stride: int, generator: torch.Generator
) -> Tensor:
    """Draw points inside objects, evenly.

    Args:
        targets: The objects' coverage [P, H, W] in 0..1.
        count: Points for each.
        stride: Image pixels per pixel of the targets.
        generator: Decides the places, on the CPU.

    Returns:
        [P, count, 2], (x, y) in image pixels.
    """
    flat = targets.flatten(1).cpu()
    inside = (flat > 0.5).float()
    # An object thinner than a pixel of the targets is touched where it covers most.
    inside = torch.where(inside.any(1)[:, None], inside, (flat >= flat.amax(1, True)).float())
    index = torch.multinomial(inside, count, replacement=True, generator=generator)
    width = targets.shape[-1]
    cell = torch.stack([index % width, index // width], dim=-1)
    jitter = torch.rand(cell.shape, generator=generator)
    return ((cell + jitter) * stride - 0.5).to(targets.device)


def coarse_masks(targets: Tensor, *, generator: torch.Generator) -> Tensor:
    """Make rough drawings of objects, as logits that `embed_dense` takes.

    A blurred copy plus noise that only matters near the outline is cut at one half.

    Args:
        targets: The objects' coverage [P, H, W] in 0..1, at the resolution of mask inputs.
        generator: Decides the noise, on the CPU.

    Returns:
        [P, 1, H, W]: 6 inside the drawing and -6 outside.

    Source:
        Ke et al., arXiv:2306.01567 (noise on the outline's band); the logits are ours.
    """
    height, width = targets.shape[-2:]
    small = (math.ceil(height / 8), math.ceil(width / 8))
    noise = torch.randn((len(targets), 1, *small), generator=generator).to(targets.device)
    noise = F.interpolate(noise, (height, width), mode="bicubic")
    blurred = F.avg_pool2d(targets[:, None], 5, stride=1, padding=2, count_include_pad=False)
    drawn = blurred + 0.25 * noise * (4 * blurred * (1 - blurred)) > 0.5
    return torch.where(drawn, 6.0, -6.0)


def robust_loss(
    sam: Sam,
    plugin: StableSam,
    batch: Batch,
    config: RobustConfig,
    *,
    kinds: Sequence[PromptKind],
    generator: torch.Generator,
) -> Tensor:
    """Prompt every object by a prompt of its slot's kind, and measure the single masks.

    The whole object is what is wanted from a single point, too: it is answered by the single mask.

    Args:
        sam: Frozen.
        plugin: What learns.
        batch: B images with P objects each.
        config: Weights of the losses.
        kinds: P kinds, one a slot: the i-th object of every image.
        generator: Decides the noise, on the CPU.

    Returns:
        The loss, averaged over the objects.

    Source:
        Fan et al., arXiv:2311.15776: mixed prompts, frozen SAM. Losses are SAM's.
    """
    device = batch.images.device
    images = (batch.images.float() - sam.pixel_mean) / sam.pixel_std
    size = (batch.images.shape[-2], batch.images.shape[-1])
    with torch.no_grad(), autocast(config.precision, device):
        embeddings = encode_image(sam.image_encoder, images, ba_sam=config.ba_sam)
    grid = (embeddings.shape[-2], embeddings.shape[-1])
    count = len(images)
    targets = (batch.targets.float() / 255).view(count, -1, *batch.targets.shape[1:])
    tight = batch.boxes_xyxy.view(count, -1, 4)
    total = torch.zeros((), device=device)
    for kind in dict.fromkeys(kinds):
        slots = [slot for slot, one in enumerate(kinds) if one == kind]
        wanted = targets[:, slots].flatten(0, 1)  # [B * P', H, W]
        boxes = tight[:, slots].flatten(0, 1)
        coords, labels, mask = _prompt(kind, boxes, wanted, size, config, generator)
        with autocast(config.precision, device):
            decoded = decode_masks(
                sam.mask_decoder,
                embeddings,
                image_pe=dense_position_encoding(sam.prompt_encoder, grid),
                sparse_prompt_embeddings=embed_tokens(
                    sam.prompt_encoder, coords, labels, input_size=size
                ),
                dense_prompt_embeddings=embed_dense(sam.prompt_encoder, mask, grid_hw=grid),
                stable_sam=plugin,
            )
        logits = decoded.low_res_logits[:, 0].float()
        loss = config.focal_weight * focal_loss(logits, wanted)
        loss = loss + config.dice_weight * dice_loss(logits, wanted)
        total = total + loss.sum()
    return total / (count * len(kinds))


def _prompt(
    kind: PromptKind,
    boxes: Tensor,
    targets: Tensor,
    size: tuple[int, int],
    config: RobustConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make the prompts of one kind: coordinates [P, T, 2], labels [P, T], mask [P, 1, H, W]."""
    objects, device = len(boxes), boxes.device
    if kind == "mask":
        nothing = torch.zeros((objects, 0), device=device)
        return (
            nothing[..., None].expand(-1, -1, 2),
            nothing,
            coarse_masks(targets, generator=generator),
        )
    if kind in _POINTS:
        inside, outside = _POINTS[kind]
        points = [random_points(targets, inside, stride=_MASK_STRIDE, generator=generator)]
        if outside:
            beside = _beside(targets)
            points.append(random_points(beside, outside, stride=_MASK_STRIDE, generator=generator))
        coords = torch.cat([*points, torch.zeros((objects, 1, 2), device=device)], 1)
        named = [FOREGROUND] * inside + [BACKGROUND] * outside + [NOT_A_POINT]
        labels = torch.tensor(named, device=device)
    else:
        if kind == "noisy box":
            boxes = noisy_boxes(
                boxes.cpu(), image_hw=size, scale=config.noise, generator=generator
            ).to(device)
        coords = boxes.view(-1, 2, 2)
        labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=device)
    return coords, labels.expand(objects, -1), None


def _beside(targets: Tensor) -> Tensor:
    """Mark what lies near an object and not on it [P, H, W]; all around it, if nothing does."""
    reach = 2 * _NEAR + 1
    grown = F.max_pool2d(targets[:, None], reach, stride=1, padding=_NEAR)[:, 0]
    near = ((grown > 0.1) & (targets < 0.05)).float()
    has_any = near.flatten(1).any(1)[:, None, None]
    return torch.where(has_any, near, (targets < 0.5).float())


def train_stable(
    sam: Sam,
    plugin: StableSam,
    sources: Sequence[tuple[Source, float]],
    config: RobustConfig,
    *,
    num_workers: int = 1,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> StableSam:
    """Train a plugin in place, on the prompts that it is for; the SAM is not changed.

    Args:
        sam: On the device to train on.
        plugin: On the same device.
        sources: Training scenes with their weights.
        config: The run.
        num_workers: Processes that prepare samples.
        on_progress: Called every 50 steps with loss, step and time left.

    Returns:
        The same plugin, in evaluation mode.

    Raises:
        ConfigError: If the loss is not finite.
    """
    device = sam.pixel_mean.device
    frozen = [p for p in sam.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(plugin.parameters(), lr=config.learning_rate)
    generator = torch.Generator()
    kinds = PROMPT_KINDS[plugin.scope]
    loader = stage_loader(sources, config.stage, seed=config.seed, num_workers=num_workers)
    sam.requires_grad_(False)
    plugin.train()
    recent: list[Tensor] = []
    started = time.monotonic()
    try:
        for step, batch in enumerate(loader):
            generator.manual_seed(config.seed * 1_000_003 + step)
            drawn = torch.randint(len(kinds), (config.prompts,), generator=generator)
            loss = robust_loss(
                sam,
                plugin,
                to_device(batch, device),
                config,
                kinds=[kinds[i] for i in drawn.tolist()],
                generator=generator,
            )
            if not torch.isfinite(loss):
                raise ConfigError(
                    f"the loss must be finite, got {loss.item()} at step {step}; "
                    "lower RobustConfig.learning_rate"
                )
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, config)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            nn.utils.clip_grad_norm_(plugin.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(loss.detach())
            if on_progress is not None and ((step + 1) % 50 == 0 or step + 1 == config.steps):
                elapsed = time.monotonic() - started
                on_progress(
                    {
                        "step": step + 1,
                        "loss": float(torch.stack(recent).mean()),
                        "eta_s": elapsed / (step + 1) * (config.steps - step - 1),
                    }
                )
                recent = []
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return plugin.eval()


def _learning_rate(step: int, config: RobustConfig) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min((step + 1) / max(config.warmup_steps, 1), 1.0)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
