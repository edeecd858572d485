"""Rates and MSI against brute force over judgements, and the inputs that they depend on."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.metrics import METRICS, VALID, VARIANTS, Outcomes, Summary, cluster_code, outcome_of, summarize
from steerback.metrics.outcomes import EMPTY, INVALID, UNSCORED
from steerback.metrics.rates import counts
from steerback.records import Attempt, Judgement, is_degraded

REPEATED = "word word word word word"


def judged(*attempts: tuple[float, bool]) -> Judgement:
    """Attempts of ten characters each: (score, gated)."""
    spans = tuple(
        Attempt(10 * i, 10 * i + 10, score, "" if i == 0 else "wait", gated or i == 0)
        for i, (score, gated) in enumerate(attempts)
    )
    return Judgement("test", "test-1", "scored", spans)


def from_texts(rows, cut=()) -> Outcomes:
    """Outcomes of (latent key, pair, trial ok, judgement, text of the response)."""
    return Outcomes.from_rows([(*row[:4], is_degraded(row[4])) for row in rows], cut)


UNJUDGED = Judgement("test", "test-1", "unscored", reason="no reply")
CLARIFYING = Judgement("test", "test-1", "empty")

scores = st.integers(0, 100).map(float)
judgements = st.one_of(
    st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=4).map(lambda a: judged(*a)),
    st.sampled_from([UNJUDGED, CLARIFYING, None]),
)
trials = st.tuples(st.integers(0, 4), st.booleans() | st.just(True), judgements, st.sampled_from(["fine", REPEATED]))
conditions = st.lists(trials, max_size=30).map(
    lambda rows: [(latent, pair, ok, judgement, text) for pair, (latent, ok, judgement, text) in enumerate(rows)]
)
few = settings(deadline=None, max_examples=60)


def brute_force(rows, gated: bool, include_degraded: bool) -> dict[str, float | None]:
    """The definitions, one trial at a time."""
    attempts, firsts, gains, multi_gains, improved, degraded = [], [], [], [], [], []
    for _, _, ok, judgement, text in rows:
        if not ok or judgement is None or judgement.status != "scored":
            continue
        degraded.append(text == REPEATED)
        if text == REPEATED and not include_degraded:
            continue
        seen = judgement.gated_attempts() if gated else judgement.attempts
        attempts.append(len(seen))
        firsts.append(seen[0].score)
        gain = seen[-1].score - seen[0].score
        gains.append(gain)
        if len(seen) >= 2:
            multi_gains.append(gain)
            improved.append(gain > 0)

    def mean(values: list) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "multi_attempt_rate": mean([a >= 2 for a in attempts]),
        "esr_rate": sum(improved) / len(attempts) if attempts else None,
        "improvement_rate": mean(improved),
        "msi": mean(gains),
        "msi_multi": mean(multi_gains),
        "mean_attempts": mean(attempts),
        "mean_first": mean(firsts),
        "degraded_share": mean(degraded),
    }


def values(summary: Summary, variant: str) -> dict[str, float | None]:
    return {name: e.value for name, e in getattr(summary, variant).items()}


@few
@given(conditions)
def test_every_metric_equals_a_loop_over_the_judgements(rows) -> None:
    summary = summarize(from_texts(rows), draws=20)
    for variant, (gated, include_degraded) in VARIANTS.items():
        expected = brute_force(rows, gated, include_degraded is not False)
        assert set(expected) == set(METRICS)
        assert values(summary, variant) == pytest.approx(expected, abs=1e-9), variant


@few
@given(conditions)
def test_intervals_hold_the_value_are_never_a_point_and_json_has_no_nan(rows) -> None:
    summary = summarize(from_texts(rows), draws=20)
    json.dumps(summary.to_json(), allow_nan=False)
    for variant in VARIANTS:
        for name, e in getattr(summary, variant).items():
            if e.value is None:
                assert (e.low, e.high, e.n) == (None, None, 0)
            elif e.low is not None and e.high is not None:
                assert METRICS[name].limits[0] <= e.low <= e.value <= e.high <= METRICS[name].limits[1]
                assert e.low < e.high, name


@few
@given(conditions, st.randoms(use_true_random=False))
def test_order_of_trials_and_names_of_latents_do_not_matter(rows, random) -> None:
    shuffled = [(100 - latent, *rest) for latent, *rest in rows]
    random.shuffle(shuffled)
    a, b = summarize(from_texts(rows), draws=0), summarize(from_texts(shuffled), draws=0)
    assert a.counts == b.counts
    for name, e in a.headline.items():
        f = b.headline[name]
        assert (e.value, e.low, e.high) == pytest.approx((f.value, f.low, f.high), abs=1e-9)


@few
@given(
    conditions, st.integers(1, 9), st.sampled_from([(True, UNJUDGED), (True, CLARIFYING), (False, judged((5, True)))])
)
def test_unscored_empty_and_invalid_trials_change_counts_only(rows, extra, kind) -> None:
    ok, judgement = kind
    more = rows + [(i, 1000 + i, ok, judgement, "fine") for i in range(extra)]
    a, b = summarize(from_texts(rows), draws=0), summarize(from_texts(more), draws=0)
    assert a.headline == b.headline
    assert b.counts["planned"] == a.counts["planned"] + extra
    assert b.counts["valid"] == a.counts["valid"]
    states = ("valid", "empty", "unscored", "invalid")
    assert sum(b.counts[s] for s in states) == b.counts["planned"]


@few
@given(conditions)
def test_gating_never_adds_attempts(rows) -> None:
    outcomes = from_texts(rows)
    assert np.all(outcomes.attempts <= outcomes.ungated_attempts)
    summary = summarize(outcomes, draws=0)
    for name in ("multi_attempt_rate", "mean_attempts"):
        gated, ungated = summary.headline[name].value, summary.ungated[name].value
        assert gated is None or ungated is None or gated <= ungated + 1e-12


@few
@given(
    conditions, st.lists(st.lists(st.tuples(scores, st.just(True)), min_size=1, max_size=3), min_size=30, max_size=30)
)
def test_worst_case_holds_whatever_the_unscored_would_have_been(rows, verdicts) -> None:
    summary = summarize(from_texts(rows), draws=0)
    filled = [
        (latent, pair, ok, judged(*verdict) if judgement is None or judgement.status == "unscored" else judgement, text)
        for (latent, pair, ok, judgement, text), verdict in zip(rows, verdicts, strict=False)
    ]
    after = summarize(from_texts(filled), draws=0)
    for variant in VARIANTS:
        for name, (low, high) in summary.worst_case[variant].items():
            value = getattr(after, variant)[name].value
            if value is None:
                continue
            conditional = name in ("improvement_rate", "msi_multi") and low is None
            assert conditional or low <= value + 1e-9, name
            assert high is None or value <= high + 1e-9, name


def test_a_hand_computed_condition() -> None:
    rows = [
        (7, 0, True, judged((20, True), (80, True)), "fine"),  # +60
        (7, 1, True, judged((50, True), (30, True)), "fine"),  # -20
        (7, 2, True, judged((90, True)), "fine"),
        (9, 3, True, judged((40, True), (60, False)), "fine"),  # gated: one attempt of score 50
        (9, 4, True, judged((10, True), (95, True)), REPEATED),  # degraded: +85
        (9, 5, True, UNJUDGED, "fine"),
        (9, 6, True, CLARIFYING, "fine"),
        (9, 7, False, judged((0, True)), "fine"),
    ]
    assert "cut" not in summarize(from_texts(rows), draws=0).counts  # not known
    cut = [1, 0, 1, 0, 1, 1, 0, 0]  # of the sound and valid ones: two
    s = summarize(replace(from_texts(rows, cut), include_degraded=False), draws=50)
    assert s.counts == {"planned": 8, "valid": 5, "empty": 1, "unscored": 1, "invalid": 1, "degraded": 1, "cut": 2}
    assert values(s, "headline") == pytest.approx(
        {
            "multi_attempt_rate": 2 / 4,
            "esr_rate": 1 / 4,
            "improvement_rate": 1 / 2,
            "msi": 40 / 4,
            "msi_multi": 20,
            "mean_attempts": 6 / 4,
            "mean_first": (20 + 50 + 90 + 50) / 4,
            "degraded_share": 1 / 5,
        }
    )
    assert s.with_degraded["msi"].value == pytest.approx((40 + 85) / 5)
    assert s.ungated["msi"].value == pytest.approx((40 + 20) / 4)
    assert s.ungated["mean_first"].value == pytest.approx((20 + 50 + 90 + 40) / 4)
    assert s.worst_case["headline"]["multi_attempt_rate"] == (2 / 5, 3 / 5)
    assert s.worst_case["headline"]["msi"] == ((40 - 100) / 5, (40 + 100) / 5)
    assert s.worst_case["headline"]["mean_attempts"] == (7 / 5, None)
    assert s["msi"].clusters == 2
    assert s["msi"].n == 4
    assert s.other == s.with_degraded
    both = summarize(from_texts(rows, cut), draws=50)
    assert (both.headline, both.other, both.counts["cut"]) == (s.with_degraded, s.headline, 3)


@few
@given(st.text(alphabet="ab \n\t\u00a0\u2003\x1f", max_size=40), st.integers(1, 7))
def test_degraded_means_five_identical_words_in_a_row(text, times) -> None:
    pattern = re.compile(r"(?<!\S)(\S{2,})(?:\s+\1){4,}(?!\S)")
    for candidate in (text, text + " a" * times, " aa" * times + text):
        assert is_degraded(candidate) == (pattern.search(candidate) is not None)


def test_outcome_of_names_every_state() -> None:
    one = judged((30, True), (70, True))
    assert outcome_of(True, one, False) == (VALID, 2, 30, 70, 2, 30, 70, False)
    assert outcome_of(True, one, True).degraded
    for ok, judgement, state in ((False, one, INVALID), (True, None, UNSCORED), (True, UNJUDGED, UNSCORED)):
        outcome = outcome_of(ok, judgement, False)
        assert outcome.state == state
        assert outcome.attempts == 0
        assert math.isnan(outcome.first)
    assert outcome_of(True, CLARIFYING, False).state == EMPTY
    assert outcome_of(True, judged((float("nan"), True)), False).state == UNSCORED


def test_impossible_arrays_are_refused() -> None:
    good = from_texts([(1, 0, True, judged((5, True)), "x")])
    columns = {f.name: getattr(good, f.name) for f in fields(good)}
    for name, bad in (("first", [np.nan]), ("attempts", [0]), ("pair", [1, 2]), ("ungated_last", [np.inf])):
        with pytest.raises(ValueError):
            Outcomes(**(columns | {name: np.array(bad)}))


def test_latent_codes_are_stable_and_apart() -> None:
    assert cluster_code(17) == 17
    assert cluster_code("cats") == cluster_code("cats") < -1
    assert len({cluster_code(k) for k in (None, 0, 1, "0", "1", "cats", "dogs")}) == 7
    with pytest.raises(Exception, match="negative"):
        cluster_code(-3)


@pytest.mark.parametrize("rows", [[], [(1, 0, True, UNJUDGED, "x")], [(1, 0, False, None, "")]])
def test_no_valid_trial_gives_none_everywhere(rows) -> None:
    summary = summarize(from_texts(rows))
    assert all(e.value is None and e.low is None and e.high is None for e in summary.headline.values())


def test_one_latent_is_honest() -> None:
    rows = [(3, i, True, judged((50, True), (60, True)) if i % 4 == 0 else judged((50, True)), "x") for i in range(400)]
    summary = summarize(from_texts(rows))
    rate = summary["multi_attempt_rate"]
    assert rate.value == 0.25
    assert rate.high - rate.low > 0.8, "400 trials of one latent say little about latents"
    assert summary["msi"].low is None


def test_concat_and_take() -> None:
    a = from_texts([(1, 0, True, judged((5, True)), "x"), (2, 1, True, judged((9, True)), "x")])
    both = Outcomes.concat([a, a.take(np.array([1]))])
    assert list(both.first) == [5, 9, 9]
    assert len(Outcomes.concat([])) == 0
    assert counts(both)["valid"] == 3
