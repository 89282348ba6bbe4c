"""SAM's losses, one value per mask so that the caller chooses among masks and weighs them.

Targets may be soft: the share of a low-resolution pixel that the object covers. At 0 and 1 every
formula is the published one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_ext.errors import ConfigError

__all__ = [
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "mask_iou",
    "mean_where",
    "soft_iou_loss",
    "squared_dice_loss",
]


def focal_loss(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    r"""Weigh down the pixels that are right already.

    .. math:: -\alpha_t (1 - p_t)^\gamma \log p_t, \text{ averaged over the mask's pixels}

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.
        alpha: Weight of the foreground; the background has 1 - alpha. Negative: no such weights.
        gamma: How much confident pixels are weighed down.

    Returns:
        One value per mask, [...].

    Raises:
        ConfigError: If the two do not share H and W.

    Source:
        Lin et al., arXiv:1708.02002, equation 5; SAM's weight of 20 is the caller's.

    Differs from the source:
        For a soft target t, ``1 - p_t`` is ``|p - t|`` and the log is the cross-entropy with t.
    """
    _check(logits, targets)
    targets = targets.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    loss = (torch.sigmoid(logits) - targets).abs() ** gamma * cross_entropy
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss.mean(dim=(-2, -1))


def cross_entropy(logits: Tensor, targets: Tensor, *, balanced: bool = False) -> Tensor:
    r"""Measure each pixel by itself.

    .. math:: -w_+ t \log p - w_- (1 - t) \log(1 - p), \text{ averaged over the mask's pixels}

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.
        balanced: Weigh foreground and background by the other one's share of the pixels, for
            masks that are most or little of their image; otherwise both weights are 1.

    Returns:
        One value per mask, [...].

    Raises:
        ConfigError: If the two do not share H and W.

    Source:
        Chen et al., arXiv:2304.09148, and the official code: the balanced one for shadows.
    """
    _check(logits, targets)
    targets = targets.expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if balanced:
        foreground = targets.mean(dim=(-2, -1), keepdim=True)
        missed, invented = targets * F.softplus(-logits), (1 - targets) * F.softplus(logits)
        loss = (1 - foreground) * missed + foreground * invented
    return loss.mean(dim=(-2, -1))


def soft_iou_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Measure the overlap of each mask by itself, as IoU does.

    .. math:: 1 - \frac{\sum p t}{\sum p + \sum t - \sum p t}

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.

    Returns:
        One value per mask, [...], in 0..1.

    Raises:
        ConfigError: If the two do not share H and W.

    Source:
        Chen et al., arXiv:2304.09148, and the official code.
    """
    _check(logits, targets)
    p = torch.sigmoid(logits)
    overlap = (p * targets).sum(dim=(-2, -1))
    total = p.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - overlap / (total - overlap).clamp(min=1e-6)  # 0 where both are empty


def dice_loss(logits: Tensor, targets: Tensor, *, smooth: float = 1.0) -> Tensor:
    r"""Measure the overlap of each mask by itself, whatever its size.

    .. math:: 1 - \frac{2 \sum p t + s}{\sum p + \sum t + s}

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.
        smooth: s, in pixels.

    Returns:
        One value per mask, [...], in [0, 1).

    Raises:
        ConfigError: If the two do not share H and W.

    Source:
        Milletari et al., arXiv:1606.04797, in the form of Kirillov et al., arXiv:2304.02643.
    """
    _check(logits, targets)
    p = torch.sigmoid(logits)
    overlap = (p * targets).sum(dim=(-2, -1))
    total = p.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def squared_dice_loss(logits: Tensor, targets: Tensor, *, smooth: float = 1.0) -> Tensor:
    r"""Measure the overlap of each mask by itself so that a soft target is what is best.

    .. math:: 1 - \frac{2 \sum p t + s}{\sum p^2 + \sum t^2 + s}

    It is 0 exactly where p is t. `dice_loss` wants pixels of 0.6 to be 1, and those of 0.4 to be 0.

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.
        smooth: s, in pixels.

    Returns:
        One value per mask, [...], in [0, 1).

    Raises:
        ConfigError: If the two do not share H and W.

    Source:
        Milletari et al., arXiv:1606.04797, section 3; the smoothing is ours.
    """
    _check(logits, targets)
    p = torch.sigmoid(logits)
    overlap = (p * targets).sum(dim=(-2, -1))
    total = p.square().sum(dim=(-2, -1)) + targets.square().sum(dim=(-2, -1))
    return 1 - (2 * overlap + smooth) / (total + smooth)


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """Intersection over union of the masks ``logits > 0`` and ``targets > 0.5``.

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1, broadcast against the logits.

    Returns:
        One value per mask, [...]; 0 where both are empty. No gradient.

    Raises:
        ConfigError: If the two do not share H and W.
    """
    _check(logits, targets)
    predicted, wanted = logits.detach() > 0, targets > 0.5
    overlap = (predicted & wanted).sum(dim=(-2, -1))
    union = (predicted | wanted).sum(dim=(-2, -1))
    return overlap / union.clamp(min=1)


def mean_where(chosen: Tensor, values: Tensor) -> Tensor:
    """Average some of the values, both [P]; 0 for none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _check(logits: Tensor, targets: Tensor) -> None:
    if logits.shape[-2:] != targets.shape[-2:]:
        raise ConfigError(
            f"targets must have the logits' height and width {tuple(logits.shape[-2:])}, "
            f"got {tuple(targets.shape[-2:])}; resize the targets first"
        )
