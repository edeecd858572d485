"""Measurements of responses and of their regions: means, medians and ratios with intervals, and two-sided tests.

Values belong to clusters (latents) and are correlated within a cluster. Intervals and the headline p account for that.
The t and rank tests of the paper's appendix A.7, which are also reported, treat every value as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.paired import holm, swap_test
from steerback.metrics.rates import Estimate, influence

INFINITE = (-np.inf, np.inf)
Sample = tuple[Floats, Codes]
"""Values and the cluster of each value, both (n,)."""


def mean_of(values: Floats, cluster: Codes, limits: tuple[float, float] = INFINITE) -> Estimate:
    """Return the mean of clustered values with the interval of `intervals.mean_interval`; nan values are left out."""
    values, codes = _present(values, cluster)
    n = len(values)
    if not n:
        return Estimate(None, None, None, 0, "no values")
    sizes, variance = _spread(values, codes)
    bounds = iv.mean_interval(float(values.mean()), sizes, variance, n, len(sizes), limits)
    return Estimate(float(values.mean()), bounds.low, bounds.high, n, bounds.method, n, len(sizes))


def rate_of(yes: Floats, cluster: Codes) -> Estimate:
    """Return the share of clustered 0/1 values with the interval of `intervals.rate_interval`; nan is left out."""
    yes, codes = _present(yes, cluster)
    if not len(yes):
        return Estimate(None, None, None, 0, "no values")
    sizes, variance = _spread(yes, codes)
    bounds = iv.rate_interval(float(yes.sum()), sizes, variance)
    return Estimate(float(yes.mean()), bounds.low, bounds.high, len(yes), bounds.method, int(yes.sum()), len(sizes))


def _spread(values: Floats, codes: Codes) -> tuple[Floats, iv.Influence]:
    """Return the sizes of the clusters and the variance of the mean."""
    ones = np.ones(len(values))
    variance = iv.influence_variance(influence(values, ones), codes, np.ones(len(values), dtype=bool))
    return iv.cluster_sums(codes, ones), variance


def median_of(values: Floats, cluster: Codes, draws: int, seed: int = 0) -> Estimate:
    """Return the median of clustered values with a bootstrap interval; nan values are left out."""
    values, codes = _present(values, cluster)
    if not len(values):
        return Estimate(None, None, None, 0, "no values")
    parts = [values[codes == k] for k in range(int(codes.max()) + 1)]
    chosen = np.random.default_rng(seed).integers(0, len(parts), (draws, len(parts)))
    drawn = np.array([np.median(np.concatenate([parts[k] for k in row])) for row in chosen])
    return _bootstrapped(float(np.median(values)), drawn, len(values), len(parts))


def of_means(samples: Sequence[Sample], statistic: Callable[[Floats], Floats], draws: int, seed: int = 0) -> Estimate:
    """Return a statistic of the means of clustered samples; nan values are left out.

    `statistic` maps means of shape (..., samples) to (...,). A cluster that occurs in several samples is resampled for
    all of them together. Draws with an undefined statistic (nan) are left out.
    """
    clean = [_finite(values, cluster) for values, cluster in samples]
    n = min(len(values) for values, _ in clean)
    if not n:
        return Estimate(None, None, None, 0, "no values")
    names = np.unique(np.concatenate([cluster for _, cluster in clean]))
    columns = [
        iv.cluster_sums(np.searchsorted(names, cluster), weights, len(names))
        for values, cluster in clean
        for weights in (values, np.ones(len(values)))
    ]
    sums = iv.resample_sums(np.stack(columns, axis=1), draws, np.random.default_rng(seed))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = statistic(sums[:, ::2] / sums[:, 1::2])
        value = float(statistic(np.array([values.mean() for values, _ in clean])))
    return _bootstrapped(value, drawn, n, len(names))


def _bootstrapped(value: float, drawn: Floats, n: int, clusters: int) -> Estimate:
    """Return an estimate with the expanded percentile interval; without an interval for fewer than two clusters."""
    shown = value if np.isfinite(value) else None
    bounds = iv.percentile(drawn, clusters=clusters) if clusters > 1 else None
    if bounds is None:
        return Estimate(shown, None, None, n, "one latent: its spread is unknown", n, clusters)
    return Estimate(shown, *bounds, n, f"expanded percentile bootstrap over latents, {len(drawn)} draws", n, clusters)


def ratio_of(
    above: Floats, above_cluster: Codes, below: Floats, below_cluster: Codes, draws: int, seed: int = 0
) -> Estimate:
    """Return the mean of one sample divided by the mean of another; None if the latter is 0."""

    def ratio(means: Floats) -> Floats:
        quotient: Floats = np.where(means[..., 1] != 0, means[..., 0] / means[..., 1], np.nan)
        return quotient

    return of_means([(above, above_cluster), (below, below_cluster)], ratio, draws, seed)


def auc_of(low: Floats, high: Floats, cluster: Codes, draws: int, seed: int = 0) -> Estimate:
    """Return P(high > low), ties one half, of two arms (n,) that share clusters; interval from resampled clusters.

    Every resample of completely separated arms is completely separated. In that case the interval comes from a bound
    on the share of clusters that could overlap: `no_event_bound`, each cluster as one trial, in both arms.
    """
    if not len(low):
        return Estimate(None, None, None, 0, "no values")
    codes = np.unique(cluster, return_inverse=True)[1].astype(np.int64)
    member = np.eye(int(codes.max()) + 1)[codes]  # (n, clusters)
    # wins[c, d]: pairs of a low value in cluster c and a larger high value in cluster d, so that a resample of clusters
    # needs no further comparison of values
    wins = member.T @ ((high[None] > low[:, None]) + 0.5 * (high[None] == low[:, None])) @ member
    sizes = member.sum(axis=0)
    value = float(wins.sum() / len(low) ** 2)
    clusters = len(sizes)
    if clusters < 2:
        return Estimate(value, None, None, len(low), "one cluster: its spread is unknown", len(low), clusters)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(np.float64)
    drawn = np.einsum("dc,ce,de->d", weights, wins, weights, optimize=True) / (weights @ sizes) ** 2
    lower, upper = iv.percentile(drawn, clusters=clusters) or (value, value)
    if value in (0.0, 1.0):
        crossing = 1 - (1 - iv.no_event_bound(np.ones(clusters), icc=1.0)) ** 2
        lower, upper = (0.0, crossing) if value == 0 else (1 - crossing, 1.0)
    method = f"expanded percentile bootstrap over clusters, {draws} draws"
    return Estimate(value, lower, upper, len(low), method, len(low), clusters)


@dataclass(frozen=True)
class RegionTest:
    """Two-sided test of two samples of clustered values. `difference` is mean(b) - mean(a), its interval clustered.

    `p` swaps a and b within latents. `t_p` (paired or Welch) and `rank_p` (Wilcoxon signed rank or rank sum) treat
    every value as independent. Cohen's d uses the pooled sd; Cliff's delta is P(b > a) - P(b < a). `holm`, `t_holm`
    and `rank_holm` are p, t_p and rank_p corrected over the tests passed to `correct_regions`.
    """

    paired: bool
    n_a: int
    n_b: int
    clusters: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    t_p: float | None
    rank_p: float | None
    cohens_d: float | None
    cliffs_delta: float | None
    holm: float | None = None
    t_holm: float | None = None
    rank_holm: float | None = None


def paired_regions(a: Floats, b: Floats, cluster: Codes, draws: int = 10_000, seed: int = 0) -> RegionTest:
    """Compare two regions of the same responses; all arrays (n,). Responses with a nan in either are left out."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b, cluster = a[both], b[both], cluster[both]
    gap = mean_of(b - a, cluster)
    t_p = rank_p = None
    if len(a) > 1 and np.any(a != b):
        from scipy.stats import ttest_rel, wilcoxon

        t_p = _p(ttest_rel(b, a).pvalue) if np.ptp(b - a) > 0 else None
        rank_p = _p(wilcoxon(b - a).pvalue)
    return _test(True, (a, cluster), (b, cluster), gap, (t_p, rank_p), draws, seed)


