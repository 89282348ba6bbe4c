import cv2
import numpy as np
import pytest

from sam_ext.colours import (
    ColourConfig,
    colour_log_odds,
    default_colours,
    guided_filter,
    outline_contrast,
    refine_by_colours,
)
from sam_ext.errors import ConfigError
from sam_ext.metrics import iou


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mirrored(array, radius):
    """Continue an array beyond its border, the border's own pixels twice."""
    pad = [(radius, radius)] * 2 + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, pad, mode="symmetric")


def literal_guided_filter(image, values, radius, epsilon):
    """Fit every window by itself, in double precision, as the paper's equations 19 to 21 say."""
    guide = mirrored(image / 255.0, radius)
    p = mirrored(values.astype(np.float64), radius)
    height, width = values.shape
    side = 2 * radius + 1
    a, b = np.zeros((height, width, 3)), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            colours = guide[y : y + side, x : x + side].reshape(-1, 3)
            wanted = p[y : y + side, x : x + side].ravel()
            covariance = np.cov(colours.T, bias=True)
            with_values = (colours * wanted[:, None]).mean(0) - colours.mean(0) * wanted.mean()
            a[y, x] = np.linalg.solve(covariance + epsilon * np.eye(3), with_values)
            b[y, x] = wanted.mean() - a[y, x] @ colours.mean(0)
    a, b = mirrored(a, radius), mirrored(b, radius)
    filtered = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            window = slice(y, y + side), slice(x, x + side)
            filtered[y, x] = a[window].mean((0, 1)) @ (image[y, x] / 255.0) + b[window].mean()
    return filtered


@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1])
def test_the_guided_filter_is_that_of_the_paper(radius, epsilon):
    image, values = noise(9, 14), np.random.default_rng(1).random((9, 14), np.float32)
    got = guided_filter(image, values, radius_px=radius, epsilon=epsilon)
    wanted = literal_guided_filter(image, values, radius, epsilon)
    np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_without_edges_the_guided_filter_takes_means_of_means():
    values = np.random.default_rng(0).random((20, 30), np.float32)
    flat = np.full((20, 30, 3), 90, np.uint8)
    got = guided_filter(flat, values, radius_px=2, epsilon=1e-3)
    twice = cv2.blur(
        cv2.blur(values, (5, 5), borderType=cv2.BORDER_REFLECT),
        (5, 5),
        borderType=cv2.BORDER_REFLECT,
    )
    np.testing.assert_allclose(got, twice, atol=1e-5)


def test_fitted_on_a_smaller_image_the_guided_filter_is_nearly_the_same():
    image = cv2.GaussianBlur(noise(60, 80), (0, 0), 4)
    values = cv2.GaussianBlur(np.random.default_rng(1).random((60, 80), np.float32), (0, 0), 3)
    settings = {"radius_px": 8, "epsilon": 1e-3}
    full, fast = (guided_filter(image, values, **settings, subsample=n) for n in (1, 2))
    assert 0 < np.abs(full - fast).max() < 0.2 * np.ptp(values)
    assert np.abs(full - fast).mean() < 0.02 * np.ptp(values)


