"""What tests in a browser share: a headless Chromium, and the reason where there is none."""

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def lacking(*packages: str) -> str:
    """Why tests in a browser cannot run here; "" where they can. `packages`: that they need, beside playwright."""
    missing = [name for name in ("playwright", *packages) if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: pip install -e '.[dev]'"
    return "" if chromium() else "needs a Chromium: apt-get install chromium"


@contextlib.contextmanager
def open_browser() -> Iterator:
    """A headless Chromium, as playwright has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        yield browser
        browser.close()
