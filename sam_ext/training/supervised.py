"""The supervised loop: SAM's own recipe over mixed sources, resumable and deterministic by seed."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler

from sam_ext.ba_sam import BaSamConfig
from sam_ext.errors import CheckpointError, ConfigError
from sam_ext.image_encoder import encode_image
from sam_ext.mask_decoder import decode_masks
from sam_ext.prompt_encoder import dense_position_encoding, embed_dense, embed_tokens
from sam_ext.sam import Sam
from sam_ext.training.data import MixedSamples, Sample, Source
from sam_ext.training.losses import dice_loss, focal_loss, mask_iou
from sam_ext.training.prompts import correction_clicks, first_prompts, jitter_boxes

__all__ = [
    "Batch",
    "Stage",
    "SupervisedConfig",
    "autocast",
    "collate",
    "stage_loader",
    "to_device",
    "train",
    "training_loss",
]

_LOG = logging.getLogger(__name__)
_MASK_STRIDE = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run at one image size."""

    image_size: int
    """Side of the training images in pixels, a multiple of 16."""
    batch_size: int
    steps: int
    prompts: int = 8
    """Objects asked for in each image."""
    clicks: int = 0
    """Correcting clicks after the first prompt, each with the last answer as mask input."""
    other_sizes: tuple[int, ...] = ()
    """Further sides in pixels; each step trains at one side, drawn among these and `image_size`."""

    def __post_init__(self) -> None:
        if any(size < 16 or size % 16 for size in self.sizes):
            raise ConfigError(f"Stage's image sizes must be positive multiples of 16, got {self}")
        if min(self.batch_size, self.prompts) < 1:
            raise ConfigError(f"Stage.batch_size and Stage.prompts must be >= 1, got {self}")
        if min(self.steps, self.clicks) < 0:
            raise ConfigError(f"Stage.steps and Stage.clicks must be >= 0, got {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sides that are trained at."""
        return (self.image_size, *self.other_sizes)


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """A whole run; SAM's recipe (arXiv:2304.02643, section A) where nothing else is said."""

    stages: tuple[Stage, ...]
    learning_rate: float = 8e-4
    final_learning_rate: float = 1e-5
    """The cosine ends here."""
    weight_decay: float = 0.05
    warmup_steps: int = 250
    gradient_clip: float = 1.0
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    box_chance: float = 0.5
    """How often the first prompt is the box; else it is a point."""
    tight_box_chance: float = 0.5
    """How often a box prompt is the tight box; else it is jittered."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises the updates of the transformers' matrices (torch >= 2.9)."""
    ba_sam: BaSamConfig | None = None
    """What the encoder does away from its training size; None is plain SAM."""
    average_decay: float = 0.999
    """Of the exponential moving average (EMA) of the weights, which is what is measured and kept in
    the end; 0 keeps the last weights."""
    trained: Literal["all", "ba_sam"] = "all"
    """`ba_sam` trains the coefficients of `attach_coefficients` and nothing else."""
    precision: Literal["bf16", "fp32"] = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("SupervisedConfig.stages must have at least one stage, got none")
        if not 0 <= self.box_chance <= 1 or not 0 <= self.tight_box_chance <= 1:
            raise ConfigError(f"chances must be in 0..1, got {self.box_chance=}")
        if not 0 <= self.average_decay < 1:
            raise ConfigError(f"average_decay must be in 0..1, below 1, got {self.average_decay}")
        if self.trained == "ba_sam" and (self.ba_sam is None or self.ba_sam.bias != "official"):
            raise ConfigError(
                "SupervisedConfig.trained `ba_sam` wants ba_sam with the bias `official`, which "
                f"has the coefficients, got {self.ba_sam}"
            )

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples as tensors."""

    images: Tensor
    """[B, 3, S, S] uint8."""
    targets: Tensor
    """[B * P, S / 4, S / 4] uint8, 255 for a fully covered pixel."""
    boxes_xyxy: Tensor
    """[B * P, 4] in pixels."""
    points: Tensor
    """[B * P, 2] in pixels, (x, y)."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; the objects of one image lie together."""
    return Batch(
        images=torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in samples]),
        targets=torch.cat([torch.from_numpy(s.targets) for s in samples]),
        boxes_xyxy=torch.cat([torch.from_numpy(s.boxes_xyxy) for s in samples]),
        points=torch.cat([torch.from_numpy(s.points) for s in samples]),
    )


