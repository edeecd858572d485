"""Agreement of judges: shares, Cohen's kappa, Krippendorff's alpha, rank correlation.

Intervals are clustered by latent and always have a width: complete agreement on n responses does not prove that the
judges never disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.rates import Estimate
from steerback.metrics.regions import rate_of

Level = Literal["nominal", "interval"]


@dataclass(frozen=True)
class Agreement:
    """Two judges on one label: the share of equal verdicts and Cohen's kappa."""

    share: Estimate
    kappa: Estimate


def agreement(a: ArrayLike, b: ArrayLike, cluster: ArrayLike, draws: int = 2000, seed: int = 0) -> Agreement:
    """Return the agreement of two judges' labels (numbers); responses with a nan label are left out."""
    table, codes = _complete([a, b], cluster)
    equal = (table[0] == table[1]).astype(np.float64)
    chance = _chance_disagreement(table)
    kappa = _estimate(lambda t: cohens_kappa(t[0], t[1]), table, codes, draws, seed, chance)
    return Agreement(rate_of(equal, codes), kappa)


def alpha(ratings: ArrayLike, cluster: ArrayLike, level: Level, draws: int = 2000, seed: int = 0) -> Estimate:
    """Return Krippendorff's alpha of `ratings` (judges, responses), nan where missing, with its interval."""
    table = np.asarray(ratings, dtype=np.float64)
    rated = np.isfinite(table).sum(axis=0) >= 2
    codes = np.unique(np.asarray(cluster)[rated], return_inverse=True)[1]
    chance = _chance_disagreement(table[:, rated]) if level == "nominal" else None
    return _estimate(lambda t: krippendorff_alpha(t, level), table[:, rated], codes, draws, seed, chance)


def rank_correlation(a: ArrayLike, b: ArrayLike, cluster: ArrayLike, draws: int = 2000, seed: int = 0) -> Estimate:
    """Return Spearman's rank correlation of two judges' scores with its interval; responses with a nan are left out."""
    table, codes = _complete([a, b], cluster)
    return _estimate(lambda t: spearman(t[0], t[1]), table, codes, draws, seed)


def cohens_kappa(a: NDArray[np.generic], b: NDArray[np.generic]) -> float | None:
    """Return Cohen's kappa (1960); None if both judges gave a single label, where kappa is undefined."""
    from statsmodels.stats.inter_rater import cohens_kappa as kappa_of_table

    values, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    k, n = len(values), len(a)
    if k < 2:
        return None
    table = np.bincount(codes[:n] * k + codes[n:], minlength=k * k).reshape(k, k)
    return float(kappa_of_table(table, return_results=False))


def krippendorff_alpha(ratings: Floats, level: Level) -> float | None:
    """Return Krippendorff's alpha, 1 - observed / expected disagreement, over responses with at least two ratings.

    `ratings`: (judges, responses), nan where missing. The disagreement of two ratings is 1 if they differ (nominal),
    or their squared difference (interval). None if all ratings are equal.
    """
    known = np.isfinite(ratings)
    counts = known.sum(axis=0)
    known, table, m = known[:, counts >= 2], ratings[:, counts >= 2], counts[counts >= 2].astype(np.float64)
    if not len(m):
        return None
    values = table[known]
    n = len(values)
    if level == "interval":
        x = np.where(known, table - values.mean(), 0.0)  # centred, so that sums of squares lose no digits
        # sums of squared differences over ordered pairs: within each response, and over all ratings
        within = 2 * (m * np.sum(x**2, axis=0) - np.sum(x, axis=0) ** 2)
        total = 2 * (n * np.sum((values - values.mean()) ** 2))
    else:
        labels, codes = np.unique(values, return_inverse=True)
        unit = np.nonzero(known)[1]
        tally = np.bincount(unit * len(labels) + codes, minlength=len(m) * len(labels)).reshape(len(m), len(labels))
        # numbers of ordered pairs with different labels: within each response, and over all ratings
        within = m**2 - np.sum(tally.astype(np.float64) ** 2, axis=1)
        total = float(n) ** 2 - float(np.sum(tally.sum(axis=0).astype(np.float64) ** 2))
    expected = total / (n - 1)
    return None if expected <= 1e-12 else float(1 - np.sum(within / (m - 1)) / expected)


def spearman(a: Floats, b: Floats) -> float | None:
    """Return the rank correlation, ties at their mean rank; None if a judge gave a single score."""
    from scipy.stats import rankdata

    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.clip(np.corrcoef(rankdata(a), rankdata(b))[0, 1], -1, 1))


def _complete(columns: list[ArrayLike], cluster: ArrayLike) -> tuple[Floats, Codes]:
    table = np.stack([np.asarray(c, dtype=np.float64) for c in columns])
    keep = np.all(np.isfinite(table), axis=0)
    return table[:, keep], np.unique(np.asarray(cluster)[keep], return_inverse=True)[1].astype(np.int64)


def _estimate(
    statistic: Callable[[Floats], float | None],
    table: Floats,
    codes: Codes,
    draws: int,
    seed: int,
    expected: float | None = None,
) -> Estimate:
    """Return a statistic in [-1, 1] of `table` (judges, responses), with its interval from resampled latents.

    The interval is a t interval on Fisher's scale (atanh) with the bootstrap's standard error. If the judges never
    disagree, the share of responses that could differ is bounded as for rates, and divided by the `expected`
    disagreement if that is known.
    """
    n, clusters = table.shape[1], int(codes.max()) + 1 if table.shape[1] else 0
    value = statistic(table) if n else None
    if value is None:
        return Estimate(None, None, None, n, "not defined: no variation" if n else "nothing judged by both")
    if clusters < 2:
        return Estimate(value, None, None, n, "one latent: the spread between latents is unknown", n, clusters)
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(draws):
        drawn = statistic(table[:, np.concatenate([rows[c] for c in rng.integers(0, clusters, clusters)])])
        if drawn is not None:
            resampled.append(drawn)
    if value > 1 - 1e-12 or len(resampled) < 2 or np.ptp(resampled) < 1e-12:
        if value < 1 - 1e-12 or not expected:
            return Estimate(value, None, value, n, "no spread to estimate an interval from", n, clusters)
        share = iv.no_event_bound(np.bincount(codes).astype(np.float64))
        return Estimate(value, max(-1.0, 1 - share / expected), value, n, "bound on disagreement", n, clusters)
    half = iv.t_quantile(clusters - 1) * float(np.std(resampled, ddof=1)) / (1 - value**2)
    low, high = (float(np.tanh(np.arctanh(value) + sign * half)) for sign in (-1, 1))
    beside = {"bootstrap": iv.percentile(np.array(resampled)) or (low, high)}
    return Estimate(value, low, high, n, "bootstrap over latents, t on Fisher's scale", n, clusters, beside)


def _chance_disagreement(table: Floats) -> float:
    """Return the probability that two ratings drawn at random from all ratings differ."""
    values = table[np.isfinite(table)]
    shares = np.unique(values, return_counts=True)[1] / max(len(values), 1)
    return float(1 - np.sum(shares**2))
