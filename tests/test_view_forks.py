"""Forks in the viewer, in a real browser: tree, links, keys, print; hostile continuations stay text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chromium import HOSTILE, Opened, launched
from forking import SMALL, Continuing, a_trial, forked
from planted import Runs, thresholds
from steerback.jobs.fork import ForkSettings
from steerback.jobs.view import ViewSettings, write_view

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Runs, str]:
    """The page of a run with a fork at token 5, a fork of its first continuation, and hostile continuations."""
    with pytest.MonkeyPatch.context() as patch:
        runs = Runs(tmp_path_factory.mktemp("runs"), patch, Continuing(thresholds=thresholds(), ending=HOSTILE))
        runs.run("esr", *SMALL)
        key = a_trial(runs, "esr", 1)
        first = forked(runs, "esr", key, ForkSettings("5", 12, boosts=(2.0,)))
        forked(runs, "esr", first.arms[0].rows[0].trial.key, ForkSettings("2", 2))
        page = write_view(
            [runs.root / "esr"], runs.root / "view.html", ViewSettings(judge="scripted"), makers=runs.makers
        )
        return page, runs, key


def test_the_tree_shows_arms_and_leads_to_continuations_and_back(
    browser: Browser, shown: tuple[Path, Runs, str]
) -> None:
    file, runs, key = shown
    opened = Opened(browser, file, "#forks")
    page = opened.page
    page.wait_for_selector("#view-forks .arm")
    assert page.locator("#view-forks > .tree > li").count() == 1  # the fork of a continuation hangs below it
    arms = page.locator("#view-forks > .tree > li > ul > li > .fork > ul > li > .arm")
    assert [a.locator("summary strong").first.inner_text() for a in arms.all()] == [
        "steering on",
        "steering off",
        "boost 2",
    ]
    with runs.ledger("esr") as ledger:
        rows = ledger.rows(stage="fork", judge="scripted")
    off = [r for r in rows if r.trial.condition.endswith("@5: steering off")]
    share = 100 * sum(len(r.attempts) > 1 for r in off) / len(off)
    assert f"n 12; restarts % {share:.1f}" in arms.nth(1).inner_text()
    page.locator("#view-forks .arm summary").nth(0).focus()
    page.keyboard.press("Enter")
    leaves = arms.first.locator(":scope > .leaves > li")
    assert leaves.count() == 12
    assert leaves.first.locator(".fork").count() == 1
    leaves.nth(1).locator("a").click()
    opened.until("location.hash.startsWith('#trial=')")
    page.wait_for_selector("#forks-of-trial a")
    assert "after token 5" in opened.text("#forks-of-trial")
    assert "the last one, which counts as generated" in opened.text(".receipt")
    page.locator("#forks-of-trial a").click()
    opened.until(f"decodeURIComponent(location.hash) === '#trial={key}'")
    page.wait_for_selector("#forks-of-trial .arm")
    assert not opened.errors


def test_hostile_continuations_stay_text_and_closed_arms_are_printed(
    browser: Browser, shown: tuple[Path, Runs, str]
) -> None:
    file, runs, _ = shown
    opened = Opened(browser, file)
    page = opened.page
    with runs.ledger("esr") as ledger:
        hostile = next(
            r.trial.key for r in ledger.rows(stage="fork") if r.completion and "onerror" in r.completion.text
        )
    page.goto(f"{opened.address}#trial={hostile}")
    page.wait_for_selector("#response .band")
    assert "<script>document.title='owned'</script><img src=x" in opened.text("#response")
    assert page.title() != "owned"
    assert page.locator("#view-trial img").count() == 0
    page.goto(f"{opened.address}#forks")
    page.wait_for_selector("#view-forks .arm")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#view-forks details:not([open])").count() == 0
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("#view-forks details:not([open])").count() > 0
    assert all(url.startswith(("file:", "data:")) for url in opened.requests)
    assert not opened.errors


def test_a_page_without_forks_does_not_offer_them(
    browser: Browser, tmp_path: Path, shown: tuple[Path, Runs, str]
) -> None:
    file, _, _ = shown
    with pytest.MonkeyPatch.context() as patch:
        plain = Runs(tmp_path, patch, Continuing(thresholds=thresholds()))
        plain.run("esr", *SMALL)
    page = write_view([plain.root / "esr"], tmp_path / "view.html", makers=plain.makers)
    opened = Opened(browser, page)
    opened.page.wait_for_selector("#view-overview table")
    assert not opened.page.locator("#forks-link").is_visible()
    forks = Opened(browser, file)
    forks.page.wait_for_selector("#view-overview table")
    assert forks.page.locator("#forks-link").is_visible()
    tables = [o.page.locator("#view-overview table").all_inner_texts() for o in (opened, forks)]
    assert tables[0] == tables[1]  # of runs that differ in their forks alone
    assert not opened.errors + forks.errors
