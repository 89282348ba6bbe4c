"""WeSAM: a SAM adapts itself to a project's images with the weak labels that are there.

The student sees a strong view of an image and learns the masks that the teacher, the same model,
gives for a weak one. The anchor, the model as it was, keeps both from drifting off together. Only
LoRA's few parameters in the image encoder are trained.

Source:
    Zhang et al., arXiv:2312.03502, and the official code.

Differs from the source:
    - The focal loss is weighed by its alpha of 0.8. The official call passes the number of masks in
      alpha's place, and in the place of dice's smoothing.
    - Dice is taken of each object by itself. The official one flattens all objects of an image into
      one, where large objects drown small ones.
    - The student's mask is cut at logit 0 for its IoU, as everybody's is. The official one is cut
      at logit 0.5.
    - Images are normalised by SAM's pixel mean and deviation. The official encoder gets 0..1.
    - Images are padded at the bottom and right to whole patches, at the size and in the crops in
      which they are served. The official code pads squares on all sides, as no released SAM was
      trained.
    - The background is one more instance of the contrastive loss, which is constantly 0 for an
      image with one object otherwise.
    - Losses are taken at the decoder's resolution, on pixels of the image. The official ones are
      taken at the input's, sixteen times as many, padding included.
    - A pseudo label is corrected by what the annotator asserted (`correct_pseudo_masks`): nothing
      outside a drawn box or far from a rough mask, the points inside or outside as they say. Where
      nothing is left of it, the anchor's mask takes its place.
    - What teacher and anchor give to learn is their probabilities, the teacher's sharpened, with a
      Dice that is least where the two are equal. The official code's masks of 0 and 1 have
      gradients where there is nothing to learn: masks fill their boxes after some hundred steps.
    - An anchor's mask is held to the harder the better it agrees with a drawn box or mask
      (`trust`), and corrected by the labels as pseudo labels are.
    - `projection_weight` adds a loss of box labels, and `pairwise_weight` one of the image's
      colours, for objects whose box the anchor misses; `loose_prompts` lets the student answer
      looser prompts than the teacher's; `box_of_points` asks teacher and anchor by a box that is
      estimated from three points or more. All four are ours, and can be switched off.
    - What follows from the frozen anchor is computed once for each view, not in every step.
    - Nothing is chosen by a test split; the last step's model is what comes out.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

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
from sam_ext.stable_sam import StableSam, plugin_for
from sam_ext.training.branch import (
    Branch,
    Seen,
    chosen_masks,
    pixels_of,
    token_groups,
    unpadded,
)
from sam_ext.training.losses import dice_loss, mask_iou, mean_where, squared_dice_loss
from sam_ext.training.parts import MASK_STRIDE, Kept, PartSource, PromptChoice, View
from sam_ext.training.robust import noisy_boxes, random_points
from sam_ext.training.steps import (
    LastStep,
    TrainingStep,
    run_identity,
    run_steps,
    single_device,
)
from sam_ext.training.views import FLIPS, strong_view
from sam_ext.training.wesam_losses import (
    box_projection_loss,
    color_affinity,
    contrastive_loss,
    pairwise_loss,
    pooled_features,
    self_training_focal_loss,
)

__all__ = ["PromptChoice", "WesamConfig", "adapt", "default_steps"]

_LOOSE_BOX = 0.2  # strength of `noisy_boxes`
_POINTS_CHANCE, _MOST_POINTS = 0.5, 3  # that take a box's place
_DOUBTED, _TRUSTED = 0.85, 0.95  # agreement of an anchor's mask with the labels


def default_steps(images: int) -> int:
    """Choose how long to adapt on so many images."""
    return min(max(10 * images, 100), 300)


@dataclass(frozen=True, kw_only=True)
class WesamConfig:
    """One adaptation; losses are switched off by a weight of 0."""

    steps: int | None = None
    """None takes `default_steps`."""
    learning_rate: float = 1e-3
    """After the warm-up; a cosine brings it to 0."""
    weight_decay: float = 1e-4
    warmup_steps: int = 20
    gradient_clip: float = 1.0
    rank: int = 4
    """LoRA's."""
    focal_weight: float = 1.0
    """20 in the source, where it outweighs the others; measured with `tiny`, masks get worse."""
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    anchor_weight: float = 1.0
    contrastive_weight: float = 0.1
    """1 in the source; measured with `tiny`, outlines get worse."""
    projection_weight: float = 1.0
    """Of `box_projection_loss`, for objects with a drawn box; not in the source."""
    pairwise_weight: float = 2.0
    """Of `pairwise_loss`, for objects with a drawn box that the anchor misses; not in the
    source."""
    sharpness: float = 2.0
    """By how much the teacher's logits are multiplied before their probabilities are what is
    learnt; the anchor's are not. Infinite: their masks, with plain Dice, as in the source."""
    trust: float = 8.0
    """How many times harder the teacher is held to an anchor's mask that agrees with a drawn box
    or mask than to any other; 1 in the source."""
    correct_pseudo_masks: bool = True
    """Let what annotators asserted correct the teacher's and the anchor's masks; not in the
    source."""
    loose_prompts: float = 0.5
    """How often the student is asked more loosely than the teacher, by a jittered box, some of the
    points, or points drawn from the teacher's mask; not in the source."""
    box_of_points: bool = True
    """Ask teacher and anchor with `with_box_of_points` in place of points; not in the source."""
    prompts: PromptChoice = "auto"
    """How objects are asked for, as `prompt_of` takes it; `none` asks for what the anchor finds by
    itself, as `auto` does in an image without objects."""
    targets: Literal["teacher", "masks"] = "teacher"
    """`masks` learns the labels' masks as if they were exact: full supervision, to compare with."""
    max_objects: int = 20
    """Objects of one step, at most."""
    policy: ResolutionPolicy | None = None
    """At which size images are encoded; None takes `default_policy`."""
    crops: CropPolicy | None = None
    """In which crops small objects are served; None takes `default_crops`."""
    crop_chance: float = 0.75
    """How often an object that is served in a crop is seen there; else in the whole image."""
    strong_chance: float = 0.25
    """How often each transform of `strong_view` is applied; in the source every other time."""
    ba_sam: BaSamConfig | None = None
    """What the encoder does away from its training size; None is plain SAM."""
    precision: Precision = "auto"
    """Of training, as `resolve_precision` takes it."""
    gradient_checkpointing: bool = False
    """Compute the encoder's blocks twice instead of keeping what is in them."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"WesamConfig.steps must be at least 1, got {self.steps}")
        weights = {
            name: getattr(self, name)
            for name in (field.name for field in dataclasses.fields(self))
            if name.endswith(("_weight", "_rate", "_decay", "_steps", "_clip"))
        }
        if bad := {n: v for n, v in weights.items() if not 0 <= v < math.inf}:
            raise ConfigError(f"WesamConfig's numbers must be at least 0 and finite, got {bad}")
        if not (self.sharpness > 0 and 1 <= self.trust < math.inf):
            raise ConfigError(
                "WesamConfig.sharpness must be above 0 and WesamConfig.trust at least 1, "
                f"got {self.sharpness} and {self.trust}"
            )
        for name in ("loose_prompts", "crop_chance", "strong_chance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"WesamConfig.{name} must be in 0..1, got {getattr(self, name)}")
        if min(self.rank, self.max_objects) < 1:
            raise ConfigError(
                "WesamConfig.rank and WesamConfig.max_objects must be at least 1, "
                f"got {self.rank} and {self.max_objects}"
            )


def adapt(
    sam: Sam,
    images: Sequence[LabelledImage],
    config: WesamConfig,
    *,
    run_dir: Path | None = None,
    on_step: Callable[[TrainingStep], None] | None = None,
    stable_sam: StableSam | None = None,
    fabric: Fabric | None = None,
) -> Sam:
    """Adapt a copy of a SAM to images and their weak labels.

    Args:
        sam: The model, on the device to train on; it is not changed.
        images: With what is known of their objects.
        config: The run.
        run_dir: Gets `last.pt` every 20 steps or 30 seconds. Where there is one of the same run, it
            goes on from there, to the same end. None keeps nothing.
        on_step: Called after each step; what it raises ends the run.
        stable_sam: The plugin that the model is served with; it is not changed.
        fabric: Already launched, to train on several devices, each with its own parts of the
            images; None trains on the model's device alone.

    Returns:
        A new SAM with LoRA attached and trained, in evaluation mode; `save_adapter` writes what is
        new of it, `merge_lora` makes it plain.

    Raises:
        ConfigError: If the loss is not finite.
        DataError: If there is no image, or no object that can be asked for as the config says.
        CheckpointError: If `run_dir/last.pt` is of another run, or damaged.
    """
    device = sam.device
    precision = resolve_precision(device, config.precision)
    if fabric is None:
        fabric = single_device(device, precision)
    policy = config.policy or default_policy(sam.image_encoder.img_size)
    crops = config.crops or default_crops(sam.image_encoder.img_size)
    anchor = Predictor(
        sam,
        ba_sam=config.ba_sam,
        policy=policy,
        precision=config.precision,
        stable_sam=stable_sam,
    )
    parts = PartSource(
        images,
        anchor=anchor,
        kind=config.prompts,
        box_of_points=config.box_of_points,
        crops=crops if config.crop_chance else None,
        max_objects=config.max_objects,
        crop_chance=config.crop_chance,
        seed=config.seed,
    )
    adapted = _with_lora(sam, config)
    branch = Branch(
        adapted,
        stable_sam,
        ba_sam=config.ba_sam,
        checkpointing=config.gradient_checkpointing,
    )
    optimizer = torch.optim.AdamW(
        lora_parameters(adapted), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    anchored = Kept(max_entries=1024)
    ask_anchor = partial(
        _anchor_target, anchor, is_ambiguous=plugin_for(stable_sam, is_several_points=False) is None
    )

    def backward(
        module: nn.Module, own: int, generator: torch.Generator
    ) -> tuple[dict[str, float], float]:
        part = parts.part(own)
        flip = FLIPS[int(torch.randint(len(FLIPS), (), generator=generator))]
        view = part.view.flipped(flip)
        target = anchored.get((part.key, flip), partial(ask_anchor, view))
        padded_size = anchor.padded_size((view.image.shape[0], view.image.shape[1]))
        return _backward(fabric, module, view, target, config, padded_size, generator)

    last = None
    if run_dir is not None:
        identity = run_identity(anchor.fingerprint, images, config)
        last = LastStep(run_dir / "last.pt", identity)
    run_steps(
        adapted,
        branch,
        optimizer,
        backward,
        steps=config.steps or default_steps(len(images)),
        warmup_steps=config.warmup_steps,
        gradient_clip=config.gradient_clip,
        seed=config.seed,
        fabric=fabric,
        last=last,
        on_step=on_step,
    )
    return adapted.eval()


class _Target(NamedTuple):
    """What the anchor says of a view."""

    logits: Tensor
    """[P, H / 4, W / 4], in half precision: all that are kept take much memory."""
    token: Tensor
    """[P], which of the four masks: the single one, or a single point's best of three."""
    features: Tensor
    """[P + 1, 256], the background last."""
    is_ambiguous: bool
    """Whether a single point has three masks; with a plugin it has the single one, too."""
    trust: Tensor
    """[P] in 0..1: 1 where the mask agrees with a drawn box or mask, 0 where not."""


