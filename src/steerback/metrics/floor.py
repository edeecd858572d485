"""Test whether a rate is above the judge's floor: a one-sided permutation test of two clustered samples."""

from __future__ import annotations

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.rates import METRICS, View

FLOOR_TEST = "one-sided two-sample permutation test of whole clusters"
DRAWS = 10_000


def above_floor(measured: View, floor: View, metric: str, draws: int = DRAWS, seed: int = 0) -> float | None:
    """Return the p-value of the null "the rate of `measured` is not above that of `floor`"; None without trials."""
    samples = [(v.cluster, *METRICS[metric].parts(v)) for v in (measured, floor)]
    if not all(den.sum() for _, _, den in samples):
        return None
    sums = [np.stack([iv.cluster_sums(c, num), iv.cluster_sums(c, den)], axis=1) for c, num, den in samples]
    first, second = (s[s[:, 1] > 0] for s in sums)
    return above(first, second, draws, seed)


def above(a: Floats, b: Floats, draws: int = DRAWS, seed: int = 0) -> float:
    """Return the p-value of the null "the ratio of a is not above that of b"; both (clusters, 2).

    The columns are sums of numerator and denominator. Whole clusters are exchanged between the samples, so clusters of
    both samples must have similar sizes. Therefore the smaller clusters (prompts) are first joined until they are
    about as large as the others (latents). This keeps the size of the test at 5 % if trials are hardly correlated
    (docs/statistics.md).
    """
    sizes = [float(s[:, 1].sum()) / len(s) for s in (a, b)]
    a, b = joined(a, max(sizes)), joined(b, max(sizes))
    together, first = np.concatenate([a, b]), len(a)
    total = together.sum(axis=0)
    if not 0 < total[0] < total[1]:
        return 1.0
    observed = a[:, 0].sum() / a[:, 1].sum() - b[:, 0].sum() / b[:, 1].sum()
    rng, hits = np.random.default_rng(seed), 0
    for rows in iv.blocks(draws, len(together)):
        chosen: Codes = np.argpartition(rng.random((rows, len(together))), first - 1, axis=1)[:, :first]
        sums = together[chosen].sum(axis=1)
        others = total - sums
        hits += int(np.sum(sums[:, 0] / sums[:, 1] - others[:, 0] / others[:, 1] >= observed - 1e-12))
    return (1 + hits) / (1 + draws)


def joined(sums: Floats, size: float) -> Floats:
    """Join clusters with sums (clusters, 2) in turn until each has about `size` trials."""
    count = max(round(float(sums[:, 1].sum()) / size), 1)
    if count >= len(sums):
        return sums
    turn = np.arange(len(sums)) % count
    return np.stack([np.bincount(turn, sums[:, k], count) for k in (0, 1)], axis=1)
