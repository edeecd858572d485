"""Paired comparisons against scipy, published examples and enumeration by hand."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steerback.metrics import VALID, Outcomes, compare, correct
from steerback.metrics.outcomes import EMPTY, INVALID, UNSCORED
from steerback.metrics.paired import COMPARED, holm, swap_test

few = settings(deadline=None, max_examples=40)


def made(first, last=None, attempts=None, cluster=None, pair=None, state=None, degraded=None) -> Outcomes:
    first = np.asarray(first, float)
    n = len(first)
    last = first if last is None else np.asarray(last, float)
    attempts = np.where(last != first, 2, 1) if attempts is None else np.asarray(attempts)
    cluster = np.arange(n) if cluster is None else np.asarray(cluster)
    pair = np.arange(n) if pair is None else np.asarray(pair)
    state = np.zeros(n, int) if state is None else np.asarray(state)
    degraded = np.zeros(n, bool) if degraded is None else np.asarray(degraded)
    return Outcomes(cluster, pair, state, attempts, first, last, attempts, first, last, degraded)


def random_pair(seed: int, latents: int = 9, per: int = 6, effect: float = 10) -> tuple[Outcomes, Outcomes]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(latents), per)
    out = []
    for shift, rate in ((0, 0.2), (effect, 0.45)):
        first = np.clip(rng.normal(50 + shift, 15, len(cluster)), 0, 100)
        multi = rng.random(len(cluster)) < rate
        last = np.where(multi, np.clip(first + rng.normal(10, 20, len(cluster)), 0, 100), first)
        out.append(made(first, last, np.where(multi, 2, 1), cluster))
    return out[0], out[1]


def holm_by_definition(pvalues: list[float]) -> list[float]:
    """Holm (1979), for each hypothesis: the largest of min(1, (m - number of smaller p) p) over all p up to its own."""
    ranked = sorted(pvalues)
    steps = [min(1.0, (len(ranked) - i) * p) for i, p in enumerate(ranked)]
    return [max(steps[: ranked.index(p) + 1]) for p in pvalues]


@few
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12, unique=True))
def test_holm_equals_its_definition_and_leaves_out_tests_that_could_not_be_made(pvalues) -> None:
    ours = holm(pvalues)
    assert [p is None for p in ours] == [p is None for p in pvalues]
    known = [p for p in pvalues if p is not None]
    assert [p for p in ours if p is not None] == pytest.approx(holm_by_definition(known))


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == [0.03, 0.06, None, 0.06, 0.02]
    assert holm([]) == []
    assert holm([None]) == [None]
    assert holm([0.5, 0.5, 0.5]) == [1.0, 1.0, 1.0]


def test_holm_equals_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    pvalues = [0.011, 0.2, 0.011, 0.7, 1.0, 0.0, 0.03]
    assert holm(pvalues) == pytest.approx(multipletests(pvalues, method="holm")[1].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_exact_p_equals_scipy_sign_flips_over_latents(seed) -> None:
    a, b = random_pair(seed, latents=8, per=5, effect=4)
    found = compare(a, b)["mean_first"]
    per_latent = (b.first - a.first).reshape(8, 5).mean(1)
    expected = stats.permutation_test(
        (per_latent, np.zeros(8)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert found.p == pytest.approx(expected)
    assert "all 2^8" in found.p_method


@pytest.mark.parametrize("metric", ["improvement_rate", "msi", "multi_attempt_rate"])
def test_exact_p_equals_swapping_by_hand(metric) -> None:
    """The whole latent changes sides with what it says about the difference, at the ratio of both together."""
    a, b = random_pair(3, latents=6, per=7)
    parts = []
    for side in (a, b):
        multi, gain = side.attempts >= 2, side.last - side.first
        top = {"improvement_rate": multi & (gain > 0), "msi": gain, "multi_attempt_rate": multi}[metric]
        parts.append((top.astype(float), (multi if metric == "improvement_rate" else np.ones(len(gain))).astype(float)))
    (top_a, under_a), (top_b, under_b) = parts
    r = (top_a.sum() + top_b.sum()) / (under_a.sum() + under_b.sum())
    residual = (top_b - r * under_b) / under_b.sum() - (top_a - r * under_a) / under_a.sum()
    found = compare(a, b)[metric]
    assert residual.sum() == pytest.approx(found.difference)
    hits = 0
    for flips in itertools.product([1, -1], repeat=6):
        hits += abs(np.sum(np.array(flips)[a.cluster] * residual)) >= abs(residual.sum()) - 1e-12
    assert found.p == pytest.approx(hits / 2**6)


@pytest.mark.parametrize("rate", [0.4, 0.1, 0.03])
def test_rates_of_few_events_do_not_differ_just_because_the_events_are_few(rate) -> None:
    """Equal improvement rates over unequal numbers of second attempts, as after an ablation: p <= 0.05 in 5 %."""
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(400):
        sums = []
        for level in (0.4, rate):
            multi = rng.binomial(20, np.clip(level * np.exp(rng.normal(0, 0.5, 12)), 0, 1))
            sums.append(np.stack([rng.binomial(multi, 0.55), multi], axis=1).astype(float))
        if sums[1][:, 1].sum():
            hits.append(swap_test(*sums)[0] <= 0.05)
    assert np.mean(hits) <= 0.08


def test_monte_carlo_agrees_with_enumeration_and_is_never_zero() -> None:
    a, b = random_pair(5, latents=11, effect=6)
    exact = compare(a, b)["mean_first"].p
    sums = [np.stack([np.bincount(s.cluster, s.first), np.bincount(s.cluster).astype(float)], 1) for s in (a, b)]
    drawn, method = swap_test(*sums, draws=20_000, exact_clusters=0)
    assert "20000 drawn" in method
    assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
    far = [np.stack([np.full(40, x), np.ones(40)], 1) for x in (0.0, 1.0)]
    assert swap_test(*far, draws=999)[0] == 1 / 1000


@few
@given(st.integers(0, 10_000))
def test_swapping_the_conditions_flips_signs_and_keeps_p(seed) -> None:
    a, b = random_pair(seed, latents=5, per=3)
    there, back = compare(a, b), compare(b, a)
    for name in COMPARED:
        t, u = there[name], back[name]
        assert t.p == u.p
        if t.difference is not None:
            assert (t.difference, t.low, t.high) == pytest.approx((-u.difference, -u.high, -u.low), abs=1e-9)
        if t.cohens_d is not None:
            assert t.cohens_d == pytest.approx(-u.cohens_d)
        if t.odds_ratio is not None:
            assert t.odds_ratio == pytest.approx(1 / u.odds_ratio)
    json.dumps(there.to_json(), allow_nan=False)


def test_false_positive_rate_under_the_null_stays_at_five_percent() -> None:
    """Latents differ strongly from each other, conditions do not: 400 experiments, p <= 0.05 in at most 7.5 %."""
    rng = np.random.default_rng(8)
    hits = 0
    for _ in range(400):
        level = np.repeat(rng.normal(50, 15, 9), 6)
        effect = [np.repeat(rng.normal(0, 10, 9), 6) + rng.normal(0, 5, 54) for _ in range(2)]
        a, b = (made(np.clip(level + e, 0, 100), cluster=np.repeat(np.arange(9), 6)) for e in effect)
        hits += compare(a, b, metrics=["mean_first"])["mean_first"].p <= 0.05
    assert hits / 400 <= 0.075


def test_pairs_are_matched_by_index_and_dropped_for_the_first_reason() -> None:
    n = 8
    cluster = np.arange(n)
    state_a = np.array([VALID, INVALID, UNSCORED, EMPTY, VALID, VALID, VALID, VALID])
    state_b = np.array([VALID, UNSCORED, VALID, VALID, EMPTY, VALID, VALID, VALID])
    scores = np.where(state_a == VALID, 50.0, 50.0)
    degraded = np.array([0, 0, 0, 1, 0, 1, 0, 0], bool)
    a = made(scores, cluster=cluster, state=state_a, degraded=degraded)
    shuffled = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    b = made(scores + 10, cluster=cluster, state=state_b).take(shuffled)
    b = Outcomes.concat([b, made([1.0], pair=[99], cluster=[99])])
    found = compare(a, b, include_degraded=False)
    assert found.pairs == 3
    assert found.dropped == {"unpaired": 1, "invalid": 1, "unscored": 1, "empty": 2, "degraded": 1}
    assert found["mean_first"].difference == 10
    assert compare(a, b).pairs == 4


def test_a_broken_pairing_is_refused() -> None:
    a = made([1.0, 2.0])
    with pytest.raises(ValueError, match="twice"):
        compare(a, made([1.0, 2.0], pair=[0, 0]))
    with pytest.raises(ValueError, match="different latents"):
        compare(a, made([1.0, 2.0], cluster=[0, 5]))


def test_no_difference_is_not_a_certain_zero() -> None:
    a, _ = random_pair(1, latents=20, per=10)
    found = compare(a, a)
    for name in COMPARED:
        t = found[name]
        assert (t.difference, t.p, t.informative) == (0, 1.0, 0)
        assert t.low < 0 < t.high
    assert 0.01 < found["multi_attempt_rate"].high < 0.1


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_compare(n) -> None:
    side = made([50.0] * n)
    found = compare(side, side)
    assert found.pairs == n
    json.dumps(found.to_json(), allow_nan=False)
    assert found["improvement_rate"].p is None
    if n == 1:
        assert found["mean_first"].low is None, "one latent says nothing about the spread"


def test_effect_sizes() -> None:
    a, b = random_pair(2)
    found = compare(a, b)
    per_latent = (b.first - a.first).reshape(9, 6).mean(1)
    assert found["mean_first"].cohens_d == pytest.approx(per_latent.mean() / per_latent.std(ddof=1))
    only_b, only_a = np.sum((b.attempts > 1) & (a.attempts < 2)), np.sum((a.attempts > 1) & (b.attempts < 2))
    assert found["multi_attempt_rate"].odds_ratio == pytest.approx((only_b + 0.5) / (only_a + 0.5))
    assert found["msi"].odds_ratio is None


def test_difference_of_one_trial_per_latent_is_the_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(20, 60, 30), rng.uniform(30, 80, 30)
    found = compare(made(x), made(y))["mean_first"]
    expected = stats.ttest_rel(y, x).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_holm_runs_within_metric_over_the_comparisons() -> None:
    a, b = random_pair(2)
    _, c = random_pair(7, effect=1)
    both = correct({"b": compare(a, b), "c": compare(a, c)})
    for name in COMPARED:
        expected = holm_by_definition([both[k][name].p for k in "bc"])
        assert [both[k][name].p_holm for k in "bc"] == pytest.approx(expected)
