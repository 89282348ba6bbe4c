from __future__ import annotations

from ml_backend.web.recent_errors import RecentErrors


def note(errors: RecentErrors, number: int, error_id: str = "a") -> None:
    errors.note(f"reason {number}", request="POST /predict", status=400, error_id=error_id)


def test_the_last_ones_are_kept_the_newest_first():
    errors = RecentErrors()
    for number in range(100):
        note(errors, number)
    assert [one.reason for one in errors.latest()] == [f"reason {n}" for n in range(99, 69, -1)]


def test_one_that_repeats_is_counted_and_pushes_nothing_out():
    errors = RecentErrors()
    for number in range(100):
        note(errors, 1, f"id{number}")
        note(errors, 2)
    first, second = errors.latest()
    assert (first.reason, first.times) == ("reason 2", 100)
    assert (second.reason, second.times, second.id) == ("reason 1", 100, "id99")
    assert first.at >= second.at
    note(errors, 1)
    assert [one.reason for one in errors.latest()] == ["reason 1", "reason 2"]