def literal_log_odds(image, probabilities, bins):
    """Count, share and compare pixel by pixel and bin by bin, in double precision."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float64)
    places = np.stack([lab[..., 0] / 256, (lab[..., 1] - 64) / 128, (lab[..., 2] - 64) / 128], -1)
    index = np.clip(np.floor(places * bins), 0, bins - 1).astype(int)

    def shares(at):
        """How a pixel in bin `at` of an axis counts: (1, 2, 1) / 4 twice, nothing falls off."""
        row = np.zeros(bins)
        row[at] = 1
        for _ in range(2):
            spread = np.zeros(bins)
            for place, amount in enumerate(row):
                for step, part in ((-1, 0.25), (0, 0.5), (1, 0.25)):
                    spread[min(max(place + step, 0), bins - 1)] += part * amount
            row = spread
        return row

    inside, outside = np.zeros((bins,) * 3), np.zeros((bins,) * 3)
    for (l, a, b), p in zip(index.reshape(-1, 3), probabilities.ravel(), strict=True):  # noqa: E741
        share = np.einsum("i,j,k->ijk", shares(l), shares(a), shares(b))
        inside += share * max(2 * p - 1, 0)
        outside += share * max(1 - 2 * p, 0)
    common = 20 * (inside + outside) / (inside.sum() + outside.sum())
    in_mask = (inside + common) / (inside.sum() + 20)
    around = (outside + common) / (outside.sum() + 20)
    odds = np.log((in_mask + 1e-12) / (around + 1e-12)).clip(-3, 3)
    return odds[index[..., 0], index[..., 1], index[..., 2]]


def test_log_odds_compare_two_histograms():
    image = noise(12, 17)
    probabilities = np.random.default_rng(2).random((12, 17), np.float32)
    got = colour_log_odds(image, probabilities, bins=5)
    np.testing.assert_allclose(got, literal_log_odds(image, probabilities, 5), atol=1e-4)
    assert np.ptp(got) > 0.5


def test_a_colour_that_is_the_masks_own_speaks_for_it():
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :15], image[:, 15:] = (200, 40, 40), (40, 120, 60)
    probabilities = np.full((20, 30), 0.1, np.float32)
    probabilities[:, :10] = 0.9
    odds = colour_log_odds(image, probabilities, bins=24)
    assert (odds[:, :15] > 0.5).all()  # also where the model was wrong
    assert (odds[:, 15:] < -1.5).all()


@pytest.mark.parametrize("value", [0.2, 0.9])
def test_without_an_inside_or_an_outside_colours_say_nothing(value):
    odds = colour_log_odds(noise(6, 9), np.full((6, 9), value, np.float32), bins=8)
    assert not odds.any()


@pytest.fixture
def disc():
    """A red disc on grey ground, noisy, and a coarse model's logits of it, a bit beside it."""
    y, x = np.mgrid[:120, :160]
    wanted = np.hypot(x - 80, y - 62) < 34
    colours = np.where(wanted[..., None], (190, 60, 50), (110, 112, 108))
    image = colours + np.random.default_rng(0).normal(0, 14, (120, 160, 3))
    coarse = np.clip((36 - np.hypot(x - 74, y - 56)) / 6, -4, 4).astype(np.float32)
    logits = cv2.resize(cv2.resize(coarse, (20, 15), interpolation=cv2.INTER_AREA), (160, 120))
    return image.clip(0, 255).astype(np.uint8), logits, wanted


def test_colours_correct_a_mask_that_lies_beside_its_object(disc):
    image, logits, wanted = disc
    assert iou(logits > 0, wanted) < 0.75
    got = refine_by_colours(logits, image, ColourConfig())
    assert (got.dtype, got.min() >= 0, got.max() <= 1) == (np.float32, True, True)
    assert iou(got > 0.5, wanted) > 0.99
    by_outline = refine_by_colours(logits, image, ColourConfig(weight=0))
    assert 0.8 < iou(by_outline > 0.5, wanted) < 0.9


def pieces_and_holes(mask):
    pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
    return pieces, cv2.connectedComponents((~mask).astype(np.uint8), connectivity=4)[0] - 2


@pytest.mark.parametrize(
    ("least_share", "left"),
    [
        pytest.param(0.0, (4, 2), id="all"),
        pytest.param(0.003, (3, 1), id="specks"),
        pytest.param(0.05, (2, 0), id="and-small-parts"),
        pytest.param(0.5, (1, 0), id="the-largest-piece-alone"),
    ],
)
def test_small_pieces_and_holes_do_not_stay(least_share, left):
    """A piece of 3000 px with holes of 100 and 4 px, and others of 600, 120 and 4 px."""
    wanted = np.zeros((100, 120), np.bool_)
    wanted[10:70, 10:62] = True
    wanted[20:30, 20:30] = wanted[50:52, 50:52] = False
    wanted[74:94, 10:40] = wanted[74:86, 60:70] = wanted[95:97, 110:112] = True
    image = np.where(wanted[..., None], (200, 40, 40), (40, 120, 60)).astype(np.uint8)
    logits = np.where(wanted, 3, -3).astype(np.float32)
    config = ColourConfig(least_share=least_share)
    assert pieces_and_holes(refine_by_colours(logits, image, config) > 0.5) == left


