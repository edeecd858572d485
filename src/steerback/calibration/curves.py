"""A falling curve through noisy scores at a few boosts, and where it crosses a target.

Arithmetic alone: it knows nothing of how the boosts were chosen. The curve is the centred isotonic regression of
Oron and Flournoy (2017): pool neighbouring boosts until the means fall, put each pooled mean at the weighted centre of
its boosts, and interpolate linearly. Intervals come from the Bayesian bootstrap over trials (Rubin, 1981), so that a
boost with a single trial still carries uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class MonotoneFit:
    """Where the curve crosses the target: `boost` with its 95 % interval, clipped to the search range.

    `side` is "above" or "below" when the fitted curve never crosses (it stays on that side of the target).
    """

    boost: float
    low: float
    high: float
    side: Literal["above", "below"] | None
    boosts: Floats  # (g,) distinct boosts, rising
    scores: Floats  # (g,) fitted scores, falling
    drawn: Floats  # (draws, g) fitted scores of the bootstrap draws

    def score(self, boost: float) -> float:
        """Fitted score at `boost`, held constant outside the boosts tried."""
        return float(np.interp(boost, self.boosts, self.scores))

    def score_se(self, boost: float) -> float:
        """Bootstrap standard error of `score(boost)`."""
        right = int(np.clip(np.searchsorted(self.boosts, boost), 1, max(len(self.boosts) - 1, 1)))
        if len(self.boosts) == 1:
            return float(self.drawn[:, 0].std())
        a, b = self.boosts[right - 1], self.boosts[right]
        share = float(np.clip((boost - a) / (b - a), 0.0, 1.0))
        return float(((1 - share) * self.drawn[:, right - 1] + share * self.drawn[:, right]).std())

    def gap(self, boost: float) -> float:
        """Distance between the tried boosts on either side of `boost`."""
        below, above = self.boosts[self.boosts <= boost], self.boosts[self.boosts >= boost]
        return float(above[0] - below[-1]) if below.size and above.size else math.inf


def fit_falling(
    boosts: Floats, scores: Floats, target: float, bounds: tuple[float, float], draws: int = 1000, seed: int = 0
) -> MonotoneFit:
    """Fits trials (`boosts`, `scores`: one entry each, shape (trials,)) and finds the crossing of `target`."""
    places, group = np.unique(boosts, return_inverse=True)
    member = np.zeros((len(boosts), len(places)))
    member[np.arange(len(boosts)), group] = 1.0
    fitted = falling_means(*_group(np.ones((1, len(boosts))), scores, member))
    weights = np.random.default_rng(seed).exponential(size=(draws, len(boosts)))
    totals, means = _group(weights, scores, member)
    drawn = falling_means(totals, means)
    low, high = bounds
    at = crossing(places, fitted, member.sum(axis=0)[None], target)[0]
    many = np.clip(crossing(places, drawn, totals, target), low, high)
    return MonotoneFit(
        boost=float(np.clip(at, low, high)),
        low=float(np.quantile(many, 0.025)),
        high=float(np.quantile(many, 0.975)),
        side="above" if at == np.inf else "below" if at == -np.inf else None,
        boosts=places,
        scores=fitted[0],
        drawn=drawn,
    )


def _group(weights: Floats, scores: Floats, member: Floats) -> tuple[Floats, Floats]:
    """Weight and weighted mean score at each boost, for each row of `weights`: two arrays (rows, g)."""
    totals = weights @ member
    return totals, (weights * scores) @ member / totals


def falling_means(weights: Floats, means: Floats) -> Floats:
    """Weighted least-squares fit that never rises, per row: min over i <= k of max over j >= k of mean(i..j).

    `weights`, `means`: (rows, g), weights positive; returns (rows, g). The min-max form of isotonic regression is
    quadratic in g (a dozen or two) and runs on all rows at once.
    """
    rows, g = means.shape
    edge = np.zeros((rows, 1))
    mass = np.concatenate([edge, np.cumsum(weights, axis=1)], axis=1)
    sums = np.concatenate([edge, np.cumsum(weights * means, axis=1)], axis=1)
    start, end = np.arange(g)[:, None], np.arange(g)[None, :]
    valid = start <= end
    with np.errstate(invalid="ignore", divide="ignore"):
        average = (sums[:, None, 1:] - sums[:, :-1, None]) / (mass[:, None, 1:] - mass[:, :-1, None])
    average = np.where(valid, average, -np.inf)
    best = np.maximum.accumulate(average[:, :, ::-1], axis=2)[:, :, ::-1]  # max over j >= k, for each i
    fitted: Floats = np.where(valid, best, np.inf).min(axis=1)
    return fitted


def crossing(boosts: Floats, fitted: Floats, weights: Floats, target: float) -> Floats:
    """Boost at which each fitted curve meets `target`; +inf where it stays above, -inf where it stays below.

    `boosts` (g,), `fitted` and `weights` (rows, g); returns (rows,). Pooled boosts stand at their weighted centre.
    """
    g = len(boosts)
    reached = (fitted >= target).sum(axis=1)
    left = np.take_along_axis(fitted, np.maximum(reached - 1, 0)[:, None], axis=1)
    right = np.take_along_axis(fitted, np.minimum(reached, g - 1)[:, None], axis=1)
    centres = []
    for level in (left, right):
        pooled = weights * np.isclose(fitted, level, rtol=0.0, atol=1e-9)
        centres.append((pooled * boosts).sum(axis=1) / pooled.sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip((left - target) / (left - right), 0.0, 1.0)[:, 0]
    at = centres[0] + share * (centres[1] - centres[0])
    at = np.where(reached == g, np.where(left[:, 0] == target, centres[0], np.inf), at)
    return np.where(reached == 0, -np.inf, at)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % t interval for the mean of scores in 0-100, clipped to that range.

    The variance is shrunk towards that of a yes/no score with the same mean (two pseudo-trials), so that a handful of
    equal scores does not claim certainty.
    """
    from scipy.stats import t

    n = len(scores)
    values = np.asarray(scores, dtype=float) / 100.0
    mean = float(values.mean())
    centre = (n * mean + 0.5) / (n + 1)
    variance = (float(((values - mean) ** 2).sum()) + 2 * centre * (1 - centre)) / (n + 1)
    half = float(t.ppf(0.975, max(n - 1, 1))) * math.sqrt(variance / n)
    return 100 * max(mean - half, 0.0), 100 * min(mean + half, 1.0)
