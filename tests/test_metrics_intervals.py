"""Intervals against published values, closed forms, other libraries and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from steerback.metrics import Outcomes, summarize, wilson
from steerback.metrics import intervals as iv
from steerback.metrics.intervals import clopper_pearson, no_event_bound

few = settings(deadline=None, max_examples=60)


@few
@given(st.integers(0, 300), st.integers(1, 300), st.sampled_from([0.05, 0.01, 0.32]))
def test_wilson_and_clopper_pearson_equal_their_definitions(events, n, alpha) -> None:
    """Wilson: |x / n - p| = z sqrt(p (1 - p) / n) at both ends; Clopper-Pearson: tails of alpha / 2."""
    events = min(events, n)
    z = stats.norm.ppf(1 - alpha / 2)
    a, b, c = 1 + z**2 / n, -(2 * events / n + z**2 / n), (events / n) ** 2
    ends = [(-b + sign * np.sqrt(b**2 - 4 * a * c)) / (2 * a) for sign in (-1, 1)]
    assert wilson(events, n, alpha) == pytest.approx(ends, abs=1e-9)
    low, high = clopper_pearson(events, n, alpha)
    assert stats.binom.sf(events - 1, n, low) == pytest.approx(alpha / 2 if events else 1)
    assert stats.binom.cdf(events, n, high) == pytest.approx(alpha / 2 if events < n else 1)


@pytest.mark.parametrize(
    ("events", "n", "score", "exact"),
    [
        (81, 263, (0.2553, 0.3662), (0.2527, 0.3676)),
        (15, 148, (0.0624, 0.1605), (0.0578, 0.1617)),
        (0, 20, (0.0, 0.1611), (0.0, 0.1684)),
        (1, 29, (0.0061, 0.1718), (0.0009, 0.1776)),
    ],
)
def test_wilson_and_clopper_pearson_equal_the_published_table(events, n, score, exact) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I."""
    assert wilson(events, n) == pytest.approx(score, abs=5e-5)
    assert clopper_pearson(events, n) == pytest.approx(exact, abs=5e-5)


@few
@given(st.floats(0.001, 1), st.floats(0.5, 300), st.sampled_from([0.05, 0.01, 0.32]))
def test_wilson_and_clopper_pearson_of_fractions_equal_statsmodels(share, n, alpha) -> None:
    from statsmodels.stats.proportion import proportion_confint

    for interval, method in ((wilson, "wilson"), (clopper_pearson, "beta")):
        assert interval(share * n, n, alpha) == pytest.approx(proportion_confint(share * n, n, alpha, method), abs=1e-9)


def test_proportions_at_the_edges() -> None:
    for interval in (wilson, clopper_pearson):
        assert interval(0, 7)[0] == 0
        assert interval(7, 7)[1] == 1
        with pytest.raises(ValueError, match="at least one trial"):
            interval(0, 0)
    assert clopper_pearson(0.35, 1.0) == pytest.approx(
        (stats.beta.ppf(0.025, 0.35, 1.65), stats.beta.ppf(0.975, 1.35, 0.65))
    )


def test_no_event_bound_without_correlation_is_clopper_pearson_and_with_full_correlation_counts_latents() -> None:
    sizes = np.array([10.0, 20.0, 30.0])
    assert no_event_bound(sizes, icc=0) == pytest.approx(clopper_pearson(0, 60)[1])
    assert no_event_bound(sizes, icc=1e-9) == pytest.approx(clopper_pearson(0, 60)[1], rel=1e-4)
    assert no_event_bound(sizes, icc=1) == pytest.approx(clopper_pearson(0, 3)[1])
    assert no_event_bound(sizes, icc=0.9999) == pytest.approx(clopper_pearson(0, 3)[1], rel=1e-2)
    assert no_event_bound(np.array([])) == 1.0
    assert no_event_bound(np.ones(50)) == pytest.approx(clopper_pearson(0, 50)[1], rel=1e-6)  # nothing to correlate


@pytest.mark.parametrize(("m", "clusters", "icc"), [(10, 20, 0.1), (50, 8, 0.3), (3, 5, 0.05)])
def test_no_event_bound_equals_integration_over_the_latents_rates(m, clusters, icc) -> None:
    """At the bound, seeing nothing has probability 2.5 %: integral of (1 - q)^m over Beta(q), to the power C."""
    p = no_event_bound(np.full(clusters, float(m)), icc)
    scale = (1 - icc) / icc
    a, b = p * scale, (1 - p) * scale
    # substitution q = u^(1/a) removes the pole of the density at 0
    norm = integrate.quad(lambda u: (1 - u ** (1 / a)) ** (b - 1), 0, 1, limit=500)[0]
    top = integrate.quad(lambda u: (1 - u ** (1 / a)) ** (b - 1 + m), 0, 1, limit=500)[0]
    assert (top / norm) ** clusters == pytest.approx(0.025, rel=1e-4)


@few
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_no_event_bound_grows_with_correlation_and_lies_between_its_extremes(sizes, a, b) -> None:
    sizes = np.array(sizes, dtype=float)
    low, high = sorted((a, b))
    bounds = [no_event_bound(sizes, icc) for icc in (0, low, high, 1)]
    assert bounds == sorted(bounds) or np.allclose(bounds, sorted(bounds), atol=1e-6)