def _features(embeddings: Tensor, masks: Tensor) -> Tensor:
    """Pool an image's features by objects' masks and by what none of them covers: [P + 1, C]."""
    grid = F.interpolate(masks[None].float(), embeddings.shape[-2:], mode="bilinear")[0] > 0.5
    background = ~grid.any(dim=0, keepdim=True)
    return pooled_features(embeddings, torch.cat([grid, background]))


@torch.no_grad()
def _anchor_target(anchor: Predictor, view: View, *, is_ambiguous: bool) -> _Target:
    """Ask the frozen model about a view."""
    image = torch.from_numpy(view.image).permute(2, 0, 1)
    embedding = anchor.embed(view.image)
    patch = embedding.padded_size[0] // embedding.image_embeddings.shape[-2]
    token, kept = [], []
    answers = anchor.decode_low_res(embedding, view.teacher_prompts)
    for prompt, (low_res, ious, _) in zip(view.teacher_prompts, answers, strict=True):
        logits = unpadded(low_res, image, MASK_STRIDE)
        best = 0
        if prompt.is_single_point and is_ambiguous:
            x, y = (prompt.point_coords[0] // MASK_STRIDE).astype(int)
            y, x = min(max(y, 0), logits.shape[1] - 1), min(max(x, 0), logits.shape[2] - 1)
            holds = logits[1:, y, x] > 0
            best = 1 + int((ious[1:] + 10 * holds).argmax())
        token.append(best)
        kept.append(logits[best])
    masks = torch.stack(kept) > 0
    features = unpadded(embedding.image_embeddings, image, patch)[0].float()
    trust = (view.agreement(masks) - _DOUBTED) / (_TRUSTED - _DOUBTED)
    return _Target(
        logits=torch.stack(kept).half(),
        token=torch.tensor(token, device=anchor.device),
        features=_features(features, masks),
        is_ambiguous=is_ambiguous,
        trust=trust.clamp(0, 1),
    )


def _backward(
    fabric: Fabric,
    module: nn.Module,
    view: View,
    target: _Target,
    config: WesamConfig,
    padded_size: tuple[int, int],
    generator: torch.Generator,
) -> tuple[dict[str, float], float]:
    """Add one view's gradients to those of the parameters.

    The teacher's part and the student's go back one after the other, so that only one view's
    activations are in memory.

    Returns:
        The losses before they are weighed, with their weighed sum as `total`, and the mean IoU of
        the student's masks with those it learns.
    """
    device = target.logits.device
    weak = pixels_of(view.image, device)
    strong = strong_view(weak, generator=generator, chance=config.strong_chance)
    pseudo = view.masks.to(device)
    losses: dict[str, Tensor] = {}
    if config.targets == "teacher":
        learns = config.anchor_weight > 0 or config.contrastive_weight > 0
        with torch.set_grad_enabled(learns):
            seen: Seen = module(weak, token_groups(view.teacher_prompts, device), padded_size)
            teacher = chosen_masks(seen.logits, target.token)
            losses = _weighed(_teacher_losses(seen, teacher, view, target, config), config)
        if learns:
            fabric.backward(_sum(losses))
        pseudo = _pseudo_masks(teacher.detach(), view, target, config)
        del seen, teacher
    prompts = view.prompts
    is_loose = bool(torch.rand((), generator=generator) < config.loose_prompts)
    if is_loose:
        prompts = _loosened(prompts, (pseudo > 0.5).float(), generator)
    seen = module(strong, token_groups(prompts, device), padded_size)
    of_student, mean_iou = _student_losses(seen, pseudo, prompts, view, target, config)
    of_student = _weighed(of_student, config)
    fabric.backward(_sum(of_student))
    for name, value in of_student.items():
        losses[name] = losses[name] + value if name in losses else value
    told = {name: float(value.detach()) for name, value in losses.items()}
    return told | {"total": float(_sum(losses).detach())}, float(mean_iou)


def _weighed(losses: Mapping[str, Tensor], config: WesamConfig) -> dict[str, Tensor]:
    return {name: getattr(config, f"{name}_weight") * value for name, value in losses.items()}


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _teacher_losses(
    seen: Seen, teacher: Tensor, view: View, target: _Target, config: WesamConfig
) -> dict[str, Tensor]:
    """Hold the teacher's masks and features to the anchor's."""
    losses = {}
    if config.anchor_weight:
        weights = 1 + (config.trust - 1) * target.trust
        values = weights * _dice(teacher, _anchor_shares(view, target, config), config)
        losses["anchor"] = 0.5 * values.mean()
    if config.contrastive_weight:
        features = _features(seen.embeddings, teacher.detach() > 0)
        losses["contrastive"] = contrastive_loss(features, target.features)
    return losses


def _dice(logits: Tensor, targets: Tensor, config: WesamConfig) -> Tensor:
    """Compare masks with what they are to be by the Dice that is least where they are that."""
    if math.isinf(config.sharpness):
        return dice_loss(logits, targets)
    return squared_dice_loss(logits, targets)


def _anchor_shares(view: View, target: _Target, config: WesamConfig) -> Tensor:
    """Say what a model is held to [P, H, W] in 0..1: the anchor's masks, corrected."""
    sharpness = math.inf if math.isinf(config.sharpness) else 1.0
    return _corrected(_shares(target.logits, sharpness), view, config)


def _pseudo_masks(logits: Tensor, view: View, target: _Target, config: WesamConfig) -> Tensor:
    """Make the student's targets [P, H, W] in 0..1 of the teacher's logits [P, H, W]."""
    shares = _corrected(_shares(logits, config.sharpness), view, config)
    if config.correct_pseudo_masks:
        is_left = ((logits > 0) & view.allowed.to(logits.device)).flatten(1).any(1)
        instead = _corrected(_shares(target.logits, config.sharpness), view, config)
        shares = torch.where(is_left[:, None, None], shares, instead)
    return shares


def _shares(logits: Tensor, sharpness: float) -> Tensor:
    """Turn logits into probabilities, or with infinite sharpness into masks of 0 and 1."""
    if math.isinf(sharpness):
        return (logits > 0).float()
    return torch.sigmoid(sharpness * logits.float())


def _corrected(shares: Tensor, view: View, config: WesamConfig) -> Tensor:
    """Make masks [P, H, W] what annotators asserted, where they asserted anything."""
    if not config.correct_pseudo_masks:
        return shares
    allowed, required = view.allowed.to(shares.device), view.required.to(shares.device)
    return (shares * allowed).masked_fill(required, 1.0)


def _student_losses(
    seen: Seen,
    pseudo: Tensor,
    prompts: Sequence[ObjectPrompt],
    view: View,
    target: _Target,
    config: WesamConfig,
) -> tuple[dict[str, Tensor], Tensor]:
    """Measure the student against the pseudo masks, the anchor's masks and the drawn boxes.

    Returns:
        The losses, and the mean IoU with the pseudo masks.
    """
    device = pseudo.device
    known = (pseudo > 0.5).flatten(1).any(1)
    single = torch.tensor(
        [prompt.is_single_point and target.is_ambiguous for prompt in prompts], device=device
    )
    asked = torch.stack([~single, *(3 * [single])], 1)  # [P, 4]
    per_mask = torch.full(asked.shape, math.inf, device=device)
    wanted = pseudo[asked.nonzero()[:, 0]]
    focal = self_training_focal_loss(seen.logits[asked], wanted)
    dice = _dice(seen.logits[asked], wanted, config)
    combined = config.focal_weight * focal + config.dice_weight * dice
    best = per_mask.masked_scatter(asked, combined.detach()).argmin(1)
    at_best = F.one_hot(best, 4).bool()[asked]
    student = chosen_masks(seen.logits, best)
    ious = mask_iou(student, pseudo)
    guessed = seen.ious.gather(1, best[:, None])[:, 0]
    losses = {}
    for name, values in (
        ("focal", focal[at_best]),
        ("dice", dice[at_best]),
        ("iou", (guessed - ious).square()),
    ):
        losses[name] = mean_where(known, values)
    if config.anchor_weight and config.targets == "teacher":
        wanted = _anchor_shares(view, target, config)
        losses["anchor"] = 0.5 * _dice(student, wanted, config).mean()
    boxes = view.boxes.to(device)
    has_box = boxes.flatten(1).any(1)
    if config.projection_weight:
        values = box_projection_loss(student, boxes)
        losses["projection"] = mean_where(has_box, values)
    if config.pairwise_weight and config.targets == "teacher":
        affinity = color_affinity(view.image, stride=MASK_STRIDE).to(device)
        values = (1 - target.trust) * pairwise_loss(student, affinity, boxes)
        losses["pairwise"] = mean_where(has_box, values)
    return losses, mean_where(known, ious)


def _loosened(
    prompts: Sequence[ObjectPrompt], pseudo: Tensor, generator: torch.Generator
) -> tuple[ObjectPrompt, ...]:
    """Ask more loosely, for all objects alike: jitter boxes or take points, leave points out.

    Args:
        prompts: P objects.
        pseudo: [P, H / 4, W / 4], the masks that are wanted.
        generator: Decides everything.
    """
    size_hw = (MASK_STRIDE * pseudo.shape[1], MASK_STRIDE * pseudo.shape[2])
    by_points = bool(torch.rand((), generator=generator) < _POINTS_CHANCE)
    count = 1 + int(torch.randint(_MOST_POINTS, (), generator=generator))
    shares = torch.rand(2, generator=generator).tolist()
    drawn = random_points(pseudo, count, stride=MASK_STRIDE, generator=generator).cpu().numpy()
    loose = []
    for prompt, points, mask in zip(prompts, drawn, pseudo, strict=True):
        if prompt.box_xyxy is None:
            loose.append(_some_points(prompt, shares, generator))
        elif by_points and mask.any():
            loose.append(
                ObjectPrompt(
                    point_coords=points.astype(np.float64),
                    point_labels=np.ones(count, np.int64),
                )
            )
        else:
            boxes = torch.from_numpy(prompt.box_xyxy)[None]
            box = noisy_boxes(boxes, image_hw=size_hw, scale=_LOOSE_BOX, generator=generator)[0]
            loose.append(dataclasses.replace(prompt, box_xyxy=box.numpy()))
    return tuple(loose)


def _some_points(
    prompt: ObjectPrompt, shares: Sequence[float], generator: torch.Generator
) -> ObjectPrompt:
    """Keep shares of the points on the object, at least one, and of those that are not."""
    kept: list[int] = []
    for label, share, least in ((1, shares[0], 1), (0, shares[1], 0)):
        places = np.flatnonzero(prompt.point_labels == label)
        order = torch.randperm(len(places), generator=generator).numpy()
        kept += places[order[: max(least, int(share * (len(places) + 1)))]].tolist()
    return dataclasses.replace(
        prompt, point_coords=prompt.point_coords[kept], point_labels=prompt.point_labels[kept]
    )


def _with_lora(sam: Sam, config: WesamConfig) -> Sam:
    """Copy a SAM, freeze the copy, and attach LoRA, the same one for the same seed."""
    adapted: Sam = copy.deepcopy(sam)
    adapted.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        attach_lora(adapted.image_encoder, rank=config.rank)
    return adapted
