"""What an image's own colours say about a mask whose outline SAM's coarse logits leave open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from sam_ext.errors import ConfigError
from sam_ext.metrics import tight_box

__all__ = [
    "ColourConfig",
    "colour_log_odds",
    "default_colours",
    "guided_filter",
    "outline_contrast",
    "refine_by_colours",
]

_FAINT = 0.05  # what is less likely of the mask than this does not say where to look
_MARGIN_PX = 10
_NEAR_PX = 3
_LARGEST_LOGIT = 8.0
_LARGEST_LOG_ODDS = 3.0
_SUBSAMPLE = 2
_PRIOR_PX = 20.0  # how many pixels of the common distribution both models begin with


@dataclass(frozen=True, kw_only=True)
class ColourConfig:
    """How far colours count, and how near the outline follows them.

    Lengths are in pixels of the encoder's input, four of which are one of SAM's logits.
    """

    weight: float = 0.75
    """What the log-odds of a pixel's colour are multiplied by before they are added to its logit;
    0 leaves the outline alone to be corrected."""
    bins: int = 24
    """Of the histograms, along each of the three axes of CIELAB."""
    radius_px: int = 8
    """Half the side of the guided filter's windows."""
    epsilon: float = 1e-4
    """The guided filter's: what varies less than this, colours being 0..1, is no edge."""
    least_share: float = 0.01
    """Pieces and holes with less than this share of the largest piece's area are left out."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"ColourConfig.weight must be at least 0, got {self.weight}")
        if self.bins < 2 or self.radius_px < 1:
            raise ConfigError(
                "ColourConfig.bins must be at least 2 and radius_px at least 1, "
                f"got {self.bins} and {self.radius_px}"
            )
        if self.epsilon <= 0:
            raise ConfigError(f"ColourConfig.epsilon must be above 0, got {self.epsilon}")
        if not 0 <= self.least_share < 1:
            raise ConfigError(
                f"ColourConfig.least_share must be in 0..1, 1 excluded, got {self.least_share}"
            )


def default_colours(train_side: int) -> ColourConfig | None:
    """Choose whether masks of a model trained on squares of `train_side` pixels are corrected.

    Measured with `tiny` as served on train splits (feralcat's `val`), mean IoU of tight boxes, of
    boxes with noise 0.4, and of the point farthest from the outline, before and after:

    ===============  =============  ===============  =============
    set              tight box      box, noise 0.4   centre
    ===============  =============  ===============  =============
    coco200          0.638  0.668   0.470  0.512     0.394  0.427
    bsds500          0.699  0.726   0.510  0.542     0.365  0.388
    feralcat         0.799  0.821   0.632  0.668     0.519  0.523
    dsb2018_nuclei   0.905  0.924   0.793  0.838     0.723  0.741
    cwfid            0.622  0.723   0.479  0.579     0.438  0.497
    wbc              0.759  0.786   0.533  0.600     0.577  0.600
    mt_defect        0.671  0.695   0.551  0.584     0.390  0.387
    ===============  =============  ===============  =============

    Of a hundred tight boxes two lose more than 0.05 and twenty-five gain more. The outline alone
    (`weight=0`) gains a third of it. With all specks left in, the gain is nearly the same, in up to
    three times as many pieces as the model's own masks have. More weight gains more with sloppy
    boxes, and loses parts of things with single points.

    Models of 1024 px have logits four times as fine, and are not measured: they are left alone.
    """
    return None if train_side >= 1024 else ColourConfig()


def refine_by_colours(
    logits: NDArray[np.floating[Any]], image: NDArray[np.uint8], config: ColourConfig
) -> NDArray[np.float32]:
    """Correct a mask by the colours of the image.

    The mask and its surroundings each have a histogram of colours; how much likelier a pixel's
    colour is in the mask's is added to its logit, and the guided filter moves the outline to edges
    of the image. Colours are alike elsewhere, too: specks of them do not stay.

    Args:
        logits: [H, W], above 0 in the mask.
        image: [H, W, 3] RGB in 0..255.
        config: How.

    Returns:
        [H, W], how likely each pixel is of the mask, 0..1; above 0.5 in the mask.

    Raises:
        ConfigError: If the sizes differ.

    Source:
        Boykov and Jolly, ICCV 2001, for histograms of what is marked as terms of each pixel; He et
        al., *Guided image filtering*, TPAMI 2013, whose application 3.4 the second step is. Ours
        are the soft marks, which the model's probabilities are in place of a person's strokes.
    """
    if image.shape != (*logits.shape, 3):
        raise ConfigError(
            f"image must be {[*logits.shape, 3]}, as the logits are, got {list(image.shape)}"
        )
    clipped = np.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT).astype(np.float32)
    probabilities = _sigmoid(clipped)
    likely = probabilities > _FAINT
    if not likely.any():
        return probabilities
    around = _around(likely, _MARGIN_PX)
    part = np.ascontiguousarray(image[around])
    odds = colour_log_odds(part, probabilities[around], bins=config.bins)
    refined = guided_filter(
        part,
        _sigmoid(clipped[around] + config.weight * odds),
        radius_px=config.radius_px,
        epsilon=config.epsilon,
        subsample=_SUBSAMPLE,
    )
    probabilities[around] = _without_specks(np.clip(refined, 0, 1), config.least_share)
    return probabilities


def colour_log_odds(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], *, bins: int
) -> NDArray[np.float32]:
    """Say how much likelier each pixel's colour is in a mask than around it.

    A pixel counts for the mask's histogram by how far it is likelier than not of it, and likewise
    for the other. Both are smoothed, and begin with a few pixels of their sum, so that a colour
    that is rare in both says little.

    Args:
        image: [H, W, 3] RGB in 0..255.
        probabilities: [H, W], how likely each pixel is of the mask.
        bins: Along each of the three axes of CIELAB.

    Returns:
        [H, W], natural logarithms of ratios, at most 3 in size; 0 where one side has no pixel.
    """
    lightness, a, b = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2LAB))
    # a and b of photographs hardly leave the middle half of their range.
    levels = np.arange(256)
    whole = levels * bins // 256
    middle = np.clip((2 * levels - 128) * bins // 256, 0, bins - 1)
    flat = (whole[lightness] * bins * bins + (middle * bins)[a] + middle[b]).ravel()
    inside, outside = (
        _smoothed_histogram(flat, np.clip(2 * one - 1, 0, None), bins)
        for one in (probabilities, 1 - probabilities)
    )
    total_inside, total_outside = inside.sum(), outside.sum()
    if total_inside < 1 or total_outside < 1:
        return np.zeros(probabilities.shape, np.float32)
    common = _PRIOR_PX * (inside + outside) / (total_inside + total_outside)
    ratios = (inside + common + 1e-9) / (outside + common + 1e-9)
    ratios *= (total_outside + _PRIOR_PX) / (total_inside + _PRIOR_PX)
    odds = np.clip(np.log(ratios), -_LARGEST_LOG_ODDS, _LARGEST_LOG_ODDS).astype(np.float32)
    found: NDArray[np.float32] = odds[flat].reshape(probabilities.shape)
    return found


def guided_filter(
    image: NDArray[np.uint8],
    values: NDArray[np.float32],
    *,
    radius_px: int,
    epsilon: float,
    subsample: int = 1,
) -> NDArray[np.float32]:
    r"""Filter values so that their edges are the image's.

    In every window the values are fitted as a linear function of the colour, and each pixel gets
    the mean of what the windows that hold it say:

    .. math:: q_i = \bar a_i^T I_i + \bar b_i, \quad
              a_k = (\Sigma_k + \epsilon U)^{-1} \mathrm{cov}_k(I, p), \quad
              b_k = \bar p_k - a_k^T \mu_k

    Args:
        image: [H, W, 3] in 0..255; taken as 0..1.
        values: [H, W].
        radius_px: Windows are squares of twice this and one pixels; the image goes on mirrored
            beyond its border.
        epsilon: Keeps the fit flat where colours vary less than this.
        subsample: The fit is made on an image so many times smaller, and applied to this one.

    Returns:
        [H, W].

    Source:
        He et al., *Guided image filtering*, TPAMI 2013, equations 19 to 21; He and Sun,
        arXiv:1505.00996, for the smaller image.
    """
    height, width = values.shape
    small_wh = (max(width // subsample, 1), max(height // subsample, 1))
    side = 2 * max(radius_px // subsample, 1) + 1
    mean = partial(cv2.blur, ksize=(side, side), borderType=cv2.BORDER_REFLECT)
    guide = image.astype(np.float32) / 255
    small = cv2.resize(guide, small_wh, interpolation=cv2.INTER_AREA)
    p = cv2.resize(values, small_wh, interpolation=cv2.INTER_AREA)
    red, green, blue = cv2.split(small)
    mean_guide, mean_p = mean(small), mean(p)
    mean_r, mean_g, mean_b = cv2.split(mean_guide)
    v_r, v_g, v_b = cv2.split(mean(small * p[..., None]) - mean_guide * mean_p[..., None])
    s_rr = mean(red * red) - mean_r * mean_r + epsilon
    s_rg = mean(red * green) - mean_r * mean_g
    s_rb = mean(red * blue) - mean_r * mean_b
    s_gg = mean(green * green) - mean_g * mean_g + epsilon
    s_gb = mean(green * blue) - mean_g * mean_b
    s_bb = mean(blue * blue) - mean_b * mean_b + epsilon
    # The symmetric matrix's inverse, by its cofactors.
    c_rr, c_rg, c_rb = s_gg * s_bb - s_gb**2, s_gb * s_rb - s_rg * s_bb, s_rg * s_gb - s_gg * s_rb
    c_gg, c_gb, c_bb = s_rr * s_bb - s_rb**2, s_rg * s_rb - s_rr * s_gb, s_rr * s_gg - s_rg**2
    determinant = s_rr * c_rr + s_rg * c_rg + s_rb * c_rb
    a_r = (c_rr * v_r + c_rg * v_g + c_rb * v_b) / determinant
    a_g = (c_rg * v_r + c_gg * v_g + c_gb * v_b) / determinant
    a_b = (c_rb * v_r + c_gb * v_g + c_bb * v_b) / determinant
    b = mean_p - a_r * mean_r - a_g * mean_g - a_b * mean_b
    # Four channels are blurred and enlarged together.
    fit = cv2.resize(mean(cv2.merge([a_r, a_g, a_b, b])), (width, height))
    filtered: NDArray[np.float32] = (fit[..., :3] * guide).sum(axis=-1) + fit[..., 3]
    return filtered


def outline_contrast(mask: NDArray[np.bool_], image: NDArray[np.uint8]) -> float:
    """Say how different an image is on both sides of a mask's outline.

    At each of the mask's pixels beside the outline the mean colours of what is in it and of what is
    not, within three pixels, are compared.

    Args:
        mask: [H, W].
        image: [H, W, 3] RGB in 0..255.

    Returns:
        The mean of log(1 + d), d being the distance in CIELAB, in which 2 is hardly seen and black
        from white is 100; 0 for a mask without an outline.
    """
    if not mask.any():
        return 0.0
    around = _around(mask, _NEAR_PX)
    inside = mask[around].astype(np.float32)
    # What lies beyond the image's border is on no side.
    eroded = cv2.erode(inside, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)
    outline = inside > eroded
    if not outline.any():
        return 0.0
    part = np.ascontiguousarray(image[around])
    lab = cv2.cvtColor(part, cv2.COLOR_RGB2LAB).astype(np.float32)
    side = 2 * _NEAR_PX + 1
    sums = partial(cv2.boxFilter, ddepth=-1, ksize=(side, side), normalize=False)
    means = []
    for share in (inside, 1 - inside):
        total, count = sums(lab * share[..., None]), sums(share)
        means.append(total[outline] / count[outline][:, None])
    apart = (means[0] - means[1]) * (100 / 255, 1, 1)  # OpenCV stretches lightness to 0..255
    distances = np.linalg.norm(apart, axis=1)
    return float(np.log1p(distances).mean())


def _around(mask: NDArray[np.bool_], margin_px: int) -> tuple[slice, slice]:
    """Choose the rows and columns of a mask that is not empty, and so many more on each side."""
    left, top, right, bottom = tight_box(mask).astype(int).tolist()
    return (
        slice(max(top - margin_px, 0), bottom + margin_px),
        slice(max(left - margin_px, 0), right + margin_px),
    )


def _without_specks(probabilities: NDArray[np.float32], least_share: float) -> NDArray[np.float32]:
    """Turn the likelihood of a mask's small pieces, and of its small holes, into its opposite."""
    mask = probabilities > 0.5
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas):
        return probabilities
    least = least_share * int(areas.max())
    wrong = np.append(False, areas < least)[pieces]
    _, holes, stats, _ = cv2.connectedComponentsWithStats(
        (~mask | wrong).astype(np.uint8), connectivity=4
    )
    height, width = mask.shape
    left, top, wide, high, area = stats[1:, :5].T
    is_inside = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height)
    wrong ^= np.append(False, is_inside & (area < least))[holes]
    return np.where(wrong, 1 - probabilities, probabilities)


def _smoothed_histogram(
    index: NDArray[np.integer[Any]], weights: NDArray[np.float32], bins: int
) -> NDArray[np.float64]:
    """Count weights by bin [bins**3], each bin shared with its neighbours (1, 4, 6, 4, 1)."""
    counts = np.bincount(index, weights=weights.ravel(), minlength=bins**3)
    smoothed: NDArray[np.float64] = counts.astype(np.float64).reshape(bins, bins, bins)
    for _ in range(6):  # twice along each axis, which becomes the last one
        padded = np.concatenate([smoothed[:1], smoothed, smoothed[-1:]])
        along = 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
        smoothed = along.transpose(1, 2, 0)
    return smoothed.ravel()


def _sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    probabilities: NDArray[np.float32] = np.asarray(1 / (1 + np.exp(-logits)), np.float32)
    return probabilities