def separate_regions(
    a: Floats, a_cluster: Codes, b: Floats, b_cluster: Codes, draws: int = 10_000, seed: int = 0
) -> RegionTest:
    """Compare regions of different responses, (n,) and (m,); nan values are left out."""
    a, a_cluster = _finite(a, a_cluster)
    b, b_cluster = _finite(b, b_cluster)
    gap = of_means(
        [(a, a_cluster), (b, b_cluster)], lambda means: means[..., 1] - means[..., 0], min(draws, 2000), seed
    )
    t_p = rank_p = None
    if len(a) > 1 and len(b) > 1 and np.ptp(np.concatenate([a, b])) > 0:
        from scipy.stats import mannwhitneyu, ttest_ind

        t_p = _p(ttest_ind(b, a, equal_var=False).pvalue) if np.ptp(a) > 0 or np.ptp(b) > 0 else None
        rank_p = _p(mannwhitneyu(b, a, alternative="two-sided").pvalue)
    return _test(False, (a, a_cluster), (b, b_cluster), gap, (t_p, rank_p), draws, seed)


def correct_regions(tests: Mapping[str, RegionTest]) -> dict[str, RegionTest]:
    """Fill the Holm-corrected p values over all tests, separately for each kind of p."""
    kinds = (holm(getattr(t, kind) for t in tests.values()) for kind in ("p", "t_p", "rank_p"))
    return {
        name: replace(test, holm=p, t_holm=t, rank_holm=r)
        for (name, test), p, t, r in zip(tests.items(), *kinds, strict=True)
    }