@dataclass(frozen=True)
class StepResult:
    """What one step computed; tensors without gradient, but for `loss`."""

    loss: Tensor
    mask_loss: Tensor
    iou_error: Tensor
    box_iou: Tensor
    """Mean IoU of the box-prompted objects, at mask resolution; NaN when there were none."""
    point_iou: Tensor
    """The same for point-prompted ones, best of three."""


def training_loss(
    sam: Sam,
    batch: Batch,
    config: SupervisedConfig,
    *,
    clicks: int,
    is_box: Tensor,
    generator: torch.Generator,
) -> StepResult:
    """Prompt every object of a batch, correct `clicks` times, and measure the answers.

    An object prompted by one point is answered by three masks, of which only the best counts;
    anything else by the single mask.

    Args:
        sam: The model.
        batch: Images and objects.
        config: Weights of the losses.
        clicks: Correcting clicks after the first prompt.
        is_box: [B * P] bool: which objects are prompted by their box first.
        generator: Decides the clicks, on the CPU.

    Returns:
        The loss, averaged over the answers and the objects, and what it is made of.

    Source:
        Kirillov et al., arXiv:2304.02643, section A.

    Differs from the source:
        Targets are soft (the share of a low-resolution pixel that is covered), and the predicted
        IoU of all three masks of a point is trained, as all three are ranked by it later.
    """
    device = batch.images.device
    size = (batch.images.shape[-2], batch.images.shape[-1])
    images = (batch.images.float() - sam.pixel_mean) / sam.pixel_std
    with autocast(config.precision, device):
        image_embeddings = encode_image(sam.image_encoder, images, ba_sam=config.ba_sam)
    grid = (image_embeddings.shape[-2], image_embeddings.shape[-1])
    image_pe = dense_position_encoding(sam.prompt_encoder, grid)
    targets = batch.targets.float() / 255  # [B * P, H, W]
    coords, labels = first_prompts(batch.boxes_xyxy.cpu(), batch.points.cpu(), is_box.cpu())
    coords, labels, is_box = coords.to(device), labels.to(device), is_box.to(device)
    mask_input: Tensor | None = None
    losses, mask_losses, iou_errors = [], [], []
    box_iou = point_iou = torch.full((), math.nan)
    for click in range(clicks + 1):
        with autocast(config.precision, device):
            low_res, iou_predictions, _ = decode_masks(
                sam.mask_decoder,
                image_embeddings,
                image_pe=image_pe,
                sparse_prompt_embeddings=embed_tokens(
                    sam.prompt_encoder, coords, labels, input_size=size
                ),
                dense_prompt_embeddings=embed_dense(sam.prompt_encoder, mask_input, grid_hw=grid),
            )
        iou_predictions = iou_predictions.float()
        single = is_box if click == 0 else torch.ones_like(is_box)
        asked = torch.stack([single, *(3 * [~single])], dim=1)  # [B * P, 4]
        answers, wanted = low_res[asked].float(), targets[asked.nonzero()[:, 0]]  # [K, H, W]
        loss_of_answers = config.focal_weight * focal_loss(answers, wanted)
        loss_of_answers = loss_of_answers + config.dice_weight * dice_loss(answers, wanted)
        per_mask = _spread(loss_of_answers, asked)
        ious = _spread(mask_iou(answers, wanted), asked)
        best_of_three = per_mask[:, 1:].detach().argmin(1) + 1
        chosen = torch.where(single, 0, best_of_three)
        mask_loss = per_mask.gather(1, chosen[:, None]).mean()
        iou_error = (iou_predictions - ious).square()[asked].mean()
        losses.append(mask_loss + config.iou_weight * iou_error)
        mask_losses.append(mask_loss.detach())
        iou_errors.append(iou_error.detach())
        if click == 0:
            reached = ious.gather(1, chosen[:, None])[:, 0]
            box_iou, point_iou = reached[is_box].mean(), reached[~is_box].mean()
        if click < clicks:
            by_score = iou_predictions[:, 1:].detach().argmax(1) + 1
            shown = torch.where(single, 0, by_score)
            last = low_res.detach()[torch.arange(len(shown), device=device), shown].float()
            more_coords, more_labels = correction_clicks(
                last, targets, stride=_MASK_STRIDE, generator=generator
            )
            coords = torch.cat([coords, more_coords], dim=1)
            labels = torch.cat([labels, more_labels], dim=1)
            mask_input = last[:, None]
    return StepResult(
        loss=torch.stack(losses).mean(),
        mask_loss=torch.stack(mask_losses).mean(),
        iou_error=torch.stack(iou_errors).mean(),
        box_iou=box_iou,
        point_iou=point_iou,
    )


