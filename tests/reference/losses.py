"""Focal loss (arXiv:1708.02002, eq. 5) and dice loss, written out pixel by pixel."""

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
