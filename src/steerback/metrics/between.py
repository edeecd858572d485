"""Two models compared on latents of their own: difference of a metric, its interval, and a test over latents.

Nothing pairs the trials of two models, so whole latents are resampled (interval) and exchanged (test). Knows arrays
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import CELLS, Floats
from steerback.metrics.outcomes import Outcomes
from steerback.metrics.paired import holm
from steerback.metrics.rates import METRICS, Estimate, Metric, View, estimates, view

DRAWS = 5_000
BETWEEN = ("multi_attempt_rate", "esr_rate", "msi")


@dataclass(frozen=True)
class TwoSampleTest:
    """One metric of two models: `difference` is b - a.

    `low` and `high` come from resampling the latents of both models; with fewer than five events (second attempts) on
    one side, from the models' own intervals. They are None with fewer than two latents on one side.
    `p` is two-sided, from exchanging latents between the models (`exchange_test`). `p_holm` is Holm's correction over
    all pairs of models, within the metric.
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


def between(
    a: Outcomes, b: Outcomes, metrics: Sequence[str] = BETWEEN, draws: int = DRAWS, seed: int = 0
) -> dict[str, TwoSampleTest]:
    """Compare model b with model a, headline variant."""
    views = view(a), view(b)
    rng = np.random.default_rng(seed)
    own = [estimates(v, metrics, 0, rng, iv.ICC) for v in views]
    found = {}
    for name in metrics:
        first, second = (cluster_table(METRICS[name], v) for v in views)
        found[name] = _test(name, own[0][name], own[1][name], first, second, draws, seed)
    return found


def correct_pairs(tests: Mapping[str, Mapping[str, TwoSampleTest]]) -> dict[str, dict[str, TwoSampleTest]]:
    """Fill `p_holm`: Holm over all pairs of models, within each metric."""
    out: dict[str, dict[str, TwoSampleTest]] = {name: {} for name in tests}
    for metric in {m for own in tests.values() for m in own}:
        adjusted = holm(own[metric].p for own in tests.values())
        for (name, own), p in zip(tests.items(), adjusted, strict=True):
            out[name][metric] = replace(own[metric], p_holm=p)
    return {name: {metric: out[name][metric] for metric in own} for name, own in tests.items()}


def exchange_test(a: Floats, b: Floats, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the two-sided p-value of equal ratios in two samples of clusters (columns: `cluster_table`).

    Clusters are dealt anew to the two samples, and the difference of the ratios is divided by its clustered standard
    error in every deal (a studentized permutation test: Janssen 1997). So the test holds its size where the models
    differ in number of latents, trials or spread. p = (1 + hits) / (1 + draws).
    """
    together, first = np.concatenate([a, b]), len(a)
    observed = _studentized(a[None], b[None])[0]
    rng, hits, block = np.random.default_rng(seed), 0, max(1, CELLS // together.size)
    for start in range(0, draws, block):
        dealt = np.argsort(rng.random((min(block, draws - start), len(together))), axis=1)
        values = _studentized(together[dealt[:, :first]], together[dealt[:, first:]])
        hits += int(np.sum(values >= observed * (1 - 1e-9)))
    return (1 + hits) / (1 + draws)


def cluster_table(metric: Metric, v: View) -> Floats:
    """Return a row per cluster: numerator, denominator, squared numerators, and trials away from rest (events)."""
    num, den = metric.parts(v)
    events = (den > 0) & (num != metric.rest) if metric.rest is not None else den > 0
    columns = (num, den, num * num, events.astype(np.float64))
    sums = np.stack([iv.cluster_sums(v.cluster, x, v.clusters) for x in columns], axis=1)
    return sums[sums[:, 1] > 0]


def _studentized(a: Floats, b: Floats) -> Floats:
    """Return |difference of the ratios| over its standard error for (deals, clusters, 4) tables; 0 where equal.

    As in all intervals of the package, a variance from few events is shrunk towards that of independent trials times
    the design effect of the assumed correlation within latents: a sample without events would have none.
    """
    whole = a.sum(axis=1) + b.sum(axis=1)
    ratio = whole[:, 0] / whole[:, 1]
    single = whole[:, 2] / whole[:, 1] - ratio * ratio  # variance of one trial in both samples together
    ratios, variance = [], np.zeros(len(a))
    for sums in (a, b):
        total, count = sums.sum(axis=1), sums.shape[1]
        own = total[:, 0] / total[:, 1]
        spread = (sums[:, :, 0] - own[:, None] * sums[:, :, 1]) / total[:, 1, None]
        clustered = np.sum(spread * spread, axis=1) * count / (count - 1)
        size = np.sum(sums[:, :, 1] ** 2, axis=1) / total[:, 1]
        assumed = single / total[:, 1] * (1 + np.maximum(size - 1, 0) * iv.ICC)
        weight = total[:, 3] / (total[:, 3] + iv.PRIOR_EVENTS)
        variance += weight * clustered + (1 - weight) * assumed
        ratios.append(own)
    gap = np.abs(ratios[1] - ratios[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        values: Floats = np.where(gap < 1e-12, 0.0, gap / np.sqrt(variance))
    return values


def _test(name: str, own_a: Estimate, own_b: Estimate, a: Floats, b: Floats, draws: int, seed: int) -> TwoSampleTest:
    if own_a.value is None or own_b.value is None:
        return TwoSampleTest(name, own_a.value, own_b.value, None, None, None, None, len(a), len(b))
    gap = own_b.value - own_a.value
    if min(len(a), len(b)) < 2:
        return TwoSampleTest(name, own_a.value, own_b.value, gap, None, None, None, len(a), len(b))
    found = None
    if min(a[:, 3].sum(), b[:, 3].sum()) >= iv.PRIOR_EVENTS:
        drawn = [iv.resample_sums(s[:, :2], draws, np.random.default_rng(seed + i)) for i, s in enumerate((a, b))]
        ratios = [d[:, 0] / d[:, 1] for d in drawn]
        found = iv.percentile(ratios[1] - ratios[0], clusters=min(len(a), len(b)))
    low, high = found or _combined(gap, own_a, own_b)
    return TwoSampleTest(
        name, own_a.value, own_b.value, gap, low, high, exchange_test(a, b, draws, seed), len(a), len(b)
    )


def _combined(gap: float, a: Estimate, b: Estimate) -> tuple[float | None, float | None]:
    """Return the interval of a difference from those of its two sides (Newcombe 1998), for which few events do."""
    if a.low is None or a.high is None or a.value is None or b.low is None or b.high is None or b.value is None:
        return None, None
    below, above = np.hypot(b.value - b.low, a.high - a.value), np.hypot(b.high - b.value, a.value - a.low)
    return float(gap - below), float(gap + above)
