"""What a step of each way to adapt costs, and how much memory it takes.

    python -m tests.bench_adaptation [--model vit_b] [--objects 10] [--only "wesam;lora"]

All forms see the same image of the training size with the same objects, one image a step, each form
in a process of its own; those that learn masks answer without a prompt as well. `plain` is WeSAM as
its official code has it: student, teacher and anchor run through segment_anything's own modules in
every step, every mask is enlarged to the image, and the losses are taken there. `checkpointed`
computes the encoder's blocks twice. `vit_b` has random weights, as speed and memory do not depend
on them.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sam_ext.checkpoints import load_sam
from sam_ext.config import MODELS
from sam_ext.evaluate.common import print_rows
from sam_ext.evaluate.records import machine_facts
from sam_ext.labels import LabelledImage, LabelledObject
from sam_ext.lora import attach_lora, lora_parameters
from sam_ext.metrics import rectangle_mask
from sam_ext.resolution import ResolutionPolicy
from sam_ext.sam import Sam, build_sam
from sam_ext.training.finetune import FinetuneConfig, finetune
from sam_ext.training.wesam import WesamConfig, adapt

BAR_GB = 8.0


@dataclass(frozen=True, kw_only=True)
class Row:
    form: str
    steps: int
    median_s: float
    peak_memory_gb: float
    """Of the whole process, weights and libraries included."""
    bar: str = f"peak_memory_gb < {BAR_GB:g}"
    """What this project wants of ViT-B with 10 objects."""


def task(side: int, objects: int, seed: int = 0, *, has_masks: bool) -> LabelledImage:
    """A square image of noise with boxes on it, or with the masks that fill them."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    corners = rng.uniform(0, 0.6, (objects, 2)) * side
    boxes = np.concatenate([corners, corners + rng.uniform(0.2, 0.4, (objects, 2)) * side], 1)
    return LabelledImage(
        name="noise",
        read=lambda: pixels,
        objects=tuple(
            LabelledObject(
                label="object",
                box_xyxy=None if has_masks else box,
                point_coords=np.zeros((0, 2)),
                point_labels=np.zeros(0, np.int64),
                mask=rectangle_mask(box, (side, side)) if has_masks else None,
            )
            for box in boxes
        ),
    )


def ours(sam: Sam, objects: int, steps: int, *, method: str, checkpointing: bool) -> list[float]:
    side = sam.image_encoder.img_size
    options = {
        "steps": steps,
        "crop_chance": 0.0,
        "max_objects": objects,
        "gradient_checkpointing": checkpointing,
    }
    policy = ResolutionPolicy(mode="native", min_side=side, max_side=side)
    times = [time.perf_counter()]

    def on_step(_: object) -> None:
        times.append(time.perf_counter())

    image = task(side, objects, has_masks=method != "wesam")
    if method == "wesam":
        adapt(sam, [image], WesamConfig(policy=policy, **options), on_step=on_step)
    else:
        options |= {"policies": (policy,), "prompt_free_chance": 1.0}
        finetune(sam, [image], FinetuneConfig(method=method, **options), on_step=on_step)
    return np.diff(times).tolist()


def plain(sam: Sam, objects: int, steps: int) -> list[float]:
    image = task(sam.image_encoder.img_size, objects, has_masks=False)
    student = copy.deepcopy(sam).requires_grad_(False)
    attach_lora(student.image_encoder)
    optimizer = torch.optim.Adam(lora_parameters(student), lr=1e-4, weight_decay=1e-4)
    boxes = torch.tensor(np.stack([one.box_xyxy for one in image.objects])).float()
    weak = torch.tensor(image.read()).permute(2, 0, 1).float()
    times = [time.perf_counter()]
    for _ in range(steps):
        strong = (weak * 0.9).clamp(0, 255)
        with torch.no_grad():
            anchor_features, anchor, _ = three_pass_branch(sam, weak, boxes)
        teacher_features, teacher, _ = three_pass_branch(student, weak, boxes)
        _, masks, ious = three_pass_branch(student, strong, boxes)
        loss = plain_loss(masks, ious, teacher, anchor, teacher_features, anchor_features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter())
    return np.diff(times).tolist()


