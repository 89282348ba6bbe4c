"""Rings of masks: filled again at the pixels' centres, they are the mask."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ml_backend.convert.polygons import mask_from_polygon, polygons_from_mask, remove_specks


def drawn(*rows: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


def fill(ring, shape) -> np.ndarray:
    """Fill a ring [V, 2] by the even-odd rule: count the edges left of every pixel's centre."""
    rows, columns = np.indices(shape) + 0.5
    inside = np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 <= rows) != (y1 <= rows)
            inside ^= crosses & (x0 + (rows - y0) * (x1 - x0) / (y1 - y0) < columns)
    return inside


def fill_all(rings, shape) -> np.ndarray:
    count = sum((fill(ring, shape).astype(int) for ring in rings), np.zeros(shape, int))
    assert count.max() <= 1, "pieces must not overlap"
    return count == 1


def winding(ring, x, y) -> int:
    """Turns of the ring about a point: what a canvas fills wherever it is not zero."""
    to = ring - (x, y)
    after = np.roll(to, -1, axis=0)
    cross = to[:, 0] * after[:, 1] - to[:, 1] * after[:, 0]
    return round(np.arctan2(cross, (to * after).sum(axis=1)).sum() / (2 * np.pi))


def blobs(seed: int) -> np.ndarray:
    """Smooth shapes with holes and islands, [90, 130]."""
    coarse = np.random.default_rng(seed).standard_normal((7, 9)).astype(np.float32)
    return cv2.resize(coarse, (130, 90), interpolation=cv2.INTER_CUBIC) > 0.2


SHAPES = [
    pytest.param(drawn("....", "....", "...."), 0, id="empty"),
    pytest.param(drawn("#"), 1, id="one pixel that is the image"),
    pytest.param(drawn("#####", "#####"), 1, id="the whole image"),
    pytest.param(drawn("....", ".##.", "...."), 1, id="a rectangle"),
    pytest.param(drawn("#..#.", ".....", "..#.#"), 4, id="islands in the corners"),
    pytest.param(drawn("#...", ".#..", "..#.", "...#", "...."), 1, id="a diagonal line"),
    pytest.param(drawn(".#..", "#.#.", ".#..", "...."), 1, id="a diamond around a hole"),
    pytest.param(drawn("#####", "#...#", "#.#.#", "#...#", "#####", "....."), 2, id="a frame"),
    pytest.param(drawn("######", "#.##.#", "######", "#.##.#"), 1, id="holes side by side"),
    pytest.param(drawn("#######", "#.#.#.#", "##.#.##", "#######"), 1, id="holes corner to corner"),
    pytest.param(drawn("#####", "#.#.#", "#...#", "#####"), 1, id="a tooth in the hole"),
]


@pytest.mark.parametrize(("mask", "pieces"), SHAPES)
def test_at_no_tolerance_the_rings_are_the_mask(mask, pieces):
    rings = polygons_from_mask(mask)

    assert len(rings) == pieces
    np.testing.assert_array_equal(fill_all(rings, mask.shape), mask)


@pytest.mark.parametrize("seed", range(20))
def test_at_no_tolerance_noise_comes_back_exactly(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 14)) < rng.random()

    np.testing.assert_array_equal(fill_all(polygons_from_mask(mask), mask.shape), mask)


@pytest.mark.parametrize("tolerance_px", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(5))
def test_wrong_pixels_lie_within_the_tolerance_of_the_outline(seed, tolerance_px):
    mask = remove_specks(blobs(seed), min_area_px=30)

    rings = polygons_from_mask(mask, tolerance_px=tolerance_px)

    # pieces close to each other may overlap by a pixel now, hence the plain union
    filled = np.any([fill(ring, mask.shape) for ring in rings], axis=0)
    inner = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    outer = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    centre_to_outline = np.maximum(inner, outer) - 0.5
    assert centre_to_outline[filled != mask].max(initial=0) <= tolerance_px


def test_a_ring_goes_round_the_pixels_edges_clockwise():
    mask = drawn("......", "..##..", "..##..", "..##..")

    (ring,) = polygons_from_mask(mask, tolerance_px=1.0)

    assert ring.tolist() == [[2, 1], [4, 1], [4, 4], [2, 4]]


def test_a_hole_is_reached_by_a_bridge_from_the_left_and_stays_open_on_a_canvas():
    mask = np.ones((7, 9), bool)
    mask[2:5, 4:6] = False

    (ring,) = polygons_from_mask(mask)

    outline = [[0, 0], [9, 0], [9, 7], [0, 7]]
    walk = [[0, 2], [4, 2], [4, 5], [6, 5], [6, 2], [4, 2], [0, 2]]
    assert ring.tolist() == [*outline, *walk]
    assert winding(ring, 5.0, 3.5) == 0
    assert winding(ring, 2.0, 3.5) == 1


