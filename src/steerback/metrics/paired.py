"""Compare two conditions that share prompts and seeds: differences, tests over latents, effect sizes, Holm.

A pair is dropped, and counted, if either side is invalid, unscored or empty, or degraded if these are excluded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.outcomes import STATES, VALID, Outcomes
from steerback.metrics.rates import METRICS, Metric, MetricResult, View, influence, view

COMPARED = ("multi_attempt_rate", "esr_rate", "improvement_rate", "msi", "mean_attempts", "mean_first")
EXACT_CLUSTERS = 12  # with at most this many informative latents, all 2^k swaps are enumerated


@dataclass(frozen=True)
class PairedTest:
    """One metric in two conditions: `difference` is b - a with its interval clustered by latent.

    `p` is two-sided, from swapping a and b within latents. `informative` counts the latents that differ, so the
    smallest possible p is 2 / 2^informative. `cohens_d` is the mean over latents of their mean difference, divided by
    its standard deviation. `odds_ratio` (rates) is (b only + 1/2) / (a only + 1/2) over pairs; for the improvement
    rate it is the odds ratio of the two tables, with 1/2 added to each count.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    method: str
    p: float | None
    p_method: str
    clusters: int
    informative: int
    cohens_d: float | None = None
    odds_ratio: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Comparison(MetricResult):
    """All tests of one pair of conditions. `dropped` counts the dropped pairs by the first reason that applies."""

    pairs: int
    dropped: dict[str, int]
    tests: dict[str, PairedTest]

    def __getitem__(self, metric: str) -> PairedTest:
        return self.tests[metric]


def compare(
    a: Outcomes,
    b: Outcomes,
    metrics: Sequence[str] = COMPARED,
    draws: int = 10_000,
    seed: int = 0,
    gated: bool = True,
    include_degraded: bool | None = None,
    icc: float = iv.ICC,
) -> Comparison:
    """Compare condition b with a, paired by `pair`, clustered by latent.

    Raises ValueError if a pair index occurs twice in a condition or has different latents in the two conditions.
    """
    both_a, both_b, dropped = _match(a, b, include_degraded)
    v, w = (view(x, gated=gated, include_degraded=True) for x in (both_a, both_b))
    tests = {name: _paired_test(METRICS[name], v, w, draws, seed, icc) for name in metrics}
    return Comparison(len(both_a), dropped, tests)


def _match(a: Outcomes, b: Outcomes, include_degraded: bool | None) -> tuple[Outcomes, Outcomes, dict[str, int]]:
    for side in (a, b):
        if len(np.unique(side.pair)) != len(side):
            raise ValueError("a pair index occurs twice in one condition")
    _, in_a, in_b = np.intersect1d(a.pair, b.pair, assume_unique=True, return_indices=True)
    unpaired = len(a) + len(b) - 2 * len(in_a)
    a, b = a.take(in_a), b.take(in_b)
    if np.any(a.cluster != b.cluster):
        raise ValueError("a pair index has different latents in the two conditions")
    keep = np.ones(len(a), dtype=bool)
    dropped = {"unpaired": unpaired}
    for code in range(len(STATES) - 1, VALID, -1):  # invalid, unscored, empty: the worst state names the reason
        bad = keep & ((a.state == code) | (b.state == code))
        dropped[STATES[code]] = int(bad.sum())
        keep &= ~bad
    if not (a.include_degraded if include_degraded is None else include_degraded):
        bad = keep & (a.degraded | b.degraded)
        dropped["degraded"] = int(bad.sum())
        keep &= ~bad
    return a.take(keep), b.take(keep), dropped


def _paired_test(metric: Metric, v: View, w: View, draws: int, seed: int, icc: float) -> PairedTest:
    (num_a, den_a), (num_b, den_b) = metric.parts(v), metric.parts(w)
    sums = np.stack([iv.cluster_sums(v.cluster, x, v.clusters) for x in (num_a, den_a, num_b, den_b)], axis=1)
    total_a, total_b = _ratio(sums[:, :2].sum(0)), _ratio(sums[:, 2:].sum(0))
    clusters = v.clusters
    informative = int(np.sum(np.any(sums[:, :2] != sums[:, 2:], axis=1)))
    if total_a is None or total_b is None:
        method = "no trials in one of the conditions"
        return PairedTest(metric.name, total_a, total_b, None, None, None, method, None, method, clusters, informative)
    bounds = _difference_interval(metric, v.cluster, (num_a, den_a, num_b, den_b), total_b - total_a, icc)
    p, p_method = swap_test(sums[:, :2], sums[:, 2:], draws, seed)
    return PairedTest(
        metric.name,
        total_a,
        total_b,
        total_b - total_a,
        *bounds,
        p,
        p_method,
        clusters,
        informative,
        _cohens_d(sums),
        _odds_ratio(num_a, den_a, num_b, den_b) if metric.rate else None,
    )


def _ratio(pair: Floats) -> float | None:
    return float(pair[0] / pair[1]) if pair[1] > 0 else None


