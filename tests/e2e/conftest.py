"""One demo and one Chromium for the whole session."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_for_want_of
from tests.e2e.support import LABEL_STUDIO, ROOT, Demo

_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_MAC_CHROME = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
_CHROMIUM_ARGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory):
    if not LABEL_STUDIO.is_file():
        skip_for_want_of("Label Studio is not installed; `make test` installs it")
    demo = Demo(tmp_path_factory.mktemp("demo"))
    demo.start()
    yield demo
    demo.stop()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _CHROMIUM_NAMES)), "")
    if not found and sys.platform == "darwin" and Path(_MAC_CHROME).exists():
        found = _MAC_CHROME
    if not found:
        skip_for_want_of(
            f"none of {', '.join(_CHROMIUM_NAMES)} is installed; install one, or set CHROMIUM"
        )
    return found


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, headless=True, args=list(_CHROMIUM_ARGS)
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where the screenshots go; git does not look there."""
    folder = ROOT / ".e2e"
    folder.mkdir(exist_ok=True)
    return folder