def test_what_lies_at_the_border_is_no_hole():
    wanted = np.ones((60, 80), np.bool_)
    wanted[:2, 10:12] = False
    image = np.where(wanted[..., None], (200, 40, 40), (40, 120, 60)).astype(np.uint8)
    logits = np.where(wanted, 3, -3).astype(np.float32)
    got = refine_by_colours(logits, image, ColourConfig())
    assert not (got[:2, 10:12] > 0.5).any()


def test_far_from_the_mask_nothing_changes(disc):
    image, logits, _ = disc
    probabilities = 1 / (1 + np.exp(-logits))
    got = refine_by_colours(logits, image, ColourConfig())
    changed = ~np.isclose(got, probabilities, atol=1e-6)
    rows, columns = np.nonzero(probabilities > 0.05)
    assert changed.any()
    outside = changed.copy()
    top, left = max(rows.min() - 10, 0), max(columns.min() - 10, 0)
    outside[top : rows.max() + 11, left : columns.max() + 11] = False
    assert not outside.any()


def test_a_model_that_is_sure_is_believed(disc):
    image, logits, _ = disc
    got = refine_by_colours(100 * logits, image, ColourConfig(radius_px=1))
    assert iou(got > 0.5, logits > 0) > 0.95


def test_no_mask_stays_none():
    logits = np.full((6, 9), -20, np.float32)
    got = refine_by_colours(logits, noise(6, 9), ColourConfig())
    np.testing.assert_allclose(got, 1 / (1 + np.exp(8.0)), rtol=1e-5)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 5), (3, 2), (5, 60)])
def test_the_smallest_image_has_colours(size_hw):
    logits = np.random.default_rng(0).normal(0, 3, size_hw)
    got = refine_by_colours(logits, noise(*size_hw), ColourConfig())
    assert got.shape == size_hw
    assert np.isfinite(got).all()


def test_the_image_must_have_the_size_of_the_logits():
    with pytest.raises(
        ConfigError, match=r"image must be \[4, 6, 3\], as the logits are, got \[6, 4, 3\]"
    ):
        refine_by_colours(np.zeros((4, 6)), noise(6, 4), ColourConfig())


def literal_contrast(mask, image):
    """Compare the mean colours at each pixel of the outline, one after the other."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float64) * (100 / 255, 1, 1)
    height, width = mask.shape
    found = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        beside = mask[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if beside.all():
            continue
        near = slice(max(y - 3, 0), min(y + 4, height)), slice(max(x - 3, 0), min(x + 4, width))
        inside = mask[near]
        apart = lab[near][inside].mean(0) - lab[near][~inside].mean(0)
        found.append(np.log1p(np.linalg.norm(apart)))
    return np.mean(found)


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(slice(8, 15), slice(9, 20), id="inside"),
        pytest.param(slice(4, 5), slice(4, 5), id="one-pixel"),
    ],
)
def test_contrast_compares_both_sides_of_the_outline(rows, columns):
    image, mask = noise(24, 30), np.zeros((24, 30), np.bool_)
    mask[rows, columns] = True
    assert outline_contrast(mask, image) == pytest.approx(literal_contrast(mask, image), rel=1e-4)


def test_contrast_is_that_of_the_colours_where_the_outline_is():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    there, elsewhere = np.zeros((2, 20, 40), np.bool_)
    there[:, :20], elsewhere[:, :8] = True, True
    assert outline_contrast(there, image) == pytest.approx(np.log1p(100), rel=1e-3)
    assert outline_contrast(elsewhere, image) == 0


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("size_hw", [(5, 8), (1, 1)])
def test_without_an_outline_there_is_no_contrast(value, size_hw):
    assert outline_contrast(np.full(size_hw, value), noise(*size_hw)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -0.1}, "ColourConfig.weight must be at least 0, got -0.1"),
        ({"bins": 1}, "ColourConfig.bins must be at least 2 and radius_px at least 1, got 1 and 8"),
        (
            {"radius_px": 0},
            "ColourConfig.bins must be at least 2 and radius_px at least 1, got 24 and 0",
        ),
        ({"epsilon": 0.0}, "ColourConfig.epsilon must be above 0, got 0.0"),
        (
            {"least_share": 1.0},
            r"ColourConfig.least_share must be in 0..1, 1 excluded, got 1.0",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ColourConfig(**arguments)


def test_models_with_coarse_logits_are_corrected():
    assert default_colours(256) == ColourConfig()
    assert default_colours(1024) is None
