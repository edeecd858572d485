"""Progress: one line per stage, an estimate for the whole run, and no estimate before a rate is known."""

from __future__ import annotations

import io

import pytest

from steerback.store import progress
from steerback.store.progress import Plain


class Clock:
    """Clock that tests set by hand."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(shown: io.StringIO) -> list[str]:
    return shown.getvalue().splitlines()


def test_stages_say_rate_and_time_left_and_the_whole_run_says_at_most_how_long(clock: Clock) -> None:
    shown = io.StringIO()
    display = Plain(shown, every=10)
    display.expect(1000)
    display.stage("a: references", 100)
    clock.now += 0.5
    display.update(generated=5)
    assert lines(shown) == ["a: references: 0/100"]
    clock.now += 9.5
    display.update(generated=15, invalid=1)
    assert lines(shown)[1:] == ["a: references: 20/100, 2.0/s, 40 s left, 1 invalid, whole run: at most 8 min left"]
    clock.now += 10
    display.update(generated=80)
    assert lines(shown)[2] == "a: references: 100/100, 5.0/s in 20 s, 1 invalid, whole run: at most 3 min left"


def test_rounds_are_one_stage_and_a_stage_that_comes_again_counts_once(clock: Clock) -> None:
    shown = io.StringIO()
    display = Plain(shown, every=10)
    display.expect(50)
    for number in (1, 2, 3):
        display.stage(f"a: calibration round {number}/3", 10)
        clock.now += 4
        display.update(generated=10)
    assert lines(shown) == [
        "a: calibration: round 1/3, 0",
        "a: calibration: round 3/3, 30, 2.5/s, whole run: at most 8 s left",
    ]
    display.stage("a: references", 10)
    display.update(generated=10)
    for _ in range(3):
        display.stage("a: references", 10, 10)
    clock.now += 16
    display.stage("a: steered", 10)
    clock.now += 1
    display.update(generated=5)
    display.update(generated=4)
    assert display.overall() == "whole run: at most 1 s left"


def test_nothing_is_estimated_before_a_rate_is_known(clock: Clock) -> None:
    display = Plain(io.StringIO())
    display.expect(10)
    display.stage("a", 10)
    display.update(generated=1)
    assert (display.counts(), display.overall()) == ("1/10", "")


def test_a_stage_beside_another_counts_for_the_whole_run_only(clock: Clock) -> None:
    shown = io.StringIO()
    display = Plain(shown, every=10)
    display.expect(40)
    beside = display.beside()
    beside.stage("a: floor", 20, 5)
    display.stage("a: steered", 20)
    clock.now += 10
    beside.update(generated=5)
    display.update(generated=10, invalid=1)
    assert lines(shown) == [
        "a: floor: 15 responses, beside the next stage",
        "a: steered: 0/20",
        "a: steered: 10/20, 1.0/s, 10 s left, 1 invalid, whole run: at most 13 s left",
    ]
