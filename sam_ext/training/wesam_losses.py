"""The losses that WeSAM adds to SAM's: agreement with the anchor, and with the weak labels."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sam_ext.errors import ConfigError
from sam_ext.training.losses import focal_loss

__all__ = [
    "box_projection_loss",
    "color_affinity",
    "contrastive_loss",
    "pairwise_loss",
    "pooled_features",
    "self_training_focal_loss",
]


def self_training_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Weigh down the pixels that are right already, both classes alike.

    .. math:: 0.8 \cdot (1 - e^{-BCE})^2 \, BCE, 	ext{ averaged over the mask's pixels}

    Args:
        logits: [..., H, W].
        targets: [..., H, W] in 0..1.

    Returns:
        One value per mask, [...].

    Source:
        Zhang et al., arXiv:2312.03502; alpha is the official function's default.

    Differs from the source:
        The official call passes the number of masks in alpha's place.
    """
    return 0.8 * focal_loss(logits, targets, alpha=-1.0, gamma=2.0)


def pooled_features(image_embeddings: Tensor, masks: Tensor) -> Tensor:
    r"""Average the features that masks cover, each pixel's feature of length 1 before.

    .. math:: f_i = \frac{1}{\max(|m_i|, 1)} \sum_{p \in m_i} \frac{e_p}{\lVert e_p \rVert}

    Args:
        image_embeddings: [C, H, W].
        masks: [P, H, W] bool.

    Returns:
        [P, C]; zeros for an empty mask.

    Source:
        Zhang et al., arXiv:2312.03502, as its code pools after its correction of 2024-07-15.
    """
    unit = F.normalize(image_embeddings.flatten(1), dim=0)  # [C, H * W]
    weights = masks.flatten(1).to(unit.dtype)  # [P, H * W]
    pooled: Tensor = weights @ unit.t() / weights.sum(1, keepdim=True).clamp(min=1)
    return pooled


def contrastive_loss(teacher: Tensor, anchor: Tensor, *, temperature: float = 0.3) -> Tensor:
    r"""Make each instance look to the teacher as it does to the anchor, and unlike all others.

    .. math:: -\log \frac{\sum_i \exp(s_{ii} / \tau)}{\sum_{ij} \exp(s_{ij} / \tau)},
        \quad s_{ij} = \cos(f_i^{teacher}, f_j^{anchor})

    Args:
        teacher: [P, C], `pooled_features` of the adapted model.
        anchor: [P, C], those of the frozen one.
        temperature: Tau.

    Returns:
        One value; 0 for a single instance, which has nothing to differ from.

    Raises:
        ConfigError: If the two have different shapes.

    Source:
        Zhang et al., arXiv:2312.03502.
    """
    if teacher.shape != anchor.shape:
        raise ConfigError(
            f"both must have the same instances and channels, got {tuple(teacher.shape)} and "
            f"{tuple(anchor.shape)}; pool the same objects"
        )
    similarity = F.normalize(teacher, dim=1) @ F.normalize(anchor, dim=1).t()  # [P, P]
    logits = similarity / temperature
    return torch.logsumexp(logits.flatten(), 0) - torch.logsumexp(logits.diagonal(), 0)


def box_projection_loss(
    logits: Tensor, boxes: Tensor, *, smooth: float = 1.0, slack: int = 1
) -> Tensor:
    r"""Want a mask to reach all four sides of a box and nowhere beyond.

    .. math:: D(\max_y p, \max_y b) + D(\max_x p, \max_x b),
        \quad D(u, v) = 1 - \frac{2 \sum u v + s}{\sum u^2 + \sum v^2 + s}

    Args:
        logits: [P, H, W].
        boxes: [P, H, W] bool, the boxes as masks.
        smooth: s.
        slack: Rows and columns on either side of a box's sides that do not count. What a round
            object covers of its outermost row is mostly less than half, so that a mask that reaches
            it is too large all around.

    Returns:
        One value per mask, [P].

    Source:
        Tian et al., arXiv:2012.02310, section 3.1; the slack is ours.
    """
    p, b = torch.sigmoid(logits), boxes.to(logits.dtype)
    loss = torch.zeros(len(logits), device=logits.device, dtype=logits.dtype)
    for axis in (1, 2):
        u, v = p.amax(axis), b.amax(axis)
        width = 2 * slack + 1
        inner = -F.max_pool1d(-v, width, stride=1, padding=slack)
        outer = F.max_pool1d(v, width, stride=1, padding=slack)
        counted = inner + 1 - outer
        u, v = u * counted, v * counted
        overlap = 2 * (u * v).sum(1) + smooth
        loss = loss + 1 - overlap / (u.square().sum(1) + v.square().sum(1) + smooth)
    return loss


