"""Rates corrected for the judge's error: closed forms, limits, and simulation against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.metrics import Outcomes, summarize
from steerback.metrics.correction import (
    LabelledTrials,
    corrected_difference,
    corrected_rate,
    judge_quality,
    normal_interval,
    rogan_gladen,
)

NAN = np.nan


def plain_rate(cluster: np.ndarray, event: np.ndarray) -> tuple[float, float, float]:
    """The rate of these trials with its interval, as a table without labels shows it."""
    attempts = np.where(event, 2, 1)
    zero, score = np.zeros(len(event), int), np.full(len(event), 50.0)
    outcomes = Outcomes(
        cluster, np.arange(len(event)), zero, attempts, score, score, attempts, score, score, zero.astype(bool)
    )
    e = summarize(outcomes, 10)["multi_attempt_rate"]
    return e.value, e.low, e.high  # type: ignore[return-value]


def run(seed: int, rate: float, recall: float, floor: float, labels: int, n: int = 500) -> LabelledTrials:
    """A run of n trials of 50 latents; half of the labels from either verdict, as far as they last."""
    rng = np.random.default_rng(seed)
    cluster = np.arange(n) % 50
    truth = rng.random(n) < rng.beta(rate * 9, (1 - rate) * 9, 50)[cluster]
    verdict = rng.random(n) < np.where(truth, recall, floor)
    yes, no = np.flatnonzero(verdict), np.flatnonzero(~verdict)
    taken = min(len(yes), max(labels // 2, labels - len(no)))
    chosen = np.concatenate([rng.permutation(yes)[:taken], rng.permutation(no)[: labels - taken]])
    known = np.full(n, NAN)
    known[chosen] = truth[chosen]
    return LabelledTrials.of(cluster, verdict, verdict, known)


# 100 trials: 20 that the judge flags, of which 10 are labelled (8 true), and 80 others, 16 labelled (2 true)
VERDICT = np.arange(100) < 20
TRUTH = np.full(100, NAN)
TRUTH[:10] = [1] * 8 + [0] * 2
TRUTH[20:36] = [1] * 2 + [0] * 14
HAND = LabelledTrials.of(np.arange(100) % 10, VERDICT, VERDICT, TRUTH)


def test_rate_precision_and_recall_of_a_run_computed_by_hand() -> None:
    # true: 20 x 8/10 = 16 and 80 x 2/16 = 10
    assert corrected_rate(HAND).value == pytest.approx(0.26)
    quality = judge_quality([HAND])
    assert quality.precision.value == pytest.approx(16 / 20)
    assert quality.recall.value == pytest.approx(16 / 26)
    assert quality.false_positives.value == pytest.approx(4 / 74)
    assert (quality.labels, quality.restarts) == (26, 10)
    se, sp = 16 / 26, 70 / 74
    assert rogan_gladen(HAND, [HAND]).value == pytest.approx((0.20 + sp - 1) / (se + sp - 1))
    assert rogan_gladen(HAND, [HAND]).value == pytest.approx(0.26)  # one condition: the two estimates are one


def test_rogan_gladen_applies_the_errors_of_all_conditions_to_one_without_labels() -> None:
    verdict = np.arange(50) < 20
    other = LabelledTrials.of(np.arange(50) % 10, verdict, verdict, np.full(50, NAN))
    se, sp = 16 / 26, 70 / 74
    assert rogan_gladen(other, [HAND, other]).value == pytest.approx((0.40 + sp - 1) / (se + sp - 1))
    assert corrected_rate(other).value is None
    assert corrected_rate(other).method == "no labels"


def test_the_prediction_powered_mean_of_a_judge_that_did_not_draw_the_strata() -> None:
    # two strata of 10; in the first the judge says yes 4 times, in the second never
    stratum = np.repeat([1, 0], 10)
    verdict = np.array([1] * 4 + [0] * 16)
    truth = np.full(20, NAN)
    truth[[0, 1]] = [1, 0]  # yes: half true
    truth[[4, 5, 6]] = [1, 0, 0]  # no, in the first stratum: a third true
    truth[[10, 11]] = [0, 0]
    trials = LabelledTrials.of(np.arange(20) % 5, stratum, verdict, truth)
    assert corrected_rate(trials).value == pytest.approx((4 * 1 / 2 + 6 * 1 / 3 + 10 * 0) / 20)


def test_a_judge_that_makes_no_error_on_the_labels_keeps_its_rate() -> None:
    trials = run(1, 0.1, 1.0, 0.0, 100)
    judged = np.mean(trials.verdict)
    assert corrected_rate(trials).value == pytest.approx(judged)
    assert rogan_gladen(trials, [trials]).value == pytest.approx(judged)
    quality = judge_quality([trials])
    assert (quality.precision.value, quality.recall.value) == (1.0, 1.0)
    assert quality.recall.low is not None
    assert quality.recall.low < 0.9  # a restart may be among those that nobody labelled


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3, 1.0])
def test_with_labels_on_all_trials_the_rate_is_that_of_the_labels_whatever_the_judge_says(rate: float) -> None:
    rng = np.random.default_rng(3)
    cluster, truth = np.arange(400) % 40, rng.random(400) < rate
    verdict = rng.random(400) < 0.3
    e = corrected_rate(LabelledTrials.of(cluster, verdict, verdict, truth))
    value, low, high = plain_rate(cluster, truth)
    assert e.value == pytest.approx(value)
    assert e.low is not None
    assert e.high is not None
    assert e.low <= low + 0.01
    assert e.high >= high - 0.01
    assert (e.beside or {})["labels"] == pytest.approx((value, value))
    quality = judge_quality([LabelledTrials.of(cluster, verdict, verdict, truth)])
    if 0 < rate < 1:
        both = np.sum(verdict & truth)
        assert quality.precision.value == pytest.approx(both / verdict.sum())
        assert quality.precision.low == quality.precision.high == quality.precision.value
        assert quality.recall.value == pytest.approx(both / truth.sum())


def test_several_labellers_that_differ_count_as_their_mean() -> None:
    verdict = np.array([True] * 4 + [False] * 4)
    trials = LabelledTrials.of(np.arange(8), verdict, verdict, [1, 0.5, 0.5, 0, 0.5, 0, 0, 0])
    assert corrected_rate(trials).value == pytest.approx(2.5 / 8)


def test_one_label_that_contradicts_the_judge_moves_the_rate_by_its_weight() -> None:
    truth = TRUTH.copy()
    truth[25] = 1
    more = LabelledTrials.of(HAND.cluster, VERDICT, VERDICT, truth)
    assert corrected_rate(more).value == pytest.approx(0.26 + 80 / 16 / 100)


def test_no_restart_anywhere_still_leaves_an_upper_bound() -> None:
    verdict, truth = np.zeros(200, bool), np.full(200, NAN)
    truth[:50] = 0
    e = corrected_rate(LabelledTrials.of(np.arange(200) % 20, verdict, verdict, truth))
    assert (e.value, e.low) == (0.0, 0.0)
    assert e.high is not None
    assert 0.03 < e.high < 0.12  # 50 labels without a restart: 2.5 % are compatible with them, 7 % hardly


def test_what_cannot_be_corrected_says_why() -> None:
    truth = np.where(VERDICT, TRUTH, NAN)  # nothing labelled among the negative verdicts
    trials = LabelledTrials.of(HAND.cluster, VERDICT, VERDICT, truth)
    assert corrected_rate(trials).method == "a stratum has no labels"
    assert judge_quality([trials]).recall.value is None
    assert corrected_rate(HAND).value is not None
    assert corrected_difference(trials, HAND).method == "a stratum has no labels"
    worse = LabelledTrials.of(HAND.cluster, VERDICT, VERDICT, np.where(VERDICT, 0.0, 1.0))
    assert "no better than chance" in rogan_gladen(worse, [worse]).method


def test_the_normal_interval_is_that_of_the_closed_form_for_independent_trials() -> None:
    alone = LabelledTrials.of(np.arange(100), VERDICT, VERDICT, TRUTH)  # every trial a latent of its own
    p = np.where(VERDICT, 0.8, 0.125)
    weight = np.where(VERDICT, 2.0, 5.0)
    values = p + np.where(np.isnan(TRUTH), 0.0, weight * (np.nan_to_num(TRUTH) - p))
    half = 1.959964 * np.sqrt(np.var(values, ddof=1) / 100)
    assert normal_interval(alone) == pytest.approx((0.26 - half, 0.26 + half), rel=1e-5)


def test_difference_of_two_conditions_by_hand_and_where_all_is_labelled() -> None:
    assert corrected_difference(HAND, HAND).value == 0.0
    truth = np.arange(100) % 2
    other = LabelledTrials.of(HAND.cluster, VERDICT, VERDICT, truth)
    e = corrected_difference(HAND, other)
    assert e.value == pytest.approx(0.5 - 0.26)
    assert e.low is not None
    assert e.high is not None
    assert -1 <= e.low < 0.24 < e.high <= 1
    none = LabelledTrials.of(HAND.cluster, np.zeros(100), np.zeros(100), np.zeros(100))
    low, high = corrected_difference(none, none).low, corrected_difference(none, none).high
    assert low is not None
    assert high is not None
    assert -0.2 < low < 0 < high < 0.2  # never a point


@pytest.mark.parametrize(("recall", "floor"), [(0.6, 0.03), (0.95, 0.01)])
def test_the_corrected_rate_is_unbiased_and_its_interval_holds_the_truth(recall: float, floor: float) -> None:
    rate, runs = 0.05, 120
    found = [corrected_rate(run(seed, rate, recall, floor, 150), draws=500, seed=seed) for seed in range(runs)]
    values = np.array([e.value for e in found])
    assert abs(values.mean() - rate) < 3 * values.std() / np.sqrt(runs)
    held = np.mean([e.low <= rate <= e.high for e in found])  # type: ignore[operator]
    assert held >= 0.91  # 95 % within two standard errors of 120 runs


def test_the_corrected_difference_holds_the_truth() -> None:
    held = []
    for seed in range(100):
        a, b = run(seed, 0.08, 0.7, 0.03, 120), run(1000 + seed, 0.04, 0.7, 0.03, 120)
        e = corrected_difference(a, b, draws=500, seed=seed)
        held.append(e.low <= -0.04 <= e.high)  # type: ignore[operator]
    assert np.mean(held) >= 0.9


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_estimates_stay_within_their_limits_for_any_trials(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    cluster = data.draw(st.lists(st.integers(-5, 5), min_size=n, max_size=n))
    stratum, verdict = (data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(2))
    truth = data.draw(st.lists(st.sampled_from([NAN, 0.0, 0.5, 1.0]), min_size=n, max_size=n))
    trials = LabelledTrials.of(cluster, stratum, verdict, truth)
    for e in (corrected_rate(trials, 50), rogan_gladen(trials, [trials], 50)):
        if e.value is not None:
            assert 0 <= e.low <= e.value <= e.high <= 1  # type: ignore[operator]
    difference = corrected_difference(trials, trials, 50)
    if difference.value is not None:
        assert -1 <= difference.low <= difference.value <= difference.high <= 1  # type: ignore[operator]
    quality = judge_quality([trials], 50)
    for e in (quality.precision, quality.recall, quality.false_positives):
        if e.value is not None:
            assert 0 <= e.low <= e.value <= e.high <= 1  # type: ignore[operator]
