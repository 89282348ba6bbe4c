"""A mask as rings, one per connected piece, holes and all; and a ring as a mask."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["mask_from_polygon", "polygons_from_mask", "remove_specks"]

_Ring = NDArray[np.float64]  # [V, 2] corners, (x, y) in pixels
_STAIR_PX = 0.5
_AREA_LOSS = 0.05
"""A simplified ring may gain or lose this share of its area; thin shapes are simplified less."""


def remove_specks(mask: NDArray[np.bool_], *, min_area_px: float) -> NDArray[np.bool_]:
    """Drop the pieces, and fill the holes, that are smaller than an area.

    The largest piece stays whatever its size. Pixels that touch at a corner belong to one piece.

    Args:
        mask: [H, W] bool.
        min_area_px: The least number of pixels that a piece or a hole may have.

    Returns:
        [H, W] bool, a new array.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(padded, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= min_area_px
    if len(areas) > 1:
        kept[1 + areas[1:].argmax()] = True
    kept[0] = False  # the background
    pieces = kept[labels]

    gaps = (~pieces).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(gaps, connectivity=4)
    filled = stats[:, cv2.CC_STAT_AREA] < min_area_px
    filled[labels[0, 0]] = False  # the outside
    filled[0] = True  # the pieces themselves
    return np.asarray(filled[labels][1:-1, 1:-1], dtype=np.bool_)


def polygons_from_mask(
    mask: NDArray[np.bool_], *, tolerance_px: float = 0.0
) -> list[NDArray[np.float64]]:
    """Outline a mask: one ring for each connected piece.

    The outline follows the pixels' edges, not their centres: filled by the even-odd rule at the
    pixels' centres, the rings are the mask again, exactly so at tolerance 0.

    A ring cannot have a hole, but it can walk in along a bridge, around the hole the other way,
    and back along the same bridge. So a piece with holes stays one region to accept, label and
    count. The bridge has no width and lies within the piece; by the even-odd rule as by the
    non-zero rule (which a page's canvas uses) the hole stays open.

    Args:
        mask: [H, W] bool. Pixels that touch at a corner belong to one piece.
        tolerance_px: How far a ring may stray from the outline. Where that would take more than
            5 % of a ring's area, as in lines few pixels wide, it strays less.

    Returns:
        Per piece, the largest first, its corners [V, 2], V >= 3, (x, y) in pixels, x in 0..W and
        y in 0..H, clockwise on the screen; the first corner is not repeated at the end.
    """
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    polygons = []
    for piece in 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA], kind="stable"):
        x, y, width, height = stats[piece, :4]
        rings = _rings(labels[y : y + height, x : x + width] == piece)
        simple = [_simplify(ring, tolerance_px=tolerance_px) for ring in rings]
        merged = _bridge_holes(simple)
        if merged is None:  # simplifying moved a hole out of its piece
            merged = _bridge_holes(rings)
        assert merged is not None
        polygons.append(merged + np.array((x, y)))
    return polygons


def mask_from_polygon(
    ring: NDArray[np.floating[Any]], *, size_hw: tuple[int, int]
) -> NDArray[np.bool_]:
    """Fill a ring by the even-odd rule at the pixels' centres: what `polygons_from_mask` outlined.

    Args:
        ring: [V, 2] corners, (x, y) in pixels; they may lie outside the image.
        size_hw: The image's size.

    Returns:
        [H, W] bool.
    """
    height, width = size_hw
    start, end = ring, np.roll(ring, -1, axis=0)
    # The rows whose centres an edge passes: first and behind the last.
    first, last = (
        np.clip(np.ceil(edge - 0.5), 0, height).astype(np.intp)
        for edge in (np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1]))
    )
    counts = last - first
    edges = np.repeat(np.arange(len(ring)), counts)  # [crossings], the edge of each
    rows = first[edges] + np.arange(len(edges)) - np.repeat(np.cumsum(counts) - counts, counts)
    (x0, y0), (x1, y1) = start[edges].T, end[edges].T
    x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.intp)
    crossings = np.zeros((height, width + 1), np.uint32)
    np.add.at(crossings, (rows, columns), 1)
    return np.asarray(np.cumsum(crossings, axis=1)[:, :width] % 2 == 1)