def cohens_d(a: Floats, b: Floats) -> float | None:
    """Return Cohen's d, (mean(b) - mean(a)) / pooled sd; None if undefined."""
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        return None
    pooled = np.sqrt(((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2))
    return float((b.mean() - a.mean()) / pooled) if pooled > 0 else None


def cliffs_delta(a: Floats, b: Floats) -> float | None:
    """Return Cliff's delta, P(b > a) - P(b < a) over all pairs; None for an empty sample."""
    from scipy.stats import mannwhitneyu

    if not len(a) or not len(b):
        return None
    return float(2 * mannwhitneyu(b, a, method="asymptotic").statistic / (len(a) * len(b)) - 1)


def _test(
    paired: bool,
    first: Sample,
    second: Sample,
    gap: Estimate,
    p: tuple[float | None, float | None],
    draws: int,
    seed: int,
) -> RegionTest:
    """Assemble the test of two samples; `p` holds the p values of the t test and the rank test."""
    names = np.unique(np.concatenate([first[1], second[1]]))

    def sums(values: Floats, cluster: Codes) -> Floats:
        codes = np.searchsorted(names, cluster)
        weights = (values, np.ones(len(values)))
        return np.stack([iv.cluster_sums(codes, w, len(names)) for w in weights], axis=1)

    a, b = first[0], second[0]
    return RegionTest(
        paired=paired,
        n_a=len(a),
        n_b=len(b),
        clusters=len(names),
        mean_a=float(a.mean()) if len(a) else None,
        mean_b=float(b.mean()) if len(b) else None,
        difference=gap.value,
        low=gap.low,
        high=gap.high,
        p=swap_test(sums(*first), sums(*second), draws, seed)[0] if len(a) and len(b) else None,
        t_p=p[0],
        rank_p=p[1],
        cohens_d=cohens_d(a, b),
        cliffs_delta=cliffs_delta(a, b),
    )


def _p(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _finite(values: Floats, cluster: Codes) -> tuple[Floats, Codes]:
    keep = np.isfinite(values)
    return np.asarray(values, dtype=np.float64)[keep], np.asarray(cluster)[keep]


def _present(values: Floats, cluster: Codes) -> tuple[Floats, Codes]:
    """Return the finite values with their clusters numbered from 0."""
    values, cluster = _finite(values, cluster)
    return values, np.unique(cluster, return_inverse=True)[1].astype(np.int64)
