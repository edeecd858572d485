"""Region comparisons against scipy, loops and simulation."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steerback.metrics.regions import (
    auc_of,
    cliffs_delta,
    cohens_d,
    correct_regions,
    mean_of,
    of_means,
    paired_regions,
    rate_of,
    ratio_of,
    separate_regions,
)
from test_metrics_paired import holm_by_definition

few = settings(deadline=None, max_examples=40)
numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=25)


@few
@given(numbers, numbers)
def test_cliffs_delta_equals_counting_pairs(a, b) -> None:
    ours = cliffs_delta(np.array(a), np.array(b))
    counted = sum(np.sign(y - x) for x in a for y in b) / (len(a) * len(b))
    assert ours == pytest.approx(counted)


def two_samples(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(8), 5)
    a = rng.gamma(2, 2, 40)
    return a, a * 1.4 + rng.normal(0, 1, 40) + rng.normal(0, 1, 8)[cluster], cluster


def test_paired_tests_equal_scipy() -> None:
    a, b, cluster = two_samples()
    found = paired_regions(a, b, cluster)
    assert found.rank_p == pytest.approx(stats.wilcoxon(b, a).pvalue)
    assert found.t_p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    per_latent = (b - a).reshape(8, 5).mean(1)
    flips = stats.permutation_test(
        (per_latent, np.zeros(8)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=np.inf,
    ).pvalue  # fmt: skip
    assert found.p == pytest.approx(flips)
    assert found.low < found.difference < found.high


def test_separate_tests_equal_scipy() -> None:
    a, b, cluster = two_samples()
    b, other = b[:25], cluster[:25] + 3
    found = separate_regions(a, cluster, b, other, draws=500)
    assert found.rank_p == pytest.approx(stats.mannwhitneyu(b, a).pvalue)
    assert found.t_p == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue)
    pooled = np.sqrt((39 * a.var(ddof=1) + 24 * b.var(ddof=1)) / 63)
    assert found.cohens_d == cohens_d(a, b) == pytest.approx((b.mean() - a.mean()) / pooled)
    assert (found.n_a, found.n_b, found.clusters) == (40, 25, 8)


def test_repeats_within_a_latent_do_not_make_evidence() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 6), rng.normal(0.8, 1, 6)
    cluster = np.repeat(np.arange(6), 50)
    found = paired_regions(a[cluster], b[cluster], cluster)
    assert found.t_p < 1e-10
    assert found.p >= 2 / 2**6
    assert found.p == paired_regions(a, b, np.arange(6)).p


def test_holm_over_regions_equals_its_definition() -> None:
    tests = {str(i): paired_regions(*two_samples(i)) for i in range(3)}
    done = correct_regions(tests).values()
    for kind, corrected in (("p", "holm"), ("t_p", "t_holm"), ("rank_p", "rank_holm")):
        expected = holm_by_definition([getattr(t, kind) for t in tests.values()])
        assert [getattr(t, corrected) for t in done] == pytest.approx(expected)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("a", "b"),
    [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 1.0]), ([np.nan, 1], [2, np.nan]), ([0.0, 0], [1.0, 2]), ([3], [3])],
)
def test_thin_samples_give_none_instead_of_a_crash_or_nan(a, b, paired) -> None:
    x, y, cluster = np.array(a, float), np.array(b, float), np.arange(len(a))
    found = paired_regions(x, y, cluster) if paired else separate_regions(x, cluster, y, cluster, draws=50)
    numbers = [v for v in asdict(correct_regions({"x": found})["x"]).values() if isinstance(v, float)]
    assert not np.any(np.isnan(numbers))


def test_means_rates_and_ratios_hold_their_value() -> None:
    a, b, cluster = two_samples(3)
    mean, share, ratio = (
        mean_of(a, cluster),
        rate_of((a > 3).astype(float), cluster),
        ratio_of(b, cluster, a, cluster, 300),
    )
    assert mean.value == pytest.approx(a.mean())
    assert share.value == pytest.approx(np.mean(a > 3))
    assert ratio.value == pytest.approx(b.mean() / a.mean())
    for e in (mean, share, ratio):
        assert e.low < e.value < e.high
    assert rate_of(np.zeros(40), cluster).high > 0
    assert ratio_of(b, cluster, a * 0, cluster, 50).value is None


def test_mean_of_one_value_per_latent_is_the_t_interval() -> None:
    y = np.random.default_rng(1).normal(5, 2, 20)
    found = mean_of(y, np.arange(20))
    expected = stats.ttest_1samp(y, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_auc_interval_covers_and_is_never_a_point() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    truth = stats.norm.cdf(1 / np.sqrt(2 * 1.5))
    for i in range(200):
        cluster = np.repeat(np.arange(20), 4)
        shared = rng.normal(0, np.sqrt(0.5), (2, 20))
        a, b = shared[0][cluster] + rng.normal(size=80), 1 + shared[1][cluster] + rng.normal(size=80)
        found = auc_of(a, b, cluster, 200, seed=i)
        assert found.value == pytest.approx(stats.mannwhitneyu(b, a).statistic / 6400)
        hits += found.low <= truth <= found.high
    assert hits / 200 >= 0.9
    sure = auc_of(np.zeros(20), np.ones(20), np.arange(20), 100)
    assert (sure.value, sure.high) == (1, 1)
    assert 0.5 < sure.low < 0.95


def test_bootstrap_of_means_equals_resampling_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b, cluster = rng.gamma(2, 1, 60), rng.gamma(3, 1, 60), np.repeat(np.arange(12), 5)
    found = of_means([(a, cluster), (b, cluster)], lambda m: m[..., 1] / m[..., 0], 4000)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(cluster == k) for k in rng.integers(0, 12, 12)])
        drawn.append(b[rows].mean() / a[rows].mean())
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 11) * np.sqrt(12 / 11))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])), abs=0.04)