def test_a_bridge_ends_at_the_next_hole_and_does_not_cross_it():
    mask = np.ones((4, 12), bool)
    mask[1:3, 3:5] = mask[1:3, 7:9] = False

    (ring,) = polygons_from_mask(mask)

    outline = [[0, 0], [12, 0], [12, 4], [0, 4]]
    second = [[5, 1], [7, 1], [7, 3], [9, 3], [9, 1], [7, 1], [5, 1]]
    assert ring.tolist() == [
        *outline,
        *[[0, 1], [3, 1], [3, 3], [5, 3], *second, [5, 1], [3, 1], [0, 1]],
    ]


def test_a_thin_shape_keeps_its_area():
    mask = np.zeros((50, 70), bool)
    mask[5:45, 5:7] = True
    mask[43:45, 5:60] = True

    (ring,) = polygons_from_mask(mask, tolerance_px=3.0)

    assert ring.tolist() == [[5, 5], [7, 5], [7, 43], [60, 43], [60, 45], [5, 45]]


def test_a_line_one_pixel_wide_survives_a_tolerance_wider_than_itself():
    mask = np.zeros((20, 60), bool)
    mask[10, 5:55] = True

    (ring,) = polygons_from_mask(mask, tolerance_px=3.0)

    assert ring.tolist() == [[5, 10], [55, 10], [55, 11], [5, 11]]


def test_a_hole_that_simplifying_would_leave_outside_of_its_piece_stays_in_it():
    mask = np.zeros((40, 60), bool)
    mask[2:38, 10:58] = True
    mask[18:22, 4:10] = True  # a knob that the tolerance would cut off,
    mask[19:21, 5:9] = False  # with a hole in it

    rings = polygons_from_mask(mask, tolerance_px=8.0)

    assert len(rings) == 1
    np.testing.assert_array_equal(fill_all(rings, mask.shape), mask)


def test_a_disc_needs_few_corners():
    rows, columns = np.indices((320, 340))
    disc = (rows - 160.3) ** 2 + (columns - 165.1) ** 2 < 150**2

    (ring,) = polygons_from_mask(disc, tolerance_px=1.0)

    assert len(ring) <= 60  # 81 when the steps between pixels are left in


def test_the_largest_piece_comes_first():
    mask = drawn("##....", "......", "...###", "...###")

    rings = polygons_from_mask(mask)

    assert [ring.min(axis=0).tolist() for ring in rings] == [[3, 2], [0, 0]]


@pytest.mark.parametrize(
    ("mask", "min_area_px", "expected"),
    [
        pytest.param(
            drawn("##...", "##..#", "....#"),
            3,
            drawn("##...", "##...", "....."),
            id="a small piece goes",
        ),
        pytest.param(
            drawn("##...", "##..#", "....#"),
            2,
            drawn("##...", "##..#", "....#"),
            id="a piece of just that size stays",
        ),
        pytest.param(
            drawn("#....", ".#...", "....#"),
            99,
            drawn("#....", ".#...", "....."),
            id="the largest stays, corners join, and the outside is no hole",
        ),
        pytest.param(
            drawn("###.", "#.#.", "##.#", "...."),
            2,
            drawn("###.", "###.", "##.#", "...."),
            id="a hole is one that touches the outside at a corner, too",
        ),
        pytest.param(
            drawn("#####", "#.#..", "#####"),
            2,
            drawn("#####", "###..", "#####"),
            id="a small hole is filled, a bay at the border is none",
        ),
        pytest.param(
            drawn("#####", "#..##", "#####"),
            2,
            drawn("#####", "#..##", "#####"),
            id="a hole of just that size stays",
        ),
        pytest.param(np.zeros((2, 3), bool), 4, np.zeros((2, 3), bool), id="empty"),
        pytest.param(np.ones((2, 3), bool), 4, np.ones((2, 3), bool), id="full"),
    ],
)
def test_removes_specks(mask, min_area_px, expected):
    before = mask.copy()

    np.testing.assert_array_equal(remove_specks(mask, min_area_px=min_area_px), expected)
    np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize(("mask", "_"), SHAPES)
def test_filled_rings_are_the_mask_again(mask, _):
    filled = np.zeros(mask.shape, bool)
    for ring in polygons_from_mask(mask):
        filled |= mask_from_polygon(ring, size_hw=mask.shape)
    np.testing.assert_array_equal(filled, mask)


@pytest.mark.parametrize("seed", range(4))
def test_a_slanted_ring_is_filled_by_the_even_odd_rule_also_outside_the_image(seed):
    ring = np.random.default_rng(seed).uniform(-10, 40, (9, 2))  # crosses itself
    got = mask_from_polygon(ring, size_hw=(31, 23))
    np.testing.assert_array_equal(got, fill(ring, (31, 23)))
    assert got.any()
