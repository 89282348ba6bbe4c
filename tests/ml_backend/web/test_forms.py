from __future__ import annotations

import stat

import pytest

from ml_backend.errors import SettingsError
from ml_backend.web.forms import FormGuard


def test_the_key_is_this_users_alone_and_stays(tmp_path):
    first = FormGuard(tmp_path)
    assert stat.S_IMODE((tmp_path / "page.key").stat().st_mode) == 0o600
    assert FormGuard(tmp_path).token("a") == first.token("a") != first.token("b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.key", "page.lock"]


def test_a_damaged_key_is_made_anew(tmp_path):
    (tmp_path / "page.key").write_bytes(b"")
    first = FormGuard(tmp_path)
    assert len((tmp_path / "page.key").read_bytes()) == 32
    assert FormGuard(tmp_path).token("a") == first.token("a")


def test_two_installations_have_two_keys(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert FormGuard(tmp_path / "one").token("a") != FormGuard(tmp_path / "two").token("a")


def test_a_token_is_no_cookie(tmp_path):
    """What stands in the page cannot be made a cookie, nor the other way round."""
    guard = FormGuard(tmp_path)
    assert guard.token("a") != guard._sign("cookie", "a")


def test_a_folder_that_cannot_be_written_to_is_a_settings_error(tmp_path):
    (tmp_path / "page.key").mkdir()
    with pytest.raises(SettingsError, match="DATA_DIR must be a folder that can be written to"):
        FormGuard(tmp_path)


def test_visitors_are_not_guessed(tmp_path):
    guard = FormGuard(tmp_path)
    names = {guard.new_visitor() for _ in range(8)}
    assert len(names) == 8
    assert all(len(name) == 32 for name in names)
