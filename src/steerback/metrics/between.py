"""Compare two samples that are not paired: two models with different latents, or steered with unsteered responses.

Whole clusters are resampled for the interval and exchanged for the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.outcomes import Outcomes
from steerback.metrics.paired import holm
from steerback.metrics.rates import METRICS, Estimate, Metric, View, estimates, view

DRAWS = 5_000
BETWEEN = ("multi_attempt_rate", "esr_rate", "msi")


@dataclass(frozen=True)
class TwoSampleTest:
    """One metric of two models: `difference` is b - a.

    `low` and `high` come from resampling the latents of both models. If one model has fewer than five events (second
    attempts), they combine the intervals of the two models instead. None if a model has fewer than two latents.
    `p` is two-sided, from exchanging latents between the models (`exchange_test`). `p_holm` is corrected by Holm's
    method over all pairs of models, within the metric.
    """

    metric: str
    a: float | None
    b: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    clusters_a: int
    clusters_b: int
    p_holm: float | None = None


def between(a: Outcomes, b: Outcomes) -> dict[str, TwoSampleTest]:
    """Compare model b with model a by the headline variant of each metric."""
    views = view(a), view(b)
    sides = [estimates(v, BETWEEN, 0, np.random.default_rng(0)) for v in views]
    return {
        name: _test(name, sides[0][name], sides[1][name], *(cluster_table(METRICS[name], v) for v in views))
        for name in BETWEEN
    }


def correct_pairs(tests: Mapping[str, Mapping[str, TwoSampleTest]]) -> dict[str, dict[str, TwoSampleTest]]:
    """Fill `p_holm`: Holm over all pairs of models, within each metric; all pairs have the same metrics."""
    out = {pair: dict(by_metric) for pair, by_metric in tests.items()}
    for metric in {m for by_metric in tests.values() for m in by_metric}:
        for by_metric, p in zip(out.values(), holm(t[metric].p for t in tests.values()), strict=True):
            by_metric[metric] = replace(by_metric[metric], p_holm=p)
    return out


def exchange_test(a: Floats, b: Floats, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p-value of equal ratios in two samples of clusters (columns: `cluster_table`).

    Each draw assigns the clusters to the two samples at random and divides the difference of the ratios by its
    clustered standard error (studentized permutation test, Janssen 1997). The test therefore keeps its size when the
    models differ in number of latents, trials or spread. p = (1 + hits) / (1 + draws).
    """
    together, first = np.concatenate([a, b]), len(a)
    observed = _studentized(a[None], b[None])[0]
    rng, hits = np.random.default_rng(seed), 0
    for rows in iv.blocks(draws, together.size):
        dealt = np.argsort(rng.random((rows, len(together))), axis=1)
        values = _studentized(together[dealt[:, :first]], together[dealt[:, first:]])
        hits += int(np.sum(values >= observed * (1 - 1e-9)))
    return (1 + hits) / (1 + draws)


def cluster_table(metric: Metric, v: View) -> Floats:
    """Return one row per cluster: sums of numerators, denominators and squared numerators, and number of events.

    An event is a trial whose numerator differs from the metric's resting value.
    """
    num, den = metric.parts(v)
    events = (den > 0) & (num != metric.rest) if metric.rest is not None else den > 0
    columns = (num, den, num * num, events.astype(np.float64))
    sums = np.stack([iv.cluster_sums(v.cluster, x, v.clusters) for x in columns], axis=1)
    return sums[sums[:, 1] > 0]