def _spread(values: Tensor, where: Tensor) -> Tensor:
    """Put one value [K] at each True of `where` [N, M], and zero elsewhere."""
    return torch.zeros(where.shape, device=values.device).masked_scatter(where, values)


def train(
    sam: Sam,
    sources: Sequence[tuple[Source, float]],
    config: SupervisedConfig,
    *,
    run_dir: Path,
    held_out: Sequence[tuple[Source, float]] = (),
    held_out_images: int = 96,
    evaluate_every: int = 500,
    save_every: int = 250,
    num_workers: int = 1,
    on_progress: Callable[[dict[str, float]], None] | None = None,
) -> Sam:
    """Train a SAM in place; goes on from `run_dir/last.pt` where there is one.

    Args:
        sam: The model, on the device to train on.
        sources: Training scenes with their weights.
        config: The run. Resuming wants the same one, but for the stages' steps.
        run_dir: Gets `last.pt` (to resume from) and `curve.jsonl` (one line a log interval).
        held_out: Scenes to measure on while training; never trained on.
        held_out_images: How many samples of them.
        evaluate_every: Steps between measurements.
        save_every: Steps between resumable checkpoints.
        num_workers: Processes that prepare samples.
        on_progress: Called with each line of the curve.

    Returns:
        The same model with the average of its weights, in evaluation mode.

    Raises:
        ConfigError: If the loss is not finite.
        CheckpointError: If `run_dir/last.pt` is of another run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    device = sam.pixel_mean.device
    optimizers = _optimizers(sam, config)
    average = AveragedModel(
        sam,
        multi_avg_fn=get_ema_multi_avg_fn(config.average_decay),  # type: ignore[no-untyped-call]  # torch's own
    )
    step = _resume(sam, average, optimizers, config, run_dir / "last.pt")
    parameters = [p for _, p in _trained(sam, config)]
    generator = torch.Generator()
    sam.train()
    started, first_step = time.monotonic(), step
    recent: list[StepResult] = []
    images_seen, window_start = 0, time.monotonic()
    for stage, batches in _stages(sources, config, step, num_workers):
        for batch in batches:
            generator.manual_seed(config.seed * 1_000_003 + step)
            batch = to_device(batch, device)
            is_box = torch.rand(len(batch.points), generator=generator) < config.box_chance
            loose = jitter_boxes(
                batch.boxes_xyxy.cpu(), image_size=batch.images.shape[-1], generator=generator
            )
            tight = torch.rand(len(loose), generator=generator) < config.tight_box_chance
            boxes = torch.where(tight[:, None], batch.boxes_xyxy.cpu(), loose).to(device)
            rate = _learning_rate(step, config)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            result = training_loss(
                sam,
                replace(batch, boxes_xyxy=boxes),
                config,
                clicks=stage.clicks,
                is_box=is_box,
                generator=generator,
            )
            if not torch.isfinite(result.loss):
                raise ConfigError(
                    f"the loss must be finite, got {result.loss.item()} at step {step}; "
                    "lower SupervisedConfig.learning_rate"
                )
            result.loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(sam)
            sam.zero_grad(set_to_none=True)
            step += 1
            recent.append(result)
            images_seen += stage.batch_size
            last_step = step == config.total_steps
            line: dict[str, float] = {}
            if step % 50 == 0 or last_step:
                now = time.monotonic()
                line = _summary(recent)
                line |= {
                    "step": step,
                    "image_size": stage.image_size,
                    "learning_rate": rate,
                    "images_per_s": images_seen / (now - window_start),
                    "elapsed_s": now - started,
                    "eta_s": (now - started) / (step - first_step) * (config.total_steps - step),
                }
                recent, images_seen, window_start = [], 0, now
            if held_out and (step % evaluate_every == 0 or last_step):
                line |= {"step": step} | evaluate_held_out(
                    average.module,
                    held_out,
                    config,
                    image_size=stage.image_size,
                    images=held_out_images,
                )
                window_start = time.monotonic()
            if line:
                _append(run_dir / "curve.jsonl", line)
                if on_progress is not None:
                    on_progress(line)
            if step % save_every == 0 or last_step:
                _save(sam, average, optimizers, config, step, run_dir / "last.pt")
    sam.load_state_dict(average.module.state_dict())
    return sam.eval()


@torch.inference_mode()
def evaluate_held_out(
    sam: Sam,
    sources: Sequence[tuple[Source, float]],
    config: SupervisedConfig,
    *,
    image_size: int,
    images: int,
) -> dict[str, float]:
    """Measure box and point IoU at mask resolution on fixed samples, without augmentation.

    Returns:
        `held_out_box_iou` (tight box, single mask), `held_out_point_iou` (random point, best of
        three) and `held_out_rectangle_iou` (the box itself as mask).
    """
    samples = MixedSamples(sources, size=image_size, prompts=4, seed=config.seed + 1, augment=False)
    was_training = sam.training
    sam.eval()
    device = sam.pixel_mean.device
    totals: dict[str, list[float]] = {"box": [], "point": [], "rectangle": []}
    for first in range(0, images, 8):
        batch = to_device(
            collate([samples[i] for i in range(first, min(first + 8, images))]), device
        )
        everything = torch.ones(len(batch.points), dtype=torch.bool)
        for name, is_box in (("box", everything), ("point", ~everything)):
            result = training_loss(
                sam, batch, config, clicks=0, is_box=is_box, generator=torch.Generator()
            )
            totals[name].append(float(result.box_iou if name == "box" else result.point_iou))
        totals["rectangle"].append(float(_rectangle_iou(batch).mean()))
    sam.train(was_training)
    return {f"held_out_{name}_iou": sum(v) / len(v) for name, v in totals.items()}


def _rectangle_iou(batch: Batch) -> Tensor:
    height, width = batch.targets.shape[-2:]
    ys = (torch.arange(height, device=batch.targets.device) + 0.5) * _MASK_STRIDE
    xs = (torch.arange(width, device=batch.targets.device) + 0.5) * _MASK_STRIDE
    x0, y0, x1, y1 = batch.boxes_xyxy.unbind(1)
    rows = (ys >= y0[:, None]) & (ys < y1[:, None])
    columns = (xs >= x0[:, None]) & (xs < x1[:, None])
    inside = rows[:, :, None] & columns[:, None, :]
    return mask_iou(inside.float() - 0.5, batch.targets.float() / 255)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Compute in `bf16` inside the block, or change nothing (`fp32`)."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _trained(sam: Sam, config: SupervisedConfig) -> list[tuple[str, nn.Parameter]]:
    """Name the parameters that a run trains.

    Raises:
        ConfigError: If there are none.
    """
    named = [(n, p) for n, p in sam.named_parameters() if p.requires_grad]
    if config.trained == "ba_sam":
        named = [(n, p) for n, p in named if n.endswith(".ba_sam_coefficient")]
    if not named:
        raise ConfigError(
            f"a model must have parameters to train ({config.trained}), got none; "
            "attach_coefficients gives it those of BA-SAM"
        )
    return named


def _optimizers(sam: Sam, config: SupervisedConfig) -> list[torch.optim.Optimizer]:
    """Decay matrices only; with `muon`, transformer matrices get Muon and the rest AdamW."""
    named = _trained(sam, config)
    no_decay = [p for n, p in named if p.ndim < 2 or "pos" in n or "token" in n or "embed." in n]
    taken = {id(p) for p in no_decay}
    matrices = [p for _, p in named if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        hidden = [
            p
            for n, p in named
            if id(p) not in taken and p.ndim == 2 and (".blocks." in n or ".transformer." in n)
        ]
        if hidden:
            optimizers.append(
                torch.optim.Muon(
                    hidden,
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        taken |= {id(p) for p in hidden}
        matrices = [p for p in matrices if id(p) not in taken]
    optimizers.append(
        torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": no_decay, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=True,
        )
    )
    return optimizers


def _learning_rate(step: int, config: SupervisedConfig) -> float:
    """Linear warm-up, then one cosine down over all stages."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(config.total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine


