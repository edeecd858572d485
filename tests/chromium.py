"""Chromium for the tests of pages: one browser per test file, and hostile text that pages must not execute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = "/usr/bin/chromium"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> {{ 7*7 }} "
    "</script><script>document.title='owned'</script> &lt;b&gt; ]]> <!-- \u202egnp.exe\u202c \u2066x\u2069 "
    "bell\x07 \x1b[31mred\x1b[0m \u2028line\u2029 \U0001f9ca\U0001f427 =cmd|' /C calc'!A0. "
    "Wait, I should answer the question. Fold it."
)


def needs_browser() -> None:
    """Skip without Chromium or Playwright, but fail in CI, where both must be there."""
    missing = [] if shutil.which(CHROMIUM) else [f"{CHROMIUM} is missing: apt-get install chromium"]
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        missing.append("playwright is missing: pip install 'steerback[dev]'")
    if missing and os.environ.get("CI"):
        pytest.fail("; ".join(missing))
    if missing:
        pytest.skip("; ".join(missing))


def launched() -> Iterator[Browser]:
    """A running browser, closed at the end."""
    needs_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield running
        running.close()


class Opened:
    """The viewer in a browser, with all that the browser reports while it is open."""

    def __init__(self, browser: Browser, file: Path, hash: str = "") -> None:
        self.page: Page = browser.new_page(viewport={"width": 1300, "height": 800})
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.address = file.as_uri()
        self.page.goto(self.address + hash)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript; the policy of the page forbids Playwright's own way of waiting."""
        waiting = (
            "async () => { for (let n = 0; n < 500 && !(IT); n += 1) await new Promise((r) => setTimeout(r, 20)); }"
        )
        self.page.evaluate(waiting.replace("IT", condition))
        assert self.page.evaluate(f"() => Boolean({condition})"), condition

    def rows(self) -> list[str]:
        return self.page.locator("#body tr[data-trial]").all_inner_texts()
