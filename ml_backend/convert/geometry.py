"""Percent of an image to its pixels: points, and boxes around rotated rectangles and ellipses."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["ellipse_to_box_xyxy", "percent_to_pixels", "rectangle_to_box_xyxy"]


def percent_to_pixels(
    xy_percent: tuple[float, float], *, size_hw: tuple[int, int]
) -> NDArray[np.float64]:
    """Turn percent of the image into its pixels, unrounded.

    The size is the real one of the file after EXIF rotation. What a request says the size is
    matters not: percent refer to the image as it was shown.

    Returns:
        [2], (x, y): (50, 25) in an image of 480 rows and 640 columns is (320, 120).
    """
    height, width = size_hw
    return np.array(xy_percent, np.float64) * (width, height) / 100


def rectangle_to_box_xyxy(
    *,
    xy_percent: tuple[float, float],
    wh_percent: tuple[float, float],
    rotation_degrees: float = 0.0,
    size_hw: tuple[int, int],
) -> NDArray[np.float64]:
    """Find the upright box around a rectangle that may be rotated or drawn backwards.

    Label Studio turns a rectangle clockwise about its (x, y) corner, in pixels, not in percent.

    Args:
        xy_percent: The corner that the rectangle turns about: top left, if drawn to the right.
        wh_percent: Its sides; negative where it was drawn to the left or upwards.
        rotation_degrees: Clockwise as seen on the screen.
        size_hw: The image's real size.

    Returns:
        [4], x_min, y_min, x_max, y_max in pixels; it may reach outside the image.
    """
    corner = percent_to_pixels(xy_percent, size_hw=size_hw)
    width, height = percent_to_pixels(wh_percent, size_hw=size_hw)
    cos, sin = _cos_sin(rotation_degrees)
    across = np.array((width * cos, width * sin))
    down = np.array((-height * sin, height * cos))
    corners = corner + np.stack((0 * across, across, across + down, down))  # [4, 2]
    return np.concatenate((corners.min(axis=0), corners.max(axis=0)))


def ellipse_to_box_xyxy(
    *,
    xy_percent: tuple[float, float],
    radii_percent: tuple[float, float],
    rotation_degrees: float = 0.0,
    size_hw: tuple[int, int],
) -> NDArray[np.float64]:
    """Find the upright box around an ellipse.

    Args:
        xy_percent: Its centre, which it turns about.
        radii_percent: Its half axes: `radiusX` of the width, `radiusY` of the height.
        rotation_degrees: Clockwise as seen on the screen.
        size_hw: The image's real size.

    Returns:
        [4], x_min, y_min, x_max, y_max in pixels; it may reach outside the image.
    """
    centre = percent_to_pixels(xy_percent, size_hw=size_hw)
    radius_x, radius_y = percent_to_pixels(radii_percent, size_hw=size_hw)
    cos, sin = _cos_sin(rotation_degrees)
    half = np.array(
        (math.hypot(radius_x * cos, radius_y * sin), math.hypot(radius_x * sin, radius_y * cos))
    )
    return np.concatenate((centre - half, centre + half))


def _cos_sin(degrees: float) -> tuple[float, float]:
    radians = math.radians(degrees)
    return math.cos(radians), math.sin(radians)