def three_pass_branch(sam: Sam, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [256, H, W], masks [P, S, S] at the image's size and IoU predictions [P]."""
    embeddings = sam.image_encoder(((image - sam.pixel_mean) / sam.pixel_std)[None])
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    low_res, ious = sam.mask_decoder(
        image_embeddings=embeddings,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks = F.interpolate(low_res, image.shape[-2:], mode="bilinear")[:, 0]
    return embeddings[0], masks, ious[:, 0]


def plain_loss(
    student: Tensor,
    ious: Tensor,
    teacher: Tensor,
    anchor: Tensor,
    teacher_features: Tensor,
    anchor_features: Tensor,
) -> Tensor:
    def dice(logits: Tensor, targets: Tensor) -> Tensor:
        p, y = torch.sigmoid(logits).flatten(), targets.flatten()
        return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)

    pseudo, frozen = (teacher > 0).float().detach(), (anchor > 0).float()
    bce = F.binary_cross_entropy_with_logits(student, pseudo, reduction="none")
    focal = (0.8 * (1 - torch.exp(-bce)) ** 2 * bce).mean()
    hard = (student >= 0.5).float()
    overlap, either = (hard * pseudo).sum((1, 2)), ((hard + pseudo) > 0).float().sum((1, 2))
    iou = (ious - overlap / either.clamp(min=1)).square().mean()
    held = 0.5 * dice(student, frozen) + 0.5 * dice(teacher, frozen)
    features = [pool(teacher_features, teacher), pool(anchor_features, anchor)]
    similarity = torch.exp(F.normalize(features[0]) @ F.normalize(features[1]).t() / 0.3)
    contrast = -torch.log(similarity.diagonal().sum() / similarity.sum())
    return 20 * focal + dice(student, pseudo) + iou + held + contrast


def pool(features: Tensor, masks: Tensor) -> Tensor:
    small = F.interpolate(masks[None].detach(), features.shape[-2:], mode="bilinear")[0]
    weights = (torch.sigmoid(small) > 0.5).float().flatten(1)
    return weights @ F.normalize(features, dim=0).flatten(1).t() / weights.sum(1)[:, None].clamp(1)


FORMS: dict[str, Callable[[Sam, int, int], list[float]]] = {
    **{
        name + (", checkpointed" if checkpointing else ""): partial(
            ours, method=name, checkpointing=checkpointing
        )
        for name in ("wesam", "lora", "sam-adapter")
        for checkpointing in (False, True)
    },
    "wesam, plain": plain,
}


def measured(form: str, model: str, *, objects: int, steps: int, warmup: int) -> Row:
    """Train in this process, which is then as large as it ever was."""
    if model == "tiny":
        sam = load_sam("tiny", weights_dir=Path())
    else:
        torch.manual_seed(0)
        sam = build_sam(MODELS[model])
    seconds = FORMS[form](sam, objects, warmup + steps)[warmup:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return Row(
        form=form,
        steps=len(seconds),
        median_s=round(float(np.median(seconds)), 3),
        peak_memory_gb=round(peak, 2),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_adaptation", description=__doc__)
    parser.add_argument("--model", choices=("tiny", "vit_b"), default="vit_b")
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--only", default=";".join(FORMS), metavar="FORM;...")
    options = parser.parse_args(arguments)
    rows = []
    for form in options.only.split(";"):
        if form not in FORMS:
            parser.error(f"--only must be some of {'; '.join(FORMS)}, got {form}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            asked = process.submit(
                measured,
                form,
                options.model,
                objects=options.objects,
                steps=options.steps,
                warmup=options.warmup,
            )
            rows.append(asked.result())
        print_rows(rows)  # after each form, as all of them take long
    Console().print(", ".join(f"{k}: {v}" for k, v in machine_facts().items()), markup=False)


if __name__ == "__main__":
    main()