_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # the other four are pairs of these
_SIMILAR = 0.3


def color_affinity(image: NDArray[np.uint8], *, stride: int, distance: int = 2) -> Tensor:
    r"""Say which pixels of a mask look so alike that they belong together.

    .. math:: \exp(-\lVert c_i - c_j \rVert / 2) \ge 0.3, \quad c \text{ in CIELAB}

    Args:
        image: [H, W, 3] RGB in 0..255.
        stride: Pixels of the image per pixel of a mask, along each axis.
        distance: Of two pixels that are compared, in pixels of a mask, along each axis or both.

    Returns:
        [4, h, w] bool: each mask pixel with the one to its right, below, below to the right and
        below to the left; False where that lies outside.

    Source:
        Tian et al., arXiv:2012.02310, section 3.2.
    """
    height, width = image.shape[:2]
    size = (-(-width // stride), -(-height // stride))
    small = cv2.resize(image.astype(np.float32) / 255, size, interpolation=cv2.INTER_AREA)
    lab = torch.from_numpy(cv2.cvtColor(small, cv2.COLOR_RGB2LAB)).permute(2, 0, 1)
    similar = torch.zeros(len(_NEIGHBOURS), *lab.shape[1:], dtype=torch.bool)
    for number, step in enumerate(_NEIGHBOURS):
        here, there = _pairs(lab, step, distance)
        alike = torch.exp(-(here - there).norm(dim=0) / 2) >= _SIMILAR
        _pairs(similar[number], step, distance)[0].copy_(alike)
    return similar


def pairwise_loss(logits: Tensor, affinity: Tensor, region: Tensor, *, distance: int = 2) -> Tensor:
    r"""Want pixels that look alike to be both in a mask, or both outside.

    .. math:: -\frac{1}{N} \sum_{(i, j)} \log(p_i p_j + (1 - p_i)(1 - p_j))

    over the N pairs that look alike and of which one lies in the object's region.

    Args:
        logits: [P, H, W].
        affinity: [4, H, W], of `color_affinity`.
        region: [P, H, W] bool, where the object is.
        distance: The one of `affinity`.

    Returns:
        One value per mask, [P]; 0 where no pair counts.

    Source:
        Tian et al., arXiv:2012.02310, section 3.2.

    Differs from the source:
        Averaged over each object's pairs, not over those of all objects.
    """
    inside, outside = F.logsigmoid(logits), F.logsigmoid(-logits)
    total, count = logits.new_zeros(len(logits)), logits.new_zeros(len(logits))
    for number, step in enumerate(_NEIGHBOURS):
        first, second = _pairs(inside, step, distance)
        third, fourth = _pairs(outside, step, distance)
        in_region = torch.logical_or(*_pairs(region, step, distance))
        counted = in_region & _pairs(affinity[number], step, distance)[0]
        loss = -torch.logaddexp(first + second, third + fourth)
        total = total + (loss * counted).flatten(1).sum(1)
        count = count + counted.flatten(1).sum(1)
    return total / count.clamp(min=1)


def _pairs(maps: Tensor, step: tuple[int, int], distance: int) -> tuple[Tensor, Tensor]:
    """Cut two views out of maps [..., H, W], of each pixel and of the one a step (y, x) away."""
    height, width = maps.shape[-2:]
    down, right = (one * distance for one in step)
    here = maps[..., : height - down, max(-right, 0) : width - max(right, 0)]
    there = maps[..., down:, max(right, 0) : width - max(-right, 0)]
    return here, there
