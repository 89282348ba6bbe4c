"""Answers without a prompt: all objects of a project's one class, for models that learnt it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from sam_ext.predictor import Embedding, Predictor

__all__ = ["Instance", "PromptFreeAnswer", "answer_prompt_free"]

_LEAST_AREA_PX = 16
_MOST_INSTANCES = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class Instance:
    """One connected piece of what was found."""

    pieces: NDArray[np.int32]
    """[H, W], which piece each pixel is of; shared by all pieces, a mask of each of which would
    take much memory in a large image."""
    number: int
    """This one's."""
    area_px: int
    score: float
    """The mean probability of its pixels, 0.5..1."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """[H, W]."""
        mask: NDArray[np.bool_] = self.pieces == self.number
        return mask


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptFreeAnswer:
    """What a model finds in an image by itself, in the image's own pixels."""

    probabilities: NDArray[np.float32]
    """[H, W], how likely each pixel is one of an object, 0..1."""
    mask: NDArray[np.bool_]
    """[H, W]: all objects together, small pieces included."""
    score: float
    """The mean probability of the mask's pixels, 0.5..1; 0 for an empty mask."""
    iou_prediction: float
    """How well the model expects the mask to overlap all objects together."""
    instances: tuple[Instance, ...]
    """The mask's connected pieces of at least 16 pixels, the largest first, at most 100."""


def answer_prompt_free(predictor: Predictor, embedding: Embedding) -> PromptFreeAnswer:
    """Find all objects of an image without a prompt.

    Args:
        predictor: Of a model that learnt it: one of `finetune`, where
            `FinetuneConfig.prompt_free_chance` is above 0. Others answer with nothing of use.
        embedding: What the predictor gave for the image.

    Returns:
        The same answer every time.

    Source:
        Chen et al., arXiv:2304.09148: no tokens, the no-mask embedding, the single mask.
    """
    [(low_res, iou_predictions, _)] = predictor.decode_low_res(embedding, [None])
    logits = predictor.full_logits(embedding, low_res[0])
    probabilities = 1 / (1 + np.exp(-logits.clip(-80, 80)))  # clipped: e^80 is finite in float32
    mask = logits > predictor.mask_threshold
    count, pieces, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    areas = stats[:, cv2.CC_STAT_AREA]
    sums = np.bincount(pieces.ravel(), weights=probabilities.ravel(), minlength=count)
    largest_first = 1 + np.argsort(-areas[1:], kind="stable")  # 0 is the background
    kept = [n for n in largest_first.tolist() if areas[n] >= _LEAST_AREA_PX][:_MOST_INSTANCES]
    return PromptFreeAnswer(
        probabilities=probabilities,
        mask=mask,
        score=float(probabilities[mask].mean()) if mask.any() else 0.0,
        iou_prediction=float(iou_predictions[0]),
        instances=tuple(
            Instance(
                pieces=pieces, number=n, area_px=int(areas[n]), score=float(sums[n] / areas[n])
            )
            for n in kept
        ),
    )
