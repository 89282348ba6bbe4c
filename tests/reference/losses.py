"""Focal (arXiv:1708.02002, eq. 5), dice, and SAM-Adapter's losses, written out by pixel."""

import math


def focal(logits, targets, alpha, gamma):
    total = 0.0
    for row_logits, row_targets in zip(logits, targets, strict=True):
        for logit, target in zip(row_logits, row_targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            p_t = p if target == 1 else 1 - p
            alpha_t = alpha if target == 1 else 1 - alpha
            total += -alpha_t * (1 - p_t) ** gamma * math.log(p_t)
    return total / (len(logits) * len(logits[0]))


def dice(logits, targets, smooth):
    overlap = total = 0.0
    for row_logits, row_targets in zip(logits, targets, strict=True):
        for logit, target in zip(row_logits, row_targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            overlap += p * target
            total += p + target
    return 1 - (2 * overlap + smooth) / (total + smooth)


def squared_dice(logits, targets, smooth):
    """V-Net's form (arXiv:1606.04797)."""
    overlap = total = 0.0
    for row_logits, row_targets in zip(logits, targets, strict=True):
        for logit, target in zip(row_logits, row_targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            overlap += p * target
            total += p * p + target * target
    return 1 - (2 * overlap + smooth) / (total + smooth)


def cross_entropy(logits, targets, balanced):
    pixels = [
        (logit, target)
        for row_logits, row_targets in zip(logits, targets, strict=True)
        for logit, target in zip(row_logits, row_targets, strict=True)
    ]
    foreground = sum(target for _, target in pixels) / len(pixels)
    total = 0.0
    for logit, target in pixels:
        p = 1 / (1 + math.exp(-logit))
        weight = 1.0
        if balanced:
            weight = 1 - foreground if target == 1 else foreground
        total -= weight * math.log(p if target == 1 else 1 - p)
    return total / len(pixels)


def soft_iou(logits, targets):
    overlap = total = 0.0
    for row_logits, row_targets in zip(logits, targets, strict=True):
        for logit, target in zip(row_logits, row_targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            overlap += p * target
            total += p + target - p * target
    return 1 - overlap / total
