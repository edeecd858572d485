"""Viewer in a real browser: filter, open, hover, pin, link; hostile responses change nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chromium import HOSTILE, Opened, launched
from labelled import RESTART, make_run
from steerback.cli import main
from steerback.jobs.view import ViewSettings, write_view
from steerback.records import (
    Completion,
    Judgement,
    Receipt,
    Trial,
)
from steerback.report import view
from steerback.store.run import Run
from viewed import DETECTOR, WORDS, viewed_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return viewed_run(tmp_path_factory.mktemp("runs") / "seen")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    yield from launched()


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_view([folder], tmp_path_factory.mktemp("page") / "view.html")


def test_trials_can_be_filtered_sorted_and_searched(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trials")
    page = opened.page
    assert opened.text("#shown") == "7 of 7 trials"
    page.locator("[data-filter=condition]").select_option("ablated")
    assert opened.text("#shown") == "2 of 7 trials"
    page.locator("[data-filter=flags]").select_option("invalid")
    assert opened.text("#shown") == "1 of 7 trials"
    page.locator("#clear").click()
    page.locator("[data-filter=attempts]").fill(">= 2")
    assert opened.text("#shown") == "2 of 7 trials"
    page.locator("[data-filter=boost]").fill("20..40")
    assert opened.text("#shown") == "1 of 7 trials"
    assert "Why is the sky blue?" in opened.rows()[0]
    page.locator("#clear").click()
    page.locator("th[data-column=gain] button").click()
    assert page.locator("th[data-column=gain]").get_attribute("aria-sort") == "descending"
    assert "40" in opened.rows()[0]
    page.keyboard.press("/")
    page.keyboard.type("TUCK one corner")  # in the text of a response alone
    opened.until("document.getElementById('shown').textContent.startsWith('2 of')")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") != "search"
    assert not opened.errors


@pytest.mark.parametrize("view", ["#trials", "#overview"])
def test_letters_right_after_the_key_for_the_search_are_not_lost(browser: Browser, file: Path, view: str) -> None:
    opened = Opened(browser, file, view)
    press = "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: '/', bubbles: true }))"
    assert opened.page.evaluate(f"() => {{ {press}; return document.activeElement.id; }}") == "search"
    opened.page.keyboard.type("TUCK one corner")
    opened.until("document.getElementById('shown').textContent.startsWith('2 of')")
    assert not opened.errors


def test_keys_open_trials_and_go_to_the_next_and_back(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trials&condition=plain")
    page = opened.page
    assert opened.text("#shown") == "4 of 7 trials"
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("#response .band")
    assert page.url.endswith("#trial=model%2Fmeasure%2Fplain%2F1")
    page.keyboard.press("j")
    opened.until("location.hash.endsWith('plain%2F2')")
    page.keyboard.press("k")
    opened.until("location.hash.endsWith('plain%2F1')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#rows", state="visible")
    assert page.locator("tr.current").inner_text() == opened.rows()[1]
    assert not opened.errors


def test_keys_that_come_faster_than_the_page_are_all_counted(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trials&condition=plain")
    page = opened.page
    page.keyboard.press("Enter")
    page.wait_for_selector("#response")
    press = (
        "keys => keys.forEach(key => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true})))"
    )
    page.evaluate(press, ["j", "j", "k", "j", "Escape"])
    page.wait_for_selector("#rows", state="visible")
    opened.until("document.querySelector('tr.current')?.dataset.trial !== undefined")
    assert page.locator("tr.current").inner_text() == opened.rows()[2]
    assert not opened.errors


def test_a_link_opens_a_trial_with_attempts_receipt_verdicts_and_its_twin(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trial=model/measure/baseline/0")
    page = opened.page
    page.wait_for_selector("#comparison .card")
    bands = page.locator("#response .band")
    assert bands.count() == 3  # two attempts and the space between them
    assert bands.first.inner_text().startswith("attempt 1")
    assert "30/100" in bands.first.inner_text().replace("\n", "")
    assert bands.last.locator(".phrase").all_inner_texts() == ["Wait,", " that", " is", " not"]
    assert f"edited 3 of 3 prompt positions, {len(WORDS) - 1} of {len(WORDS)} generated tokens" in opened.text(
        ".receipt"
    )
    steered = page.locator("#response .token.steered").all_inner_texts()
    assert len(steered) == len(WORDS) - 1 + 1  # one is cut in two where the second attempt begins
    assert WORDS[-1] not in "".join(steered)
    assert "refuse" not in opened.text(".verdicts")
    page.locator(".verdicts summary").click()
    assert "I <b>refuse</b>" in opened.text(".verdicts")
    assert "unscored: the reply is no JSON" in opened.text(".verdicts")
    cards = page.locator("#comparison .card")
    assert [c.split("\n")[0] for c in cards.all_inner_texts()] == ["baseline", "ablated"]
    cards.last.locator("a").click()
    opened.until("location.hash.endsWith('ablated%2F0')")
    opened.until("document.querySelector('#view-trial h2').textContent.includes('ablated')")
    page.goto(opened.address + "#trial=model%2Fnothing")
    assert "There is no trial model/nothing" in opened.text("#view-trial")
    assert not opened.errors


def test_hover_shows_the_activation_of_a_token_and_a_click_pins_it(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trial=model/measure/baseline/0")
    page = opened.page
    page.wait_for_selector("#response .token")
    token = page.locator("#response [data-token='4']")
    token.hover()
    assert opened.text("#tip").split("\n") == ["␣ice.", f"token 5 of {len(WORDS)}, position 7", "7 penguins: 4"]
    shares = [
        float(t.evaluate("e => e.style.getPropertyValue('--share')").rstrip("%") or 0)
        for t in page.locator("#response [data-token]").all()[:6]
    ]
    largest = len(WORDS) - 2
    assert shares == pytest.approx([100 * n / largest for n in range(6)], abs=0.06)
    last = page.locator(f"#response [data-token='{len(WORDS) - 1}']")
    last.hover()
    assert "never fed back" in opened.text("#tip")
    wait = WORDS.index("Wait,")
    page.locator(f"#response [data-token='{wait}']").last.click()
    pinned = opened.text("#pinned")
    assert f"Token {wait + 1}" in pinned
    assert "40 notices errors: 2.5 (100 % of its maximum)" in pinned
    page.keyboard.press("ArrowRight")
    assert f"Token {wait + 2}" in opened.text("#pinned")
    assert page.locator("#marker-pin").get_attribute("x") == str((wait + 1) * 13)
    page.keyboard.press("Escape")
    assert opened.text("#pinned") == ""
    assert page.locator("#activations .names .name").all_inner_texts() == [
        "7 penguins\nmax " + str(largest),
        "40 notices errors\nmax 2.5",
    ]
    assert "1 recorded latent without activity" in opened.text("#activations")
    page.locator("#colour").select_option(str(DETECTOR))
    assert page.locator("#response .hot").all_inner_texts() in ([" ", "Wait,"], ["Wait,"])
    page.locator(".lines-chart svg").click(position={"x": 2 * 13 + 5, "y": 20})
    assert "Token 3" in opened.text("#pinned")
    assert not opened.errors


def test_recovery_is_a_filter_and_its_sentences_are_shown(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trials")
    page = opened.page
    options = page.locator("[data-filter=recovery] option").all_inner_texts()
    assert options == ["all", "none", "recovered", "too short"]
    page.locator("[data-filter=recovery]").select_option("recovered")
    assert opened.text("#shown") == "1 of 7 trials"
    page.keyboard.press("Escape")
    page.locator("#body tr[data-trial]").click()
    page.wait_for_selector(".windows")
    assert page.locator(".windows tr").count() == 5
    cells = page.locator(".windows tr").nth(1).locator("td").all_inner_texts()
    assert [cells[0], cells[-1]] == ["12.5", "They huddle when it is cold."]
    assert not opened.errors


def test_calibration_shows_boosts_curve_and_threshold(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#calibration")
    page = opened.page
    page.wait_for_selector(".latent-card")
    first, second = page.locator(".latent-card").all()
    assert "threshold 30.5 [27, 34]" in first.inner_text()
    assert "fresh trials 50" in first.inner_text()
    assert first.locator(".dot").count() == 5
    points = (first.locator(".curve").get_attribute("points") or "").split()
    heights = [float(p.split(",")[1]) for p in points]
    assert heights == sorted(heights)  # y grows downwards, so the score falls
    assert "the score stays above 50 up to the bound 60" in second.inner_text()
    assert not opened.errors


def test_overview_shows_rates_what_was_left_out_and_provenance(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file)
    page = opened.page
    page.wait_for_selector(".figures img")
    assert "multi-attempt %" in opened.text("#view-overview table")
    assert "invalid: the receipt does not match the plan" in opened.text("#view-overview")
    assert "1 of 2 latents without a usable threshold" in opened.text("#view-overview")
    page.locator("#view-overview a[href*='invalid']").click()
    page.wait_for_selector("#rows", state="visible")
    assert opened.text("#shown") == "1 of 7 trials"
    widths = page.evaluate("[...document.querySelectorAll('.figures img')].map((i) => i.naturalWidth)")
    assert all(width > 100 for width in widths)
    assert not opened.errors
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_hostile_text_stays_text(browser: Browser, tmp_path: Path) -> None:
    place = make_run(tmp_path / "run", {"<b>arm</b>": [[False, False]]}, texts=[HOSTILE, RESTART])
    with Run.reopen(place) as run:
        reply = Judgement("<i>judge", "r", "unscored", (), HOSTILE, HOSTILE)
        run.ledger.add_judgements([("model/measure/<b>arm</b>/0", reply)])
        trial = Trial("k<img src=x>", "model", "measure", HOSTILE, 9, HOSTILE, 1, "dir", HOSTILE)
        run.ledger.add_trials([trial])
        run.ledger.add_completions([(trial.key, Completion(HOSTILE, (1, 2), 3, "stop", Receipt()), "e")])
    opened = Opened(browser, write_view([place], tmp_path / "view.html"))
    page = opened.page
    for hash in ("#trials", "#trial=model/measure/%3Cb%3Earm%3C/b%3E/0", "#trial=k<img src=x>", "#calibration"):
        page.goto(opened.address + hash)
        page.wait_for_timeout(150)
        assert page.title() == "run: steerback"
        assert page.locator("img[src=x], #main script, #main b, #main i").count() == 0
    page.goto(opened.address + "#trial=model/measure/%3Cb%3Earm%3C/b%3E/0")
    page.wait_for_selector("#response .band")
    shown = opened.text("#response")
    assert "<script>document.title='owned'</script>" in shown
    assert "U+202Egnp.exeU+202C" in shown
    assert "bellU+0007" in shown
    assert "U+2028line" in shown
    assert not opened.errors
    assert [url for url in opened.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_policy_of_the_page_stops_other_scripts_and_all_connections(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file)
    opened.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<img src='http://127.0.0.1:9/x.png'>");
        }"""
    )
    reached = opened.page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'yes', () => 'no')")
    assert opened.page.title() == "seen: steerback"
    assert reached == "no"
    assert sum("Content Security Policy" in error for error in opened.errors) >= 3


