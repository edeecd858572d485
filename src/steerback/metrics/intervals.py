"""Intervals for rates and means of clustered trials, from arrays; knows nothing of trials, judges or metrics.

Which interval is used where, and the coverage that was simulated for each: docs/statistics.md.
All are two-sided with total error `alpha`. A cluster is a latent; trials of one latent are correlated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
"""The cluster of each trial: counted from 0, or a code of its latent."""
Flags = NDArray[np.bool_]


ALPHA = 0.05
ICC = 0.1  # correlation within a latent that is assumed where events are too few to estimate it
OPEN_REACH = 2.0  # how far above its resting value an unseen trial is taken to lie where a metric has no upper limit
CELLS = 4_000_000  # resampling weights held at a time, so that memory does not grow with draws x clusters
PRIOR_EVENTS = 5.0  # the assumed ICC weighs as much as this many observed events


class Bounds(NamedTuple):
    """An interval and how it was made; None where nothing can be said."""

    low: float | None
    high: float | None
    method: str


def wilson(events: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Wilson (1927) score interval of independent trials; `n` must be positive."""
    return _proportion(events, n, alpha, "wilson")


def clopper_pearson(events: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Exact binomial interval of independent trials; `events` and `n` may be fractional (effective sizes)."""
    return _proportion(events, n, alpha, "beta")


def _proportion(events: float, n: float, alpha: float, method: str) -> tuple[float, float]:
    from statsmodels.stats.proportion import proportion_confint

    if n <= 0:
        raise ValueError(f"a proportion needs at least one trial, not {n:g}")
    low, high = proportion_confint(events, n, alpha, method)
    # the exact ends, which rounding can miss by 1e-17
    return 0.0 if events <= 0 else float(low), 1.0 if events >= n else float(high)


def no_event_bound(sizes: Floats, icc: float = ICC, alpha: float = ALPHA) -> float:
    """Largest rate p under which no event in clusters of these sizes still has probability alpha / 2.

    Cluster rates are Beta with mean p and intra-cluster correlation `icc` (beta-binomial counts), so
    P(no event) = prod_c B(a, b + n_c) / B(a, b) with a = p (1 - icc) / icc and b = (1 - p) (1 - icc) / icc.
    icc 0 is Clopper-Pearson; icc 1 counts each cluster as one trial and holds whatever the clusters are like.
    """
    from scipy.optimize import brentq
    from scipy.special import betaln

    sizes = np.asarray(sizes, dtype=np.float64)
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 1.0
    if not 0 < icc < 1:
        return float(1 - (alpha / 2) ** (1 / (len(sizes) if icc >= 1 else sizes.sum())))
    values, counts = np.unique(sizes, return_counts=True)
    scale = (1 - icc) / icc

    def excess(p: float) -> float:
        a, b = p * scale, (1 - p) * scale
        return float(np.sum(counts * (betaln(a, b + values) - betaln(a, b))) - np.log(alpha / 2))

    top = 1 - 1e-12
    return 1.0 if excess(top) > 0 else float(brentq(excess, 1e-12, top, xtol=1e-10))


def cluster_sums(cluster: Codes, values: Floats, clusters: int = 0) -> Floats:
    """Sum of `values` per cluster code, shape (clusters,)."""
    return np.bincount(cluster, weights=values, minlength=clusters).astype(np.float64, copy=False)


class Influence(NamedTuple):
    """Variance of an estimate from its influence values: as if trials were independent, and over clusters."""

    independent: float
    clustered: float
    clusters: int


def influence_variance(values: Floats, cluster: Codes, member: Flags) -> Influence:
    """Linearised variances of an estimate whose trial i contributes `values[i]` (they sum to 0).

    independent = n / (n - 1) sum_i v_i^2, clustered = C / (C - 1) sum_c (sum_{i in c} v_i)^2, over the trials in
    `member`; nan with fewer than two trials or clusters. `cluster` holds small non-negative codes.
    """
    v, c = values[member], cluster[member]
    present = np.bincount(c)
    k, n = int(np.count_nonzero(present)), len(v)
    sums = cluster_sums(c, v)
    independent = float(np.sum(v * v)) * n / (n - 1) if n > 1 else float("nan")
    clustered = float(np.sum(sums * sums)) * k / (k - 1) if k > 1 else float("nan")
    return Influence(independent, clustered, k)


def design_effect(variance: Influence, sizes: Floats, events: float, icc: float = ICC) -> float:
    """How many times clustering inflates the variance, at least 1.

    The estimate (clustered over independent variance) is shrunk towards that of the assumed `icc`,
    1 + (m - 1) icc with m the mean size of the cluster of a random trial, because with few events the estimate
    is near 1 whatever the truth (one event alone always gives 1). Events weigh against PRIOR_EVENTS.
    """
    m = float(np.sum(sizes**2) / np.sum(sizes))
    assumed = 1 + max(m - 1, 0.0) * icc
    if not variance.independent > 0 or not np.isfinite(variance.clustered):
        return assumed
    weight = events / (events + PRIOR_EVENTS)
    return max(1.0, weight * variance.clustered / variance.independent + (1 - weight) * assumed)


def t_quantile(df: float, alpha: float = ALPHA) -> float:
    """Two-sided t quantile; at least one degree of freedom, the normal quantile for infinitely many."""
    from scipy.special import stdtrit

    return float(stdtrit(max(df, 1), 1 - alpha / 2))


def rate_interval(events: float, sizes: Floats, variance: Influence, icc: float = ICC, alpha: float = ALPHA) -> Bounds:
    """Interval for a rate of clustered trials; `sizes` are the denominators of the clusters.

    With events on both sides: Korn and Graubard (1998), Clopper-Pearson at the effective sample size
    n / design effect x (z / t_{C-1})^2. Without events (or without non-events): `no_event_bound`. The bound of
    "no event" is a floor for the upper limit as well, since seeing an event cannot lower it.
    """
    sizes = sizes[sizes > 0]
    n, clusters = float(np.sum(sizes)), len(sizes)
    if not clusters:
        return Bounds(None, None, "no trials")
    p = events / n
    if clusters == 1:
        return Bounds(*clopper_pearson(p, 1.0, alpha), "one latent, counted as one trial")
    bound = no_event_bound(sizes, icc, alpha)
    if events == 0:
        return Bounds(0.0, bound, f"exact beta-binomial, no events, assumed ICC {icc:g}")
    if events == n:
        return Bounds(1 - bound, 1.0, f"exact beta-binomial, events only, assumed ICC {icc:g}")
    rarer = min(events, n - events)
    shrink = (t_quantile(np.inf, alpha) / t_quantile(clusters - 1, alpha)) ** 2
    effective = n / design_effect(variance, sizes, rarer, icc) * shrink
    low, high = clopper_pearson(p * effective, effective, alpha)
    return Bounds(min(low, 1 - bound), max(high, bound), "Clopper-Pearson at effective size, clustered by latent")


def mean_interval(
    value: float,
    sizes: Floats,
    variance: Influence,
    events: float,
    informative: int,
    limits: tuple[float, float],
    icc: float = ICC,
    alpha: float = ALPHA,
) -> Bounds:
    """Interval for a mean or a ratio of clustered trials, kept within `limits`.

    t interval with the shrunk design effect; its degrees of freedom count only the `informative` clusters, those
    with a trial away from the resting value (for MSI: with a second attempt), because clusters that are all at
    rest say nothing about the spread. Where nothing varies at all, the share of trials that could differ is
    bounded by `no_event_bound`, and each of them could lie anywhere within `limits`.
    """
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return Bounds(None, None, "no trials")
    if len(sizes) == 1:
        return Bounds(None, None, "one latent: the spread between latents is unknown")
    spread = max(variance.independent, variance.clustered)
    if not spread > (1e-9 * max(1.0, abs(value))) ** 2:  # nothing but rounding
        share = no_event_bound(sizes, icc, alpha)
        low, high = (v if np.isfinite(v) else value + np.sign(v) * OPEN_REACH for v in limits)
        low, high = float(value + share * (low - value)), float(value + share * (high - value))
        return Bounds(low, high, f"no spread: bound on the share that differs, assumed ICC {icc:g}")
    half = t_quantile(informative - 1, alpha) * np.sqrt(
        variance.independent * design_effect(variance, sizes, events, icc)
    )
    low, high = max(value - half, limits[0]), min(value + half, limits[1])
    return Bounds(float(low), float(high), "t, clustered by latent")


def resample_sums(sums: Floats, draws: int, rng: np.random.Generator, cells: int = CELLS) -> Floats:
    """Totals of `sums` (clusters, columns) under `draws` resamples of whole clusters, shape (draws, columns).

    Work is cut into blocks of at most `cells` weights, so memory does not grow with draws x clusters.
    """
    n = len(sums)
    block = max(1, min(draws, cells // max(n, 1)))
    parts = []
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(weights.astype(np.float64) @ sums)
    return np.concatenate(parts)


def percentile(draws: Floats, alpha: float = ALPHA, clusters: int | None = None) -> tuple[float, float] | None:
    """Percentile interval of bootstrap draws; undefined draws (nan) are left out, None if all are.

    With `clusters`, the number of resampled units C, its tails are expanded to Phi(-t sqrt(C / (C - 1))), t with C - 1
    degrees of freedom: the plain interval is too narrow for few units (Hesterberg 2015).
    """
    from scipy.special import ndtr

    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return None
    tail = alpha / 2
    if clusters is not None and clusters > 1:
        tail = float(ndtr(-t_quantile(clusters - 1, alpha) * np.sqrt(clusters / (clusters - 1))))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)
