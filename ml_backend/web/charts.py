"""Curves and bars as geometry: what the templates draw as SVG, in units of a view box."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Chart", "Dot", "Line", "Tick", "iou_chart", "loss_chart", "progress_chart"]

_WIDTH, _HEIGHT = 480, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 26
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_TICKS = 4
_POINTS = 300  # more are not seen
# Sum first; then SAM's own losses and those of full masks, then what holds on to the base model.
_LOSSES = {
    "total": "sum",
    "focal": "focal",
    "dice": "dice",
    "bce": "cross-entropy",
    "soft_iou": "overlap",
    "iou": "predicted IoU",
    "free_bce": "cross-entropy, no prompt",
    "free_soft_iou": "overlap, no prompt",
    "free_iou": "predicted IoU, no prompt",
    "projection": "projection",
    "pairwise": "colours",
    "anchor": "anchor",
    "contrastive": "contrastive",
}


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    name: str
    paths: tuple[str, ...]
    """`x,y x,y …` of each piece; a value that is no number parts two pieces."""
    last: str
    """The last value, for the legend."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One marked value."""

    x: float
    y: float
    title: str
    is_hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plot area with axes, and what is in it."""

    title: str
    x_name: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...] = ()
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


def loss_chart(curve: object) -> Chart | None:
    """Draw the losses over the steps; None if there are fewer than two steps.

    Args:
        curve: A list of `{"step": …, <loss>: …}`, as a version's `curves.json` has it. What is
            not like that is left out.
    """
    rows = _rows(curve)
    if len(rows) < 2:
        return None
    highest = max((value for key in _LOSSES for value in _known(rows, key)), default=0)
    return _over_steps(
        rows,
        {key: name for key, name in _LOSSES.items() if _known(rows, key)},
        title="Losses of the training by step; lower is better",
        y_ticks=_round_numbers(0.0, highest or 1.0),
    )


def progress_chart(curve: object) -> Chart | None:
    """Draw how well masks fit while they are learnt; None for fewer than two steps that say so.

    Args:
        curve: As `loss_chart` takes it, with `mean_iou`.
    """
    rows = _rows(curve)
    values = _known(rows, "mean_iou")
    if len(values) < 2:
        return None
    return _over_steps(
        rows,
        {"mean_iou": "mean IoU"},
        title="How well masks fit what the training learns from, by step; 1 is perfect",
        y_ticks=_round_numbers(max(0.0, min(values) - 0.02), min(1.0, max(values) + 0.02)),
    )


def _rows(curve: object) -> list[dict[str, Any]]:
    """Take the steps of a curve, not more than can be seen."""
    rows = [row for row in curve if isinstance(row, dict)] if isinstance(curve, list) else []
    rows = [row for row in rows if _number(row.get("step")) is not None]
    return rows[:: -(-len(rows) // _POINTS) or 1]


def _known(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := _number(row.get(key))) is not None]


def _over_steps(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    *,
    title: str,
    y_ticks: Sequence[float],
) -> Chart:
    """Draw what rows have under some keys, each by its name."""
    steps = [float(row["step"]) for row in rows]
    x_ticks = [one for one in _round_numbers(steps[0], steps[-1]) if one.is_integer()]
    x_range, y_range = (steps[0], steps[-1]), (y_ticks[0], y_ticks[-1])
    return Chart(
        title=title,
        x_name="step",
        x_ticks=tuple(
            Tick(at=_x(one, x_range), label=f"{one:.0f}")
            for one in x_ticks
            if steps[0] <= one <= steps[-1]
        ),
        y_ticks=tuple(Tick(at=_y(one, y_range), label=f"{one:g}") for one in y_ticks),
        lines=tuple(
            _line(name, steps, [_number(row.get(key)) for row in rows], x_range, y_range)
            for key, name in names.items()
        ),
    )


def iou_chart(versions: Sequence[tuple[int, bool, Mapping[str, Any]]]) -> Chart | None:
    """Draw what each version reached on its held-out tasks, beside the base model; None for none.

    Args:
        versions: Number, whether it was promoted, and the means by model, of each, ascending.
    """
    found = [
        (number, is_promoted, _number(means.get("candidate")), _number(means.get("base")))
        for number, is_promoted, means in versions
    ]
    numbers = [float(number) for number, *_ in found]
    reached, base = [one for *_, one, _ in found], [one for *_, one in found]
    values = [one for one in (*reached, *base) if one is not None]
    if len(found) < 2 or not values:
        return None
    low, high = min(values), max(values)
    y_ticks = _round_numbers(max(0.0, low - 0.02), min(1.0, high + 0.02))
    x_range, y_range = (numbers[0], numbers[-1]), (y_ticks[0], y_ticks[-1])
    return Chart(
        title=(
            "How well masks fit on the held-out tasks (mean; 1 is perfect); a hollow dot was not "
            "promoted"
        ),
        x_name="version",
        x_ticks=tuple(Tick(at=_x(one, x_range), label=f"v{one:.0f}") for one in numbers),
        y_ticks=tuple(Tick(at=_y(one, y_range), label=f"{one:.2f}") for one in y_ticks),
        lines=(
            _line("versions", numbers, reached, x_range, y_range),
            _line("base model", numbers, base, x_range, y_range),
        ),
        dots=tuple(
            Dot(
                x=_x(number, x_range),
                y=_y(one, y_range),
                title=f"v{number:.0f}: {one:.3f}",
                is_hollow=not is_promoted,
            )
            for number, (_, is_promoted, one, _) in zip(numbers, found, strict=True)
            if one is not None
        ),
    )


def _line(
    name: str,
    xs: Sequence[float],
    ys: Sequence[float | None],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> Line:
    pieces: list[list[str]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            pieces[-1].append(f"{_x(x, x_range):.1f},{_y(y, y_range):.1f}")
        elif pieces[-1]:
            pieces.append([])
    known = [y for y in ys if y is not None]
    return Line(
        name=name,
        paths=tuple(" ".join(piece) for piece in pieces if len(piece) > 1),
        last=f"{known[-1]:.3f}" if known else "",
    )


def _x(value: float, limits: tuple[float, float]) -> float:
    return _LEFT + _share(value, limits) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, limits: tuple[float, float]) -> float:
    return _HEIGHT - _BOTTOM - _share(value, limits) * (_HEIGHT - _TOP - _BOTTOM)


def _share(value: float, limits: tuple[float, float]) -> float:
    low, high = limits
    return (value - low) / (high - low) if high > low else 0.5


def _round_numbers(low: float, high: float) -> list[float]:
    """Give a few round numbers, of which the first is at most `low` and the last at least `high`.

    Returns:
        At least two, evenly spaced.
    """
    rough = (high - low) / _TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in _STEPS if power * one >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]
