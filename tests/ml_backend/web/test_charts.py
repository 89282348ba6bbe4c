from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest

from ml_backend.web import charts
from ml_backend.web.charts import iou_chart, loss_chart, progress_chart
from sam_ext.training.wesam import WesamConfig
from tests.ml_backend.web.content import curve


def points(path: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in path.split()]


def test_losses_are_drawn_in_their_plot_area():
    """From the first step at the left to the last at the right, zero at the bottom."""
    chart = loss_chart([{"step": 1, "total": 2.0}, {"step": 3, "total": 0.0}])
    (line,) = chart.lines
    assert points(line.paths[0]) == [(chart.left, chart.top), (chart.right, chart.bottom)]
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "3"]
    assert [tick.label for tick in chart.y_ticks] == ["0", "0.5", "1", "1.5", "2"]
    assert (line.name, line.last) == ("sum", "0.000")


def test_the_sum_comes_first_and_what_is_unknown_is_left_out():
    rows = [{"step": n, "dice": 0.5, "total": 1.0, "<b>": 1.0, "phase": "x"} for n in (1, 2)]
    assert [line.name for line in loss_chart(rows).lines] == ["sum", "dice"]


def test_losses_of_full_masks_are_drawn_too():
    rows = [{"step": n, "total": 1.0, "bce": 0.5, "free_soft_iou": 0.9} for n in (1, 2)]
    names = [line.name for line in loss_chart(rows).lines]
    assert names == ["sum", "cross-entropy", "overlap, no prompt"]


def test_each_of_wesams_losses_is_drawn_in_a_colour_of_its_own():
    weights = [field.name for field in fields(WesamConfig) if field.name.endswith("_weight")]
    losses = [name.removesuffix("_weight") for name in weights]
    rows = [{"step": n, "total": 1.0} | dict.fromkeys(losses, 0.1) for n in (1, 2)]
    lines = loss_chart(rows).lines
    assert len(lines) == 1 + len(losses)
    css = (Path(charts.__file__).parent / "static" / "page.css").read_text()
    for number in range(1, len(lines)):
        assert css.count(f"--line-{number}: #") == 2  # by day and by night
        assert f".line-{number} {{" in css
        assert f".key-{number}::before {{" in css


def test_the_iou_is_drawn_over_the_steps():
    chart = progress_chart([{"step": n, "mean_iou": 0.6 + n / 100, "dice": 0.1} for n in (0, 10)])
    (line,) = chart.lines
    assert (line.name, line.last) == ("mean IoU", "0.700")
    low, high = chart.y_ticks[0], chart.y_ticks[-1]
    assert [float(low.label), float(high.label)] == [0.55, 0.75]
    (left, first), (right, last) = points(line.paths[0])
    assert (left, right) == (chart.left, chart.right)
    assert first == pytest.approx(low.at + 0.25 * (high.at - low.at), abs=0.1)
    assert last == pytest.approx(low.at + 0.75 * (high.at - low.at), abs=0.1)


def test_curves_of_versions_before_the_iou_was_kept_have_none():
    assert progress_chart([{"step": n, "total": 1.0} for n in (1, 2, 3)]) is None
    assert progress_chart([{"step": n, "mean_iou": math.nan} for n in (1, 2, 3)]) is None


@pytest.mark.parametrize("gap", [None, math.nan, math.inf, "1", True])
def test_a_value_that_is_no_number_parts_the_curve(gap):
    values = [1.0, 2.0, gap, 1.0, 2.0, gap]
    rows = [{"step": step, "total": value} for step, value in enumerate(values)]
    (line,) = loss_chart(rows).lines
    assert [len(points(path)) for path in line.paths] == [2, 2]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(None, id="no-file"),
        pytest.param({}, id="no-list"),
        pytest.param([], id="empty"),
        pytest.param([1, None, {}], id="no-steps"),
        pytest.param([{"step": 1, "total": 1.0}], id="one-step"),
    ],
)
def test_there_is_no_curve_without_steps(rows):
    assert loss_chart(rows) is None


def test_a_long_curve_is_thinned_out():
    (path,) = loss_chart(curve(5000)).lines[0].paths
    assert 200 < len(points(path)) <= 300


def test_losses_of_zero_and_equal_ones_are_drawn():
    for value in (0.0, 1e-9, 3.0, 1e6):
        chart = loss_chart([{"step": n, "total": value} for n in (5, 6)])
        assert all(chart.top <= y <= chart.bottom for _, y in points(chart.lines[0].paths[0]))


def test_iou_by_version():
    """The dots are where the values are on the axis; those not promoted are hollow."""
    means = [{"candidate": 0.82, "base": 0.74}, {}, {"candidate": 0.87, "base": 0.74}]
    chart = iou_chart([(2, True, means[0]), (3, False, means[1]), (5, False, means[2])])
    assert [tick.label for tick in chart.x_ticks] == ["v2", "v3", "v5"]
    assert [(dot.title, dot.is_hollow) for dot in chart.dots] == [
        ("v2: 0.820", False),
        ("v5: 0.870", True),
    ]
    assert [dot.x for dot in chart.dots] == [chart.left, chart.right]
    low, high = chart.y_ticks[0], chart.y_ticks[-1]
    share = (0.87 - float(low.label)) / (float(high.label) - float(low.label))
    assert chart.dots[1].y == pytest.approx(low.at + share * (high.at - low.at), abs=0.01)


def test_iou_of_one_version_or_of_none_is_no_curve():
    assert iou_chart([]) is None
    assert iou_chart([(1, True, {"candidate": 0.8})]) is None
    assert iou_chart([(1, True, {}), (2, True, {})]) is None
