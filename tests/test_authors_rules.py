"""The package gives the same results as the authors' published rules in tools/authors_rules.py."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tools import authors_rules as rules

attempts = st.lists(st.none() | st.integers(0, 100), max_size=4)
verdicts = st.lists(attempts, min_size=1, max_size=30).map(
    lambda found: [{"attempts": [{"attempt_text": "", "score": score} for score in trial]} for trial in found]
)
active = st.floats(0.01, 100)


@settings(max_examples=100, deadline=None)
@given(verdicts)
def test_rates_are_those_of_their_plots(scores: list[rules.Score]) -> None:
    assert rules.rates(scores) < 1e-12


@settings(max_examples=5, deadline=None)
@given(st.lists(verdicts, min_size=2, max_size=3))
def test_files_of_one_model_are_pooled(files: list[list[rules.Score]]) -> None:
    assert rules.pooled(files) < 1e-12


@given(
    st.lists(st.sampled_from(["go", "go", "-", "stop", "\u2003"]), max_size=20).map(" ".join)
    | st.text("go -\n\x1c\u2003")
)
def test_degraded_responses_are_the_same(text: str) -> None:
    assert rules.degraded(text) == 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([0.3, 0.5]))
def test_thresholds_lie_within_a_step_of_the_grid(scores: list[float], target: float) -> None:
    assert rules.calibration(scores, target) <= 1.001


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.lists(active, min_size=1, max_size=8)] * 3), min_size=1, max_size=8),
    st.lists(st.lists(active, min_size=1, max_size=8), min_size=1, max_size=8),
)
def test_activity_by_region_and_its_ratios_are_the_same(
    parts: list[tuple[list[float], list[float], list[float]]], baselines: list[list[float]]
) -> None:
    episodes = [([*off, *fix, *on], len(off), len(off) + len(fix)) for off, fix, on in parts]
    assert rules.activity(episodes, baselines) < 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_their_rule_finds_the_same_detectors(seed: int) -> None:
    assert rules.random_detectors(random.Random(seed)) == 0


def test_the_table_in_the_docs_is_what_the_command_writes() -> None:
    held = rules.PAGE.read_text("utf-8").partition(rules.BEGIN)[2].partition(rules.END)[0].strip()
    assert held == rules.table()