def rate(events_per_latent: list[int], sizes: list[int]) -> tuple[iv.Bounds, float]:
    """Interval and value of a rate given per-latent counts."""
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    num = np.concatenate([(np.arange(n) < e).astype(float) for e, n in zip(events_per_latent, sizes, strict=True)])
    p = num.mean()
    variance = iv.influence_variance((num - p) / len(num), cluster, np.ones(len(num), bool))
    return iv.rate_interval(num.sum(), np.array(sizes, float), variance), p


@few
@given(st.data())
def test_rate_intervals_are_symmetric_in_event_and_non_event(data) -> None:
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    events = [data.draw(st.integers(0, n)) for n in sizes]
    a, _ = rate(events, sizes)
    b, _ = rate([n - e for e, n in zip(events, sizes, strict=True)], sizes)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low), abs=1e-8)


@few
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.data())
def test_one_event_never_gives_a_lower_bound_than_none(sizes, data) -> None:
    nothing, _ = rate([0] * len(sizes), sizes)
    where = data.draw(st.integers(0, len(sizes) - 1))
    one, _ = rate([int(i == where) for i in range(len(sizes))], sizes)
    assert nothing.low == 0
    assert 0 < nothing.high <= one.high


def test_correlated_trials_widen_the_interval_and_independent_ones_reach_clopper_pearson() -> None:
    clumped, p = rate([20] * 10 + [0] * 40, [20] * 50)
    spread, q = rate([4] * 50, [20] * 50)
    assert p == q == 0.2
    assert clumped.high - clumped.low > 3 * (spread.high - spread.low)
    exact = clopper_pearson(200, 1000)
    assert spread.high - spread.low == pytest.approx(exact[1] - exact[0], rel=0.15)
    latents = clopper_pearson(10, 50)  # each latent is all or nothing, so it counts as one trial
    assert clumped.high - clumped.low == pytest.approx(latents[1] - latents[0], rel=0.15)


def test_clustered_variance_equals_statsmodels_cluster_robust_regression() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(5)
    cluster = np.repeat(np.arange(12), rng.integers(3, 20, 12))
    y = rng.normal(size=len(cluster)) + rng.normal(size=12)[cluster]
    found = iv.influence_variance((y - y.mean()) / len(y), cluster, np.ones(len(y), bool))
    fit = sm.OLS(y, np.ones(len(y))).fit(cov_type="cluster", cov_kwds={"groups": cluster, "use_correction": False})
    assert found.clustered == pytest.approx(float(fit.cov_params()[0, 0]) * 12 / 11)
    assert found.independent == pytest.approx(np.var(y, ddof=1) / len(y))
    assert found.clusters == 12


def test_equal_latents_of_one_trial_give_the_ordinary_t_interval() -> None:
    y = np.random.default_rng(1).normal(50, 20, 25)
    bounds = iv.mean_interval(
        y.mean(),
        np.ones(25),
        iv.influence_variance((y - y.mean()) / 25, np.arange(25), np.ones(25, bool)),
        25,
        25,
        (-np.inf, np.inf),
    )
    expected = stats.ttest_1samp(y, 0).confidence_interval(0.95)
    assert (bounds.low, bounds.high) == pytest.approx((expected.low, expected.high))


def test_resampled_sums_equal_a_loop_and_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(0).normal(size=(7, 3))
    whole = iv.resample_sums(sums, 50, np.random.default_rng(9))
    rng = np.random.default_rng(9)
    by_hand = np.array([sum(sums[i] for i in draw) for draw in rng.integers(0, 7, size=(50, 7))])
    assert whole == pytest.approx(by_hand)
    monkeypatch.setattr(iv, "BLOCK", 21)
    blocks = iv.resample_sums(sums, 50, np.random.default_rng(9))
    assert blocks == pytest.approx(by_hand)


def test_bootstrap_beside_equals_scipy_on_latents_of_equal_size() -> None:
    rng = np.random.default_rng(3)
    first = rng.uniform(0, 100, (40, 5))
    n = first.size
    ones = np.ones(n, int)
    outcomes = Outcomes(
        np.repeat(np.arange(40), 5), np.arange(n), 0 * ones, ones, first.ravel(), first.ravel(), ones, first.ravel(),
        first.ravel(), 0 * ones,
    )  # fmt: skip
    found = summarize(outcomes, draws=4000)["mean_first"].beside["bootstrap"]
    expected = stats.bootstrap(
        (first.mean(1),), np.mean, n_resamples=4000, method="percentile", random_state=4
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.6)


@pytest.mark.parametrize(("clusters", "p"), [(5, 0.1), (10, 0.02), (20, 0.1), (20, 0.3)])
def test_simulated_coverage_of_rates_is_at_least_93_percent(clusters, p) -> None:
    """Beta-binomial trials, ICC 0.1, 10 per latent (the full table is in docs/statistics.md)."""
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(300):
        q = rng.beta(p * 9, (1 - p) * 9, clusters)
        events = rng.binomial(10, q)
        bounds, _ = rate(list(events), [10] * clusters)
        hits += bounds.low <= p <= bounds.high
    assert hits / 300 >= 0.93


def test_expanded_percentile_of_a_mean_is_close_to_the_t_interval_and_the_plain_one_is_not() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(50, 20, 8)
    draws = iv.resample_sums(y[:, None], 20_000, rng)[:, 0] / 8
    expected = stats.ttest_1samp(y, 0).confidence_interval(0.95)
    width = expected.high - expected.low
    expanded, plain = (iv.percentile(draws, clusters=c) for c in (8, None))
    assert expanded[1] - expanded[0] == pytest.approx(width, rel=0.08)
    assert plain[1] - plain[0] < 0.85 * width
    assert iv.percentile(np.array([np.nan])) is None
