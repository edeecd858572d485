"""Two-sided intervals, with total error `alpha`, for rates and means of clustered trials.

A cluster is a latent, because trials of one latent are correlated. docs/statistics.md says which interval is used
where, and gives the simulated coverage of each. This module takes arrays and knows nothing about judges or metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
"""Cluster of each trial: a number from 0, or a code of its latent."""
Flags = NDArray[np.bool_]


ALPHA = 0.05
ICC = 0.1  # assumed correlation within a latent if there are too few events to estimate it
OPEN_REACH = 2.0  # assumed reach of an unobserved trial above the resting value of a metric without upper limit
BLOCK = 4_000_000  # largest number of resampled values in memory, whatever draws x clusters is
PRIOR_EVENTS = 5.0  # weight of the assumed ICC, as a number of observed events


class Bounds(NamedTuple):
    """An interval and its method; a bound is None if it cannot be computed."""

    low: float | None
    high: float | None
    method: str


def wilson(events: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the Wilson (1927) score interval of independent trials; `n` must be positive."""
    from scipy.special import ndtri  # scipy.special: importing scipy.stats or statsmodels takes a second

    _need_a_trial(n)
    p, z = events / n, float(ndtri(1 - alpha / 2))
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return 0.0 if events <= 0 else low, 1.0 if events >= n else high


def clopper_pearson(events: float, n: float, alpha: float = ALPHA) -> tuple[float, float]:
    """Return the exact binomial interval of independent trials; `events` and `n` may be fractional (effective size)."""
    from scipy.special import betaincinv

    _need_a_trial(n)
    low = float(betaincinv(events, n - events + 1, alpha / 2)) if events > 0 else 0.0
    return low, float(betaincinv(events + 1, n - events, 1 - alpha / 2)) if events < n else 1.0


def _need_a_trial(n: float) -> None:
    if n <= 0:
        raise ValueError(f"a proportion needs at least one trial, not {n:g}")


def no_event_bound(sizes: Floats, icc: float = ICC, alpha: float = ALPHA) -> float:
    """Return the largest rate p for which clusters of these sizes have no event with probability alpha / 2.

    Cluster rates are Beta with mean p and intra-cluster correlation `icc` (beta-binomial counts), so
    P(no event) = prod_c B(a, b + n_c) / B(a, b) with a = p (1 - icc) / icc and b = (1 - p) (1 - icc) / icc.
    icc 0 is Clopper-Pearson; icc 1 counts each cluster as one trial, which is valid for any correlation.
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
    """Return the sum of `values` per cluster code, shape (clusters,)."""
    return np.bincount(cluster, weights=values, minlength=clusters).astype(np.float64, copy=False)


class Influence(NamedTuple):
    """Variance of an estimate from its influence values, for independent trials and for clustered ones."""

    independent: float
    clustered: float
    clusters: int


def influence_variance(values: Floats, cluster: Codes, member: Flags) -> Influence:
    """Return the linearised variances of an estimate to which trial i contributes `values[i]` (they sum to 0).

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
    """Return the factor, at least 1, by which clustering inflates the variance.

    The estimated factor is clustered / independent variance. With few events it is near 1 whatever the truth (a single
    event always gives 1). It is therefore shrunk towards the factor of the assumed `icc`, 1 + (m - 1) icc, where m is
    the mean cluster size over trials. The weights are `events` and PRIOR_EVENTS.
    """
    m = float(np.sum(sizes**2) / np.sum(sizes))
    assumed = 1 + max(m - 1, 0.0) * icc
    if not variance.independent > 0 or not np.isfinite(variance.clustered):
        return assumed
    weight = events / (events + PRIOR_EVENTS)
    return max(1.0, weight * variance.clustered / variance.independent + (1 - weight) * assumed)


def t_quantile(df: float, alpha: float = ALPHA) -> float:
    """Return the two-sided t quantile: `df` is raised to at least 1; infinite `df` gives the normal quantile."""
    from scipy.special import stdtrit

    return float(stdtrit(max(df, 1), 1 - alpha / 2))


def rate_interval(events: float, sizes: Floats, variance: Influence, icc: float = ICC, alpha: float = ALPHA) -> Bounds:
    """Return the interval of a rate of clustered trials; `sizes` are the denominators of the clusters.

    With events and non-events: Clopper-Pearson at the effective sample size n / design effect x (z / t_{C-1})^2 (Korn
    and Graubard 1998). Without events, or with events only: `no_event_bound`. The upper limit is never below that of
    "no event", because observing an event cannot lower it.
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
    """Return the interval of a mean or a ratio of clustered trials, cut to `limits`.

    A t interval with the shrunk design effect. Its degrees of freedom count only the `informative` clusters: those
    with a trial away from the resting value (for MSI, with a second attempt), because the others say nothing about the
    spread. If all values are equal, `no_event_bound` bounds the share of trials that could differ, and each of these
    could have any value within `limits`.
    """
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return Bounds(None, None, "no trials")
    if len(sizes) == 1:
        return Bounds(None, None, "one latent: the spread between latents is unknown")
    spread = max(variance.independent, variance.clustered)
    if not spread > (1e-9 * max(1.0, abs(value))) ** 2:  # no spread except rounding errors
        share = no_event_bound(sizes, icc, alpha)
        low, high = (v if np.isfinite(v) else value + np.sign(v) * OPEN_REACH for v in limits)
        low, high = float(value + share * (low - value)), float(value + share * (high - value))
        return Bounds(low, high, f"no spread: bound on the share that differs, assumed ICC {icc:g}")
    half = t_quantile(informative - 1, alpha) * np.sqrt(
        variance.independent * design_effect(variance, sizes, events, icc)
    )
    low, high = max(value - half, limits[0]), min(value + half, limits[1])
    return Bounds(float(low), float(high), "t, clustered by latent")


def blocks(draws: int, width: int) -> Iterator[int]:
    """Yield the sizes of blocks that add up to `draws`; each block has at most BLOCK values at `width` per draw."""
    most = max(1, BLOCK // max(width, 1))
    for start in range(0, draws, most):
        yield min(most, draws - start)


def resample_sums(sums: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Return totals of `sums` (clusters, columns) in `draws` resamples of whole clusters, shape (draws, columns)."""
    n = len(sums)
    parts = []
    for rows in blocks(draws, n):
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        parts.append(weights.astype(np.float64) @ sums)
    return np.concatenate(parts)


def percentile(draws: Floats, alpha: float = ALPHA, clusters: int | None = None) -> tuple[float, float] | None:
    """Return the percentile interval of bootstrap draws; undefined draws (nan) are left out. None if all are undefined.

    With `clusters`, the number C of resampled units, the tails are expanded to Phi(-t sqrt(C / (C - 1))), where t has
    C - 1 degrees of freedom: the plain interval is too narrow for few units (Hesterberg 2015).
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