class _Steps(Sampler[list[tuple[int, int]]]):
    """The samples of steps `first` to `last`, batch by batch: each its side and its index."""

    def __init__(self, stage: Stage, *, first: int, seed: int) -> None:
        self._stage, self._first, self._seed = stage, first, seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        count = self._stage.batch_size
        for step in range(self._first, self._stage.steps):
            size = int(np.random.default_rng((self._seed, step)).choice(self._stage.sizes))
            yield [(size, index) for index in range(step * count, (step + 1) * count)]

    def __len__(self) -> int:
        return self._stage.steps - self._first


class _BySize(Dataset[Sample]):
    """Samples of several sides, indexed by side and number."""

    def __init__(self, sources: Sequence[tuple[Source, float]], stage: Stage, *, seed: int) -> None:
        self._samples = {
            size: MixedSamples(sources, size=size, prompts=stage.prompts, seed=seed)
            for size in stage.sizes
        }

    def __getitem__(self, index: tuple[int, int]) -> Sample:
        size, number = index
        return self._samples[size][number]


def _stages(
    sources: Sequence[tuple[Source, float]], config: SupervisedConfig, step: int, num_workers: int
) -> Iterator[tuple[Stage, DataLoader[Batch]]]:
    """Yield each stage that is not over yet with its remaining batches."""
    begin = 0
    for number, stage in enumerate(config.stages):
        done = min(max(step - begin, 0), stage.steps)
        begin += stage.steps
        if done == stage.steps:
            continue
        yield (
            stage,
            stage_loader(
                sources,
                stage,
                seed=config.seed * 1000 + number,
                first=done,
                num_workers=num_workers,
            ),
        )


