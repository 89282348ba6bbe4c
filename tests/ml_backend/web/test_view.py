from __future__ import annotations

import pytest

from ml_backend.web.view import ago, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (3560, "59 min"),
        (3600, "1 h"),
        (4200, "1 h 10 min"),
        (7199, "2 h"),
        (86399, "1 day"),
        (86400, "1 day"),
        (3 * 86400, "3 days"),
    ],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_what_was_just_now_is_not_counted():
    assert ago(100.0, 104.0) == "just now"
    assert ago(100.0, 140.0) == "40 s ago"