def _rings(piece: NDArray[np.bool_]) -> list[_Ring]:
    """Walk the edges of one piece: its outer ring clockwise, the rings of its holes not.

    An edge has the piece on its right hand. Each step of a walk is a straight run of edges; where
    four runs meet (two pixels touch at a corner), turning left keeps the pixels in one ring.
    """
    moves: dict[tuple[int, int, int, int], tuple[int, int]] = {}  # (x, y, dx, dy) -> (x, y)
    below_minus_above = np.diff(np.pad(piece, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    for y, x0, x1, sign in _runs(below_minus_above):
        if sign > 0:
            moves[x0, y, 1, 0] = (x1, y)
        else:
            moves[x1, y, -1, 0] = (x0, y)
    right_minus_left = np.diff(np.pad(piece, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    for x, y0, y1, sign in _runs(right_minus_left.T):
        if sign > 0:
            moves[x, y1, 0, -1] = (x, y0)
        else:
            moves[x, y0, 0, 1] = (x, y1)

    rings = []
    while moves:
        first = step = next(iter(moves))
        walked = [first]
        while True:
            x, y = moves[step]
            _, _, dx, dy = step
            left, right = (x, y, dy, -dx), (x, y, -dy, dx)
            step = left if left in moves else right
            if step == first:
                break
            walked.append(step)
        for step in walked:
            del moves[step]
        rings.append(np.array([step[:2] for step in walked], np.float64))
    return rings


def _runs(signs: NDArray[np.int8]) -> list[tuple[int, int, int, int]]:
    """List the runs of equal non-zero values along the rows: row, start, end, value."""
    padded = np.pad(signs, ((0, 0), (1, 1)))
    changes = padded[:, 1:] != padded[:, :-1]
    rows, starts = np.nonzero(changes & (padded[:, 1:] != 0))
    _, ends = np.nonzero(changes & (padded[:, :-1] != 0))
    values = signs[rows, starts]
    return list(zip(rows.tolist(), starts.tolist(), ends.tolist(), values.tolist(), strict=True))


def _signed_area(ring: _Ring) -> float:
    """Positive for a ring that runs clockwise on the screen, where y points down."""
    x, y = ring.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _simplify(ring: _Ring, *, tolerance_px: float) -> _Ring:
    area = _signed_area(ring)
    for tolerance in (tolerance_px, tolerance_px / 2, tolerance_px / 4):
        fine = ring
        if tolerance >= _STAIR_PX:
            fine, tolerance = _cut_stairs(ring), tolerance - _STAIR_PX
        corners = cv2.approxPolyDP(fine.astype(np.float32), tolerance, closed=True)
        simple: _Ring = corners.reshape(-1, 2).astype(np.float64)
        if len(simple) > 2 and abs(_signed_area(simple) - area) <= _AREA_LOSS * abs(area):
            return simple
    return ring


def _cut_stairs(ring: _Ring) -> _Ring:
    """Run through the middle of one-pixel steps, so that slopes are straight again.

    Left as they are, the steps use up most of a tolerance of one pixel, and a disc of radius 1300
    keeps 793 corners instead of 188. Corners between longer runs stay where they are: a
    rectangle remains one. No point moves by more than half a pixel.
    """
    runs = np.roll(ring, -1, axis=0) - ring  # [V, 2], from each corner to the next
    before = np.roll(runs, 1, axis=0)
    turns = np.sign(before[:, 0] * runs[:, 1] - before[:, 1] * runs[:, 0])
    is_step = (np.abs(runs).sum(axis=1) == 1) & (turns != np.roll(turns, -1))
    is_cut = is_step | np.roll(is_step, 1)
    points = np.stack((ring, ring + runs / 2), axis=1)  # [V, 2, 2]: corner, middle of its run
    kept = np.stack((~is_cut, is_cut & np.roll(is_cut, -1)), axis=1)
    smooth: _Ring = points[kept]
    return smooth


def _bridge_holes(rings: list[_Ring]) -> _Ring | None:
    """Make one ring of an outer ring and the holes in it; None if a hole lies outside.

    From a hole's leftmost corner the bridge runs left to the nearest edge. Holes come from left to
    right, so whatever lies to the left is part of the ring by then.
    """
    merged = next(ring for ring in rings if _signed_area(ring) > 0)
    holes = [ring for ring in rings if _signed_area(ring) < 0]
    for hole in sorted(holes, key=lambda ring: float(ring[:, 0].min())):
        hole = np.roll(hole, -int(hole[:, 0].argmin()), axis=0)
        x, y = hole[0]
        start, end = merged, np.roll(merged, -1, axis=0)
        crossed = np.flatnonzero((start[:, 1] <= y) != (end[:, 1] <= y))
        (x0, y0), (x1, y1) = start[crossed].T, end[crossed].T
        landings = x0 + (y - y0) * (x1 - x0) / (y1 - y0)
        crossed, landings = crossed[landings <= x], landings[landings <= x]
        if not crossed.size:
            return None
        nearest = landings.argmax()
        landing = (landings[nearest], y)
        there_and_back = np.vstack((landing, hole, hole[:1], landing))
        merged = np.insert(merged, crossed[nearest] + 1, there_and_back, axis=0)
    return merged