def _studentized(a: Floats, b: Floats) -> Floats:
    """Return |difference of the ratios| / its standard error for tables (draws, clusters, 4); 0 if the ratios agree.

    As in all intervals of the package, a variance from few events is shrunk towards the variance of independent trials
    times the design effect of the assumed ICC: a sample without events would otherwise have variance 0.
    """
    whole = a.sum(axis=1) + b.sum(axis=1)
    ratio = whole[:, 0] / whole[:, 1]
    single = whole[:, 2] / whole[:, 1] - ratio * ratio  # variance of one trial in both samples together
    ratios, variance = [], np.zeros(len(a))
    for sums in (a, b):
        total, count = sums.sum(axis=1), sums.shape[1]
        rate = total[:, 0] / total[:, 1]
        spread = (sums[:, :, 0] - rate[:, None] * sums[:, :, 1]) / total[:, 1, None]
        clustered = np.sum(spread * spread, axis=1) * count / (count - 1)
        size = np.sum(sums[:, :, 1] ** 2, axis=1) / total[:, 1]
        assumed = single / total[:, 1] * (1 + np.maximum(size - 1, 0) * iv.ICC)
        weight = total[:, 3] / (total[:, 3] + iv.PRIOR_EVENTS)
        variance += weight * clustered + (1 - weight) * assumed
        ratios.append(rate)
    gap = np.abs(ratios[1] - ratios[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        values: Floats = np.where(gap < 1e-12, 0.0, gap / np.sqrt(variance))
    return values


def _test(name: str, alone_a: Estimate, alone_b: Estimate, a: Floats, b: Floats) -> TwoSampleTest:
    gap = alone_b.value - alone_a.value if alone_a.value is not None and alone_b.value is not None else None
    if gap is None or min(len(a), len(b)) < 2:
        return TwoSampleTest(name, alone_a.value, alone_b.value, gap, None, None, None, len(a), len(b))
    bounds = None
    if min(a[:, 3].sum(), b[:, 3].sum()) >= iv.PRIOR_EVENTS:
        drawn = [iv.resample_sums(s[:, :2], DRAWS, np.random.default_rng(i)) for i, s in enumerate((a, b))]
        ratios = [d[:, 0] / d[:, 1] for d in drawn]
        bounds = iv.percentile(ratios[1] - ratios[0], clusters=min(len(a), len(b)))
    low, high = bounds or _combined(gap, alone_a, alone_b)
    p = exchange_test(a, b)
    return TwoSampleTest(name, alone_a.value, alone_b.value, gap, low, high, p, len(a), len(b))


def _combined(gap: float, a: Estimate, b: Estimate) -> tuple[float | None, float | None]:
    """Return the interval of a difference from the intervals of its two sides (Newcombe 1998); valid for few events."""
    if a.low is None or a.high is None or a.value is None or b.low is None or b.high is None or b.value is None:
        return None, None
    below, above = np.hypot(b.value - b.low, a.high - a.value), np.hypot(b.high - b.value, a.value - a.low)
    return float(gap - below), float(gap + above)


FLOOR_TEST = "one-sided two-sample permutation test of whole clusters"
FLOOR_DRAWS = 10_000


def above_floor(measured: View, floor: View, metric: str, draws: int = FLOOR_DRAWS, seed: int = 0) -> float | None:
    """Return the p-value of the null "the rate of `measured` is not above that of `floor`"; None without trials."""
    samples = [(v.cluster, *METRICS[metric].parts(v)) for v in (measured, floor)]
    if not all(den.sum() for _, _, den in samples):
        return None
    sums = [np.stack([iv.cluster_sums(c, num), iv.cluster_sums(c, den)], axis=1) for c, num, den in samples]
    first, second = (s[s[:, 1] > 0] for s in sums)
    return above(first, second, draws, seed)


def above(a: Floats, b: Floats, draws: int = FLOOR_DRAWS, seed: int = 0) -> float:
    """Return the p-value of the null "the ratio of a is not above that of b"; both (clusters, 2).

    The columns are sums of numerator and denominator. Whole clusters are exchanged between the samples, so clusters of
    both samples must have similar sizes. Therefore the smaller clusters (prompts) are first joined until they are
    about as large as the others (latents). This keeps the size of the test at 5 % if trials are hardly correlated
    (docs/statistics.md).
    """
    sizes = [float(s[:, 1].sum()) / len(s) for s in (a, b)]
    a, b = joined(a, max(sizes)), joined(b, max(sizes))
    together, first = np.concatenate([a, b]), len(a)
    total, columns = together.sum(axis=0), np.ascontiguousarray(together.T)
    if not 0 < total[0] < total[1]:
        return 1.0
    observed = a[:, 0].sum() / a[:, 1].sum() - b[:, 0].sum() / b[:, 1].sum()
    rng, hits = np.random.default_rng(seed), 0
    for rows in iv.blocks(draws, len(together)):
        chosen: Codes = np.argpartition(rng.random((rows, len(together))), first - 1, axis=1)[:, :first]
        events, trials = (np.take(column, chosen).sum(axis=1) for column in columns)
        gaps = events / trials - (total[0] - events) / (total[1] - trials)
        hits += int(np.sum(gaps >= observed - 1e-12))
    return (1 + hits) / (1 + draws)


def joined(sums: Floats, size: float) -> Floats:
    """Join clusters with sums (clusters, 2) in turn until each has about `size` trials."""
    count = max(round(float(sums[:, 1].sum()) / size), 1)
    if count >= len(sums):
        return sums
    turn = np.arange(len(sums)) % count
    return np.stack([np.bincount(turn, sums[:, k], count) for k in (0, 1)], axis=1)
