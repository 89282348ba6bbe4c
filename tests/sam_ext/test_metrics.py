import numpy as np
import pytest

from sam_ext.errors import ConfigError
from sam_ext.metrics import (
    boundary_iou,
    calibration_error,
    ellipse_in_box,
    iou,
    rectangle_mask,
    stability,
)


def mask(rows):
    return np.array([[c == "#" for c in row] for row in rows])


@pytest.mark.parametrize(
    ("predicted", "wanted", "expected"),
    [
        pytest.param(["##.", "..."], [".##", "..."], 1 / 3, id="one of three"),
        pytest.param(["##.", "..."], ["##.", "..."], 1.0, id="equal"),
        pytest.param(["#..", "..."], ["..#", "..."], 0.0, id="apart"),
        pytest.param(["...", "..."], ["...", "..."], 1.0, id="both empty"),
    ],
)
def test_iou(predicted, wanted, expected):
    assert iou(mask(predicted), mask(wanted)) == pytest.approx(expected)


def framed(x0, y0, x1, y1, thickness):
    frame = np.zeros((60, 80), bool)
    frame[y0:y1, x0:x1] = True
    frame[y0 + thickness : y1 - thickness, x0 + thickness : x1 - thickness] = False
    return frame


def test_boundary_iou_looks_only_near_the_outlines():
    """60 x 80 px: 2 % of the diagonal are 2 px, so an outline is a frame 2 px wide."""
    wanted = np.zeros((60, 80), bool)
    wanted[10:50, 10:70] = True
    outline = framed(10, 10, 70, 50, 2)
    assert boundary_iou(wanted, wanted) == 1.0
    moved = iou(outline, np.roll(outline, 2, axis=1))
    assert boundary_iou(np.roll(wanted, 2, axis=1), wanted) == pytest.approx(moved)
    hollow = wanted.copy()
    hollow[25:35, 25:55] = False
    around_the_hole = framed(23, 23, 57, 37, 2)
    expected = outline.sum() / (outline.sum() + around_the_hole.sum())
    assert boundary_iou(hollow, wanted) == pytest.approx(expected)


def test_the_images_border_counts_as_outline():
    everything = np.ones((60, 80), bool)
    without_corner = everything.copy()
    without_corner[:5, :5] = False
    assert boundary_iou(without_corner, everything) < 1


def test_a_rectangle_holds_the_pixels_whose_centres_lie_in_the_box():
    filled = rectangle_mask(np.array([1.0, 0.4, 3.0, 1.6]), (3, 4))
    assert filled.tolist() == mask([".##.", ".##.", "...."]).tolist()


def test_an_ellipse_covers_pi_quarters_of_its_box():
    filled = ellipse_in_box(np.array([10, 20, 110, 60]), (80, 120))
    assert filled.sum() / (100 * 40) == pytest.approx(np.pi / 4, abs=0.01)
    ys, xs = np.nonzero(filled)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (10, 109, 20, 59)


@pytest.mark.parametrize("measure", [iou, boundary_iou])
def test_masks_of_different_sizes_are_refused(measure):
    with pytest.raises(ConfigError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        measure(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


def test_stability_is_the_mean_iou_with_the_union_of_all_masks():
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    left[:, :3] = True
    right[:, 2:] = True
    assert stability([left, right]) == pytest.approx((12 / 16 + 8 / 16) / 2)
    assert stability([left, left, left]) == 1
    assert stability([right]) == 1


@pytest.mark.parametrize(
    ("predicted", "reached", "expected"),
    [
        pytest.param([0.75, 0.75], [0.5, 1.0], 0.0, id="right on average"),
        pytest.param([0.71, 0.79], [0.5, 0.7], 0.15, id="one bin"),
        pytest.param([0.15, 0.15, 0.85, 0.85], [0.2, 0.0, 0.6, 0.9], 0.075, id="two bins"),
        pytest.param([0.95, 1.02], [0.9, 1.0], 0.035, id="beyond 1 in the last bin"),
        pytest.param([-0.01, 0.09], [0.0, 0.1], 0.01, id="below 0 in the first bin"),
    ],
)
def test_calibration_error_compares_means_of_like_predictions(predicted, reached, expected):
    assert calibration_error(predicted, reached) == pytest.approx(expected)


@pytest.mark.parametrize(("predicted", "reached"), [([], []), ([0.5], [0.5, 0.6])])
def test_calibration_error_wants_as_many_of_both(predicted, reached):
    with pytest.raises(ConfigError, match=f"got {len(predicted)} and {len(reached)}"):
        calibration_error(predicted, reached)
