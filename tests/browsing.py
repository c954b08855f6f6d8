"""Debian's chromium, for the tests that look at pages as people do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_S = 120

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path"),
]


@contextmanager
def a_page(width: int = 1400, height: int = 900, has_scripts: bool = True) -> Iterator[Any]:
    """A page of a browser of its own. Skips the test where playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        size = {"width": width, "height": height}
        page = browser.new_page(viewport=size, java_script_enabled=has_scripts)
        page.set_default_timeout(1000 * PATIENCE_S)
        yield page
        browser.close()
