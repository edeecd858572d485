"""Labelling page in a real browser: marks, scores and saves with keys; hostile responses change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chromium import HOSTILE, launched
from labelled import FIRST, RESTART, SECOND, make_run, text_of
from steerback.jobs.labelling import DrawnSample, draw_sample, import_labels
from steerback.store.facts import LABEL_SAMPLES
from steerback.store.run import Run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


class Opened:
    """The page of a sample, with everything that the browser reports while it is open."""

    def __init__(self, browser: Browser, sample: DrawnSample, tmp: Path) -> None:
        self.page: Page = browser.new_page(accept_downloads=True)
        self.requests: list[str] = []
        self.refused: list[tuple[str, str | None]] = []
        self.answered: list[str] = []
        self.errors: list[str] = []
        self.tmp, self.address = tmp, sample.page.as_uri()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.append((request.url, request.failure)))
        self.page.on("response", lambda response: self.answered.append(response.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.goto(self.address)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def save(self) -> Path:
        with self.page.expect_download() as download:
            self.press("s")
        path = self.tmp / download.value.suggested_filename
        download.value.save_as(path)
        return path


@pytest.fixture
def four(tmp_path: Path) -> tuple[Path, DrawnSample]:
    """A run of four responses, two with a restart, all of them in the sample."""
    folder = make_run(tmp_path / "run", {"steered": [[True, True, False, False]]})
    return folder, draw_sample(folder, 4, seed=1)


def shown_texts(page: Page) -> list[str]:
    return [i["response"] for i in json.loads(page.locator("#data").text_content() or "")["items"]]


def test_marks_and_scores_made_with_keys_arrive_as_attempts_at_the_right_characters(
    browser: Browser, four: tuple[Path, DrawnSample], tmp_path: Path
) -> None:
    folder, sample = four
    opened = Opened(browser, sample, tmp_path)
    texts = shown_texts(opened.page)
    for text in texts:
        opened.press("3")
        if RESTART in text:
            opened.press("ArrowDown", "ArrowDown", "m", "8")  # the third sentence restarts
        opened.press("n")
    saved = opened.save()
    done = import_labels(folder, saved, "ann")
    assert (done.judge, done.new, done.size) == ("human:ann", 4, 4)
    with Run.read(folder) as run:
        rows = run.ledger.rows(judge="human:ann")
    start = len(FIRST) + 1
    for row in rows:
        spans = [(a.start, a.end, a.score, a.gated) for a in row.attempts]
        if RESTART in row.judged_text:
            assert spans == [(0, start - 1, 30.0, True), (start, len(row.judged_text), 80.0, True)]
            assert row.judged_text[start:].startswith(RESTART)
        else:
            assert spans == [(0, len(FIRST), 30.0, True)]
    assert not opened.errors


def test_a_click_marks_a_word_and_another_removes_the_mark(
    browser: Browser, four: tuple[Path, DrawnSample], tmp_path: Path
) -> None:
    opened = Opened(browser, four[1], tmp_path)
    place = shown_texts(opened.page)[0].index("huddle")
    word = opened.page.locator(f".word[data-start='{place}']")
    word.click()
    opened.press("5", "a", "2")
    assert json.loads(opened.save().read_text())["labels"]["1"] == {
        "status": "scored",
        "restarts": [place],
        "scores": [20, 50],
    }
    word.click()
    assert json.loads(opened.save().read_text())["labels"]["1"] == {"status": "scored", "restarts": [], "scores": [20]}
    opened.press("m", "9", "u")
    assert json.loads(opened.save().read_text())["labels"]["1"]["restarts"] == []
    opened.press("x", "-", "-")
    assert json.loads(opened.save().read_text())["labels"]["1"]["scores"] == [98]


def test_what_was_marked_is_still_there_after_a_reload_and_unfinished_ones_are_not_saved(
    browser: Browser, four: tuple[Path, DrawnSample], tmp_path: Path
) -> None:
    opened = Opened(browser, four[1], tmp_path)
    opened.press("n", "4", "n", "ArrowDown", "m", "7")  # the third has a mark, but no score of its first attempt
    opened.page.reload()
    assert opened.text("#place") == "3 of 4; 1 finished"
    assert opened.page.locator(".word.restart").count() == 1
    saved = json.loads(opened.save().read_text())
    assert list(saved["labels"]) == ["2"]
    assert "leaves out 1 unfinished" in opened.text("#notice")
    opened.press("e", "n", "q", "f")
    assert opened.text("#place") == "1 of 4; 3 finished"
    labels = json.loads(opened.save().read_text())["labels"]
    assert labels["3"] == {"status": "empty", "restarts": [], "scores": []}
    assert labels["4"]["status"] == "unscored"


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"steered": [[False, False]]}, texts=[HOSTILE, text_of(False)])
    sample = draw_sample(folder, 2, seed=0)
    opened = Opened(browser, sample, tmp_path)
    while HOSTILE not in shown_texts(opened.page)[int(opened.text("#place").split()[0]) - 1]:
        opened.press("n")
    page = opened.page
    assert page.title() == "Label responses: run"
    assert page.locator("#response img, #response script, #response b").count() == 0
    assert "<script>document.title='owned'</script>" in opened.text("#response")
    assert "U+202Egnp.exeU+202C" in opened.text("#response")
    assert "bellU+0007" in opened.text("#response")
    place = HOSTILE.index("Wait,")
    page.locator(f".word[data-start='{place}']").click()
    opened.press("8", "a", "1")
    import_labels(folder, opened.save(), "ann")
    with Run.read(folder) as run:
        (row,) = [r for r in run.ledger.rows(judge="human:ann") if r.judgement]
    assert row.judged_text == HOSTILE
    assert [HOSTILE[a.start : a.end].split()[0] for a in row.attempts][1] == "Wait,"
    assert not opened.errors
    assert [url for url in opened.requests if not url.startswith(("file:", "blob:"))] == []


def test_the_policy_of_the_page_stops_other_scripts_and_all_connections(
    browser: Browser, four: tuple[Path, DrawnSample], tmp_path: Path
) -> None:
    opened = Opened(browser, four[1], tmp_path)
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='http://127.0.0.1:9/x.png'>");
        }"""
    )
    reached = opened.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'yes', () => 'no')")
    assert opened.page.title() == "Label responses: run"
    assert reached == "no"
    assert sum("Content Security Policy" in error for error in opened.errors) >= 3
    assert {reason for url, reason in opened.refused if url.startswith("http")} == {"csp"}
    assert [url for url in opened.answered if url.startswith("http")] == []


def test_the_page_shows_neither_condition_nor_verdict(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"secret-arm": [[True, False]], "other-arm": [[False, True]]})
    sample = draw_sample(folder, 4, seed=1)
    for file in (sample.page, sample.spreadsheet):
        content = file.read_text("utf-8")
        assert SECOND.split(". ")[0] in content
        for word in ("secret-arm", "other-arm", "machine", "model/measure"):
            assert word not in content
    with Run.read(folder) as run:
        facts: Any = run.ledger.get("model", LABEL_SAMPLES)
    assert facts[sample.identifier].seed == 1