def _difference_interval(
    metric: Metric, cluster: Codes, parts: tuple[Floats, Floats, Floats, Floats], value: float, icc: float
) -> iv.Bounds:
    """Return the t interval of the difference from each pair's influence on it; a bound if no pair differs."""
    num_a, den_a, num_b, den_b = parts
    member = (den_a > 0) | (den_b > 0)
    differs = member & ((num_a != num_b) | (den_a != den_b))
    variance = iv.influence_variance(influence(num_b, den_b) - influence(num_a, den_a), cluster, member)
    sizes = iv.cluster_sums(cluster, member.astype(np.float64))
    width = metric.limits[1] - metric.limits[0]
    informative = len(np.unique(cluster[differs]))
    return iv.mean_interval(value, sizes, variance, int(differs.sum()), informative, (-width, width), icc)


def swap_test(
    a: Floats, b: Floats, draws: int = 10_000, seed: int = 0, exact_clusters: int = EXACT_CLUSTERS
) -> tuple[float, str]:
    """Test two paired conditions for equal ratios (two-sided) by swapping them within whole clusters.

    `a`, `b`: (clusters, 2) sums of numerator and denominator, with totals A and B of the denominators above 0. Let r be
    the ratio of both conditions together. The evidence of a cluster for b is
    e = (num_b - r den_b) / B - (num_a - r den_a) / A. It has mean 0 if the ratios are equal, whatever the denominators;
    its sum is the difference of the ratios; a swap flips its sign. (If the denominators agree, e is the cluster's
    summed difference. Swapping the sums themselves would also test whether the denominators differ.) Clusters with
    e = 0 are left out. The test is exact over all 2^k swaps for k <= exact_clusters, else Monte Carlo with
    p = (1 + hits) / (1 + draws). Returns p and the method.
    """
    total_a, total_b = a.sum(axis=0), b.sum(axis=0)
    ratio = (total_a[0] + total_b[0]) / (total_a[1] + total_b[1])
    evidence = (b[:, 0] - ratio * b[:, 1]) / total_b[1] - (a[:, 0] - ratio * a[:, 1]) / total_a[1]
    moving = evidence[np.abs(evidence) > 1e-12 * max(np.abs(evidence).max(initial=0.0), abs(ratio) / len(a))]
    k = len(moving)
    if k == 0:
        return 1.0, "no latent differs"
    exact = k <= exact_clusters
    if exact:
        swaps = (np.arange(2**k)[:, None] >> np.arange(k)) & 1
    else:
        swaps = np.random.default_rng(seed).integers(0, 2, size=(draws, k))
    statistic, observed = np.abs((1.0 - 2.0 * swaps) @ moving), abs(moving.sum())
    hits = int(np.sum(statistic >= observed * (1 - 1e-12) - 1e-15))
    if exact:
        return hits / 2**k, f"swaps within latents, all 2^{k}"
    return (1 + hits) / (1 + draws), f"swaps within latents, {draws} drawn"


def _cohens_d(sums: Floats) -> float | None:
    defined = sums[(sums[:, 1] > 0) & (sums[:, 3] > 0)]
    if len(defined) < 2:
        return None
    d = defined[:, 2] / defined[:, 3] - defined[:, 0] / defined[:, 1]
    sd = float(np.std(d, ddof=1))
    return float(np.mean(d)) / sd if sd > 1e-12 else None


def _odds_ratio(num_a: Floats, den_a: Floats, num_b: Floats, den_b: Floats) -> float:
    if np.all(den_a == den_b):  # all pairs count in both conditions, so discordant pairs decide (McNemar)
        return float((np.sum(num_b > num_a) + 0.5) / (np.sum(num_a > num_b) + 0.5))
    yes_a, yes_b = num_a.sum() + 0.5, num_b.sum() + 0.5
    return float(yes_b * (den_a.sum() - num_a.sum() + 0.5) / (yes_a * (den_b.sum() - num_b.sum() + 0.5)))


def holm(pvalues: Iterable[float | None]) -> list[float | None]:
    """Return p values adjusted by Holm's (1979) step-down method; None (no test) stays None and does not count."""
    values = list(pvalues)
    known = np.array([p for p in values if p is not None], dtype=float)
    order = np.argsort(known)
    stepped = np.maximum.accumulate(known[order] * np.arange(len(known), 0, -1)).clip(max=1.0)
    adjusted = iter(stepped[np.argsort(order)].tolist())
    return [None if p is None else next(adjusted) for p in values]


def correct(comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """Fill `p_holm`: Holm's correction over the comparisons of one experiment, within each metric."""
    names = list(comparisons)
    out = {name: dict(c.tests) for name, c in comparisons.items()}
    for metric in {m for c in comparisons.values() for m in c.tests}:
        having = [n for n in names if metric in comparisons[n].tests]
        for name, p in zip(having, holm(comparisons[n][metric].p for n in having), strict=True):
            out[name][metric] = replace(out[name][metric], p_holm=p)
    return {name: replace(c, tests=out[name]) for name, c in comparisons.items()}
