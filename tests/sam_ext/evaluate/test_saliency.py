import sys

import numpy as np
import pytest

from sam_ext.errors import ConfigError
from sam_ext.evaluate.saliency import map_scores

WANTED = np.zeros((40, 60), bool)
WANTED[10:30, 5:45] = True


def test_the_mask_itself_is_perfect():
    scores = map_scores(WANTED, WANTED)
    assert scores.s_measure == pytest.approx(1)
    assert scores.weighted_f == pytest.approx(1)
    assert scores.mae == 0
    # At the lowest of 256 thresholds everything is the object, which aligns with nothing: 1/4.
    pixels = WANTED.size
    assert scores.e_measure == pytest.approx((255 + 0.25) / 256 * pixels / (pixels - 1))


def test_the_opposite_is_as_bad_as_can_be():
    scores = map_scores(~WANTED, WANTED)
    assert scores.s_measure == pytest.approx(0, abs=1e-6)
    assert scores.weighted_f == pytest.approx(0, abs=1e-6)
    assert scores.e_measure < 0.01
    assert scores.mae == 1


def test_doubt_costs_as_much_as_it_is():
    """Not stretched to 0..1: an even map of 0.25 stays that."""
    doubt = np.where(WANTED, 0.75, 0.25)
    scores = map_scores(doubt, WANTED)
    assert scores.mae == pytest.approx(0.25)
    # 2 m / (m^2 + 1 + deviation), the same for the object and for what is not it.
    of_object = 2 * 0.75 / (0.75**2 + 1)
    # In each quarter the map is the mask, halved and raised by a quarter.
    rows, columns = np.nonzero(WANTED)
    y, x = round(rows.mean()) + 1, round(columns.mean()) + 1
    of_regions = 0.0
    for part in np.s_[:y, :x], np.s_[:y, x:], np.s_[y:, :x], np.s_[y:, x:]:
        mean, wanted = doubt[part].mean(), WANTED[part].mean()
        alike = 4 * mean * wanted * 0.5 / ((mean**2 + wanted**2) * (1 + 0.25))
        of_regions += alike * WANTED[part].size / WANTED.size
    assert scores.s_measure == pytest.approx((of_object + of_regions) / 2)
    assert 0 < scores.weighted_f < map_scores(WANTED, WANTED).weighted_f


def test_errors_far_from_the_object_cost_more():
    near, far = WANTED.copy(), WANTED.copy()
    near[10:30, 45:47] = True
    far[10:30, 57:59] = True
    assert map_scores(near, WANTED).mae == map_scores(far, WANTED).mae
    assert map_scores(near, WANTED).weighted_f > map_scores(far, WANTED).weighted_f


@pytest.mark.parametrize(
    ("given", "wanted", "sentence"),
    [
        pytest.param(WANTED.T, WANTED, r"got \(60, 40\) and \(40, 60\)", id="turned round"),
        pytest.param(WANTED * 255.0, WANTED, r"0\.\.1, got 0 to 255", id="not probabilities"),
        pytest.param(WANTED * np.nan, WANTED, r"0\.\.1, got nan", id="not numbers"),
        pytest.param(WANTED, WANTED & False, "hold a pixel, got none", id="nothing to find"),
    ],
)
def test_what_cannot_be_measured_is_refused(given, wanted, sentence):
    with pytest.raises(ConfigError, match=sentence):
        map_scores(given, wanted)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py_sod_metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'sam-ml-backend\[evaluate\]'"):
        map_scores(WANTED, WANTED)
