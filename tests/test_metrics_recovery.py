"""Recovery from window scores: explicit examples and properties."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerback.metrics.recovery import Recovery, Rule, Series, Windows, recovery

HALF = Rule(early=0.5)
scores = st.lists(st.sampled_from([0.0, 25.0, 30.0, 50.0, 70.0, 100.0]), min_size=4, max_size=6)


def of(*series: list[float], single: bool = True, rule: Rule = HALF) -> Recovery:
    every = Series(Windows.of(series), np.arange(len(series)), np.full(len(series), single))
    return recovery(every, rule)


@pytest.mark.parametrize(
    ("series", "recovers"),
    [
        ([10, 20, 90, 95], True),
        ([95, 10, 90, 95], True),  # low anywhere in the early half
        ([30, 50, 70, 70], True),  # the thresholds themselves count
        ([31, 50, 90, 95], False),  # never off the prompt
        ([10, 20, 90, 69], False),  # not on the prompt to the end
        ([90, 95, 10, 95], False),  # low too late
        ([90, 95, 90, 95], False),
        ([10, 10, 10, 10], False),
    ],
)
def test_recovered_is_low_early_and_high_in_every_later_window(series: list[float], recovers: bool) -> None:
    assert Windows.of([series]).recovered(HALF).tolist() == [recovers]


@given(scores, st.sampled_from([0.3, 0.5, 0.67]))
def test_chance_is_the_share_of_all_orders_that_recover(series: list[float], early: float) -> None:
    rule = Rule(early=early)
    orders = Windows.of(permutations(series)).recovered(rule)
    assert Windows.of([series]).by_chance(rule)[0] == pytest.approx(np.mean(orders))


@given(st.lists(st.floats(0, 100), min_size=4, max_size=60), st.floats(0.01, 0.99))
def test_some_windows_are_early_and_some_late_whatever_the_share(series: list[float], early: float) -> None:
    rule = Rule(early=early)
    assert 1 <= rule.first_late(np.array([len(series)]))[0] < len(series)
    assert 0 <= Windows.of([series]).by_chance(rule)[0] <= 1


def test_shares_chance_and_silence() -> None:
    found = of([0, 0, 100, 100], [100, 100, 0, 0], [100] * 4, [0] * 4)
    assert found.recovered.value == 0.25
    assert found.shuffled.value == pytest.approx(2 * (1 / 6) / 4)  # two of 4 high, both late, in 1 of 6 orders
    assert found.above.value == pytest.approx(0.25 - 1 / 12)
    assert found.silent.value == 0.25
    loud = of([0, 0, 100, 100], single=False)
    assert (loud.recovered.value, loud.silent.value) == (1.0, 0.0)


def test_shuffled_responses_lie_on_their_chance() -> None:
    rng = np.random.default_rng(1)
    series = [rng.permutation([0.0, 10.0, 90.0, 90.0, 95.0, 100.0]) for _ in range(4000)]
    found = recovery(Series(Windows.of(series), np.arange(4000) % 50, np.ones(4000, dtype=bool)), HALF)
    assert found.above.low is not None
    assert found.above.high is not None
    assert found.above.low < 0 < found.above.high
    assert found.recovered.value == pytest.approx(found.shuffled.value, abs=0.02)


def test_short_responses_are_counted_and_left_out() -> None:
    found = of([0, 100], [0, 0, 100, 100])
    assert (found.n, found.short, found.recovered.value) == (1, 1, 1.0)
    nothing = of([0, 100])
    assert (nothing.n, nothing.recovered.value, nothing.course[0].value) == (0, None, None)


def test_the_time_course_is_the_mean_at_each_relative_position() -> None:
    windows = Windows.of([[0.0, 100.0], [0.0, 0.0, 100.0, 100.0], [50.0]])
    found = windows.course(np.arange(3), bins=4)
    assert [e.value for e in found] == pytest.approx([50 / 3, 50 / 3, 250 / 3, 250 / 3])
    assert all(e.low is not None and e.high is not None and 0 <= e.low <= e.high <= 100 for e in found)