def test_a_larger_run_is_sampled_with_its_twins_and_the_page_says_so(
    browser: Browser, folder: Path, tmp_path: Path
) -> None:
    small = write_view([folder], tmp_path / "view.html", ViewSettings(most_trials=4))
    opened = Opened(browser, small, "#trials")
    assert "A sample: " in opened.text("#sampled")
    assert " of 7 trials (the page holds at most 4 trials)" in opened.text("#sampled")
    found = json.loads(opened.page.locator("#data").text_content() or "")["trials"]["columns"]
    assert 2 <= len(found["key"]) <= 4
    twins = {"model/measure/baseline/0", "model/measure/ablated/0"}
    assert len(twins & set(found["key"])) in (0, 2)
    assert small.read_text("utf-8") == write_view([folder], small, ViewSettings(most_trials=4)).read_text("utf-8")


def test_several_runs_share_a_page(browser: Browser, folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", {"plain": [[True]]})
    opened = Opened(browser, write_view([folder, other], tmp_path / "both.html"), "#trials&run=other")
    assert opened.text("#shown") == "1 of 8 trials"
    assert opened.page.locator("[data-filter=run] option").all_inner_texts() == ["all", "other", "seen"]
    assert opened.page.locator("[data-filter=target]").count() == 0  # both have the same
    opened.page.goto(opened.address + "#trial=other:model/measure/plain/0")
    opened.page.wait_for_selector("#response .band")
    assert opened.text("#response").count("attempt") == 2


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(scheme: str) -> None:
    css = (Path(view.__file__).parent / "view.css").read_text("utf-8")
    colours: dict[str, str] = {}
    for part in css.split("@media print")[0].split(":root {")[1 : 2 if scheme == "light" else 3]:
        found = re.findall(r"--([\w]+): (#[0-9a-f]{6})", part.split("}")[0])
        colours.update(found)
    text = ["ink", "quiet", "link", "warn", "good", "a0", "a1", "a2", "a3"]
    pairs = [(name, ground) for name in text for ground in ("paper", "card")]
    pairs += [("ink", "soft"), ("quiet", "soft"), ("ink", "heat"), ("paper", "ink")]
    for name, ground in pairs:
        lights = sorted(luminance(colours[c]) for c in (name, ground))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5, (name, ground)


def test_focus_is_visible_and_dark_mode_and_print_have_their_styles(browser: Browser, file: Path) -> None:
    opened = Opened(browser, file, "#trials")
    page = opened.page
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(media="print", color_scheme="light")
    assert not page.locator("header nav").is_visible()
    assert page.locator("#body").is_visible()
    assert not opened.errors


def test_the_command_says_where_the_page_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["view", str(folder)])
    assert stopped.value.code == 0
    assert str(folder / "view.html") in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["view", str(folder), "--trial", "x"])
    assert stopped.value.code == 2
    assert "add --record" in capsys.readouterr().err
