"""Percent to pixels, in an image of 200 rows and 400 columns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ml_backend.convert.geometry import (
    ellipse_to_box_xyxy,
    percent_to_pixels,
    rectangle_to_box_xyxy,
)

SIZE_HW = (200, 400)


def test_percent_are_of_width_and_height_and_stay_unrounded():
    np.testing.assert_allclose(
        percent_to_pixels((33.3, 12.25), size_hw=SIZE_HW), [133.2, 24.5], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("wh_percent", "rotation_degrees", "expected"),
    [
        pytest.param((10, 30), 0, [200, 100, 240, 160], id="upright"),
        pytest.param((-10, 30), 0, [160, 100, 200, 160], id="right to left"),
        pytest.param((-10, -30), 0, [160, 40, 200, 100], id="from the lower right corner"),
        pytest.param((10, 30), 90, [140, 100, 200, 140], id="quarter turn: leaves to the left"),
        pytest.param((10, 30), -90, [200, 60, 260, 100], id="quarter turn back: leaves above"),
        pytest.param((10, 30), 180, [160, 40, 200, 100], id="half turn"),
        pytest.param(
            (10, 20),  # 40 x 40 px: a square in pixels, where Label Studio turns it
            45,
            [200 - 20 * math.sqrt(2), 100, 200 + 20 * math.sqrt(2), 100 + 40 * math.sqrt(2)],
            id="on its corner",
        ),
        pytest.param((0, 0), 30, [200, 100, 200, 100], id="no size"),
    ],
)
def test_a_rectangle_turns_about_its_corner_in_pixels(wh_percent, rotation_degrees, expected):
    box = rectangle_to_box_xyxy(
        xy_percent=(50, 50),
        wh_percent=wh_percent,
        rotation_degrees=rotation_degrees,
        size_hw=SIZE_HW,
    )

    np.testing.assert_allclose(box, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rotation_degrees", [0, 30, 90, 200])
def test_the_box_around_an_ellipse_is_the_one_around_its_points(rotation_degrees):
    t, turn = np.linspace(0, 2 * np.pi, 100_001), math.radians(rotation_degrees)
    u, v = 40 * np.cos(t), 10 * np.sin(t)  # 10 % of 400, 5 % of 200
    x = 100 + u * math.cos(turn) - v * math.sin(turn)
    y = 150 + u * math.sin(turn) + v * math.cos(turn)

    box = ellipse_to_box_xyxy(
        xy_percent=(25, 75),
        radii_percent=(10, 5),
        rotation_degrees=rotation_degrees,
        size_hw=SIZE_HW,
    )

    np.testing.assert_allclose(box, [x.min(), y.min(), x.max(), y.max()], rtol=0, atol=1e-6)