def stage_loader(
    sources: Sequence[tuple[Source, float]],
    stage: Stage,
    *,
    seed: int,
    first: int = 0,
    num_workers: int,
) -> DataLoader[Batch]:
    """Load the batches of a stage from step `first` on, always the same ones."""
    return DataLoader(
        _BySize(sources, stage, seed=seed),  # type: ignore[arg-type]  # collate makes the batches
        batch_sampler=_Steps(stage, first=first, seed=seed),
        collate_fn=collate,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device."""
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        boxes_xyxy=batch.boxes_xyxy.to(device, non_blocking=True),
        points=batch.points.to(device, non_blocking=True),
    )


def _summary(results: Sequence[StepResult]) -> dict[str, float]:
    def mean(values: list[Tensor]) -> float:
        return float(torch.stack([v.detach().float().cpu() for v in values]).nanmean())

    return {
        "loss": mean([r.loss for r in results]),
        "mask_loss": mean([r.mask_loss for r in results]),
        "iou_error": mean([r.iou_error for r in results]),
        "box_iou": mean([r.box_iou for r in results]),
        "point_iou": mean([r.point_iou for r in results]),
    }


def _append(path: Path, line: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")


def _run_identity(config: SupervisedConfig) -> str:
    """What must not change between the parts of one run."""
    return json.dumps({k: v for k, v in asdict(config).items() if k != "stages"}, sort_keys=True)


def _save(
    sam: Sam,
    average: AveragedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    config: SupervisedConfig,
    step: int,
    path: Path,
) -> None:
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "model": sam.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "identity": _run_identity(config),
        },
        partial,
    )
    partial.replace(path)


def _resume(
    sam: Sam,
    average: AveragedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    config: SupervisedConfig,
    path: Path,
) -> int:
    if not path.exists():
        return 0
    saved = torch.load(path, map_location=sam.pixel_mean.device, weights_only=True)
    if saved["identity"] != _run_identity(config):
        raise CheckpointError(
            f"{path} must be of the same run, got other settings: {saved['identity']}; "
            "resume with those, or name an empty run directory"
        )
    sam.load_state_dict(saved["model"])
    average.load_state_dict(saved["average"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    _LOG.info("resuming %s at step %d", path, saved["step"])
    return int(saved["step"])
