"""How good a map of one class is, without any prompt: saliency detection's measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import ConfigError

__all__ = ["MapScores", "map_scores"]


@dataclass(frozen=True, kw_only=True)
class MapScores:
    """One map against its mask, or the means over several; 0..1, the error is better when low."""

    s_measure: float
    """How alike the structure is, of the object and of four regions around its centre."""
    e_measure: float
    """How well the pixels are aligned, the mean over all thresholds."""
    weighted_f: float
    """F-measure with errors near the object forgiven."""
    mae: float
    """Mean absolute error over the pixels."""


def map_scores(probabilities: NDArray[Any], wanted: NDArray[np.bool_]) -> MapScores:
    """Measure a map against the mask that was wanted.

    Args:
        probabilities: [H, W], 0..1; a mask of booleans is one that is sure of itself.
        wanted: [H, W] bool, holding a pixel.

    Raises:
        ConfigError: If the shapes differ, a value is not in 0..1, `wanted` is empty, or the package
            pysodmetrics is not installed.

    Source:
        Fan et al., ICCV 2017 (S); Fan et al., IJCAI 2018 (E); Margolin et al., CVPR 2014 (weighted
        F); computed by https://github.com/lartpang/PySODMetrics.

    Differs from the source:
        A map is not stretched to 0..1 first: a model that is sure of nothing is measured so.
    """
    if probabilities.shape != wanted.shape or probabilities.ndim != 2:
        raise ConfigError(
            f"a map and its mask must be two [H, W] arrays of one shape, got {probabilities.shape} "
            f"and {wanted.shape}; resize the map to the image first"
        )
    given = probabilities.astype(np.float64)
    if not ((given >= 0) & (given <= 1)).all():
        raise ConfigError(
            f"a map must hold probabilities in 0..1, got {given.min():g} to {given.max():g}"
        )
    if not wanted.any():
        raise ConfigError("a map's mask must hold a pixel, got none; leave the image out")
    try:
        from py_sod_metrics import MAE, Emeasure, Smeasure, WeightedFmeasure
    except ImportError as error:
        raise ConfigError(
            "measures of maps must have pysodmetrics, got an environment without it; "
            "pip install 'sam-ml-backend[evaluate]'"
        ) from error
    s, e, f, mae = measures = Smeasure(), Emeasure(), WeightedFmeasure(), MAE()
    for measure in measures:
        measure.step(given, wanted, normalize=False)
    return MapScores(
        s_measure=float(s.get_results()["sm"]),
        e_measure=float(e.get_results()["em"]["curve"].mean()),
        weighted_f=float(f.get_results()["wfm"]),
        mae=float(mae.get_results()["mae"]),
    )
