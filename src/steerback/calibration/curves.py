"""Fit of a falling curve to noisy scores at a few boosts, and its crossing of a target.

Pure arithmetic; this module does not know how the boosts were chosen. The curve is a logistic between two plateaus. The
plateaus are the ends of an isotonic (non-increasing) regression of the same trials, so that a curve which starts at 92
or ends at 25 is not forced through 100 and 0. If that regression crosses the target within the tried boosts, the
crossing stays within them. All functions run on many weightings of the trials at once, which makes the bootstrap fast.
docs/calibration.md compares the curve and its intervals with isotonic interpolation, a plain logistic and the bisection
posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAW_SHAPE = 0.6
"""Shape of the gamma weights of a bootstrap draw. 1 is the Bayesian bootstrap (Rubin, 1981). Its intervals cover too
little, because it ignores that the boosts depend on the scores. Variance 1 / 0.6 covers 93 %
(docs/calibration.md)."""
RIDGE = 0.002
"""Weak ridge penalty towards a slope of -3 per `scale`, which keeps the slope finite if the data are a clean step."""


@dataclass(frozen=True, slots=True, eq=False)
class Logistic:
    """score(x) = floor + (ceiling - floor) * sigmoid(level + slope * (x - centre) / scale), one per row, 0-100."""

    centre: float
    scale: float
    level: Floats  # (rows,)
    slope: Floats  # (rows,), negative
    floor: Floats  # (rows,)
    ceiling: Floats  # (rows,)

    def score(self, boost: float | Floats) -> Floats:
        """Fitted scores at `boost`, (rows,)."""
        return self.floor + (self.ceiling - self.floor) * _sigmoid(
            self.level + self.slope * (boost - self.centre) / self.scale
        )

    def crossing(self, target: float) -> Floats:
        """Return the boost at which each row meets `target`, (rows,), limited to targets between the plateaus."""
        share = (target - self.floor) / (self.ceiling - self.floor)
        return self.centre + self.scale * (np.log(share / (1 - share)) - self.level) / self.slope

    def rows(self, chosen: slice) -> Logistic:
        """Return some rows."""
        columns = (self.level, self.slope, self.floor, self.ceiling)
        return Logistic(self.centre, self.scale, *(column[chosen] for column in columns))


@dataclass(frozen=True, slots=True, eq=False)
class FallingFit:
    """Crossing of the fitted curve with the target: `boost` with its 95 % interval, clipped to the search range.

    The interval is the union of the bootstrap interval and the step of the isotonic fit, because a cliff is steeper
    than any fitted logistic.

    `side` is "above" or "below" if the pooled trials never cross the target.
    """

    boost: float
    low: float
    high: float
    side: Literal["above", "below"] | None
    boosts: Floats  # (g,) distinct boosts, rising
    curve: Logistic  # one row
    drawn: Logistic  # one row per bootstrap draw

    def score(self, boost: float) -> float:
        """Fitted mean score at `boost`, 0-100."""
        return float(self.curve.score(boost)[0])

    def score_se(self, boost: float) -> float:
        """Bootstrap standard error of `score(boost)`, points."""
        return float(self.drawn.score(boost).std())

    def bracket(self, boost: float) -> tuple[float, float]:
        """Return the nearest tried boosts below and above `boost`, or the outermost one if there is none."""
        below, above = self.boosts[self.boosts <= boost], self.boosts[self.boosts >= boost]
        return float(below[-1] if below.size else self.boosts[0]), float(above[0] if above.size else self.boosts[-1])


def fit_falling(
    boosts: Floats,
    scores: Floats,
    target: float,
    bounds: tuple[float, float],
    scale: float,
    draws: int = 1000,
    seed: int = 0,
) -> FallingFit:
    """Fit trials (`boosts`, `scores` 0-100: one entry each, shape (trials,)) and return the crossing of `target`.

    `scale` is the order of magnitude of boosts over which scores change (the sd of the boost prior).
    """
    places, group = np.unique(boosts, return_inverse=True)
    member = np.zeros((len(boosts), len(places)))
    member[np.arange(len(boosts)), group] = 1.0
    generator = np.random.default_rng(seed)
    drawn = generator.gamma(DRAW_SHAPE, size=(draws, len(boosts))) / DRAW_SHAPE
    sums = []
    for weights in (np.ones((1, len(boosts))), np.maximum(drawn, 1e-9)):
        totals = weights @ member
        sums.append((totals, (weights * scores) @ member / totals))
    # all trials are the first row and the draws the others: one fit of all rows takes half the time of two
    totals, means = (np.concatenate(columns) for columns in zip(*sums, strict=True))
    pooled = falling_means(totals, means)
    fitted = _fit_logistic(places, totals, means, pooled, target, scale)
    low, high = bounds
    crossings = np.clip(_within_tried(fitted.crossing(target), places, pooled, target), low, high)
    left, right = _step(places, pooled[0], target, bounds)
    return FallingFit(
        boost=float(crossings[0]),
        low=min(float(np.quantile(crossings[1:], 0.025)), left),
        high=max(float(np.quantile(crossings[1:], 0.975)), right),
        side="above" if pooled[0].min() > target else "below" if pooled[0].max() < target else None,
        boosts=places,
        curve=fitted.rows(slice(0, 1)),
        drawn=fitted.rows(slice(1, None)),
    )


def falling_means(weights: Floats, means: Floats) -> Floats:
    """Weighted least-squares fit that never rises, per row: min over i <= k of max over j >= k of mean(i..j).

    `weights`, `means`: (rows, g), weights positive; returns (rows, g). The min-max form of isotonic regression is
    quadratic in g (about 12 to 24) and runs on all rows at once.
    """
    rows, g = means.shape
    edge = np.zeros((rows, 1))
    mass = np.concatenate([edge, np.cumsum(weights, axis=1)], axis=1)
    sums = np.concatenate([edge, np.cumsum(weights * means, axis=1)], axis=1)
    valid = np.arange(g)[:, None] <= np.arange(g)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        average = (sums[:, None, 1:] - sums[:, :-1, None]) / (mass[:, None, 1:] - mass[:, :-1, None])
    # Ranges with j < i are not valid; -inf removes them from the maximum.
    average = np.where(valid, average, -np.inf)
    best = np.maximum.accumulate(average[:, :, ::-1], axis=2)[:, :, ::-1]  # max over j >= k, for each i
    fitted: Floats = np.where(valid, best, np.inf).min(axis=1)
    return fitted


def _within_tried(crossings: Floats, places: Floats, fitted: Floats, target: float) -> Floats:
    """Return `crossings` (rows,), clipped to the tried boosts in rows whose isotonic fit crosses the target there.

    A nearly flat logistic would place the crossing far outside, which contradicts the data.
    """
    crosses = (fitted.max(axis=1) >= target) & (fitted.min(axis=1) <= target)
    return np.where(crosses, np.clip(crossings, places[0], places[-1]), crossings)


def _step(places: Floats, fitted: Floats, target: float, bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the boosts between which the isotonic fit (g,) steps over `target`, the place of a possible cliff."""
    reached = int((fitted >= target).sum())
    left = float(places[reached - 1]) if reached else bounds[0]
    right = float(places[reached]) if reached < len(places) else bounds[1]
    return left, right


def _fit_logistic(
    places: Floats, totals: Floats, means: Floats, fitted: Floats, target: float, scale: float, steps: int = 30
) -> Logistic:
    """Fit level and slope by quasi-binomial Newton steps with a ridge on the slope, all rows at once.

    The plateaus are the ends of the isotonic fit, but at least halfway from the target to 100 and to 0, because scores
    near the target give no information about plateaus.
    """
    # Plateaus at least this far from the target also keep the division below well defined.
    ceiling = np.maximum(fitted[:, 0], (100.0 + target) / 2)
    floor = np.minimum(fitted[:, -1], target / 2)
    y = np.clip((means - floor[:, None]) / (ceiling - floor)[:, None], 0.0, 1.0)
    centre = float(np.median(places))
    z = (places - centre) / scale
    level, slope = np.zeros(len(means)), np.full(len(means), -3.0)
    for _ in range(steps):
        p = _sigmoid(level[:, None] + slope[:, None] * z)
        curvature, residual = totals * p * (1 - p), totals * (y - p)
        g0, g1 = residual.sum(axis=1), (residual * z).sum(axis=1) - RIDGE * (slope + 3)
        h00, h01 = curvature.sum(axis=1) + 1e-4, (curvature * z).sum(axis=1)
        h11 = (curvature * z * z).sum(axis=1) + RIDGE
        determinant = h00 * h11 - h01**2
        d0, d1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        # Saturated rows overshoot, so limit the step: at most 3 in the level, and at most the slope's size in the
        # slope.
        limit = np.minimum(3 / np.maximum(np.abs(d0), 3), np.maximum(-slope, 1) / np.maximum(np.abs(d1), -slope + 1e-9))
        step = np.minimum(1.0, limit)
        level = level + step * d0
        # A falling curve needs a negative slope, so that the crossing is unique.
        slope = np.minimum(slope + step * d1, -0.05)
    return Logistic(centre, scale, level, slope, floor, ceiling)


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return out


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % t interval for the mean of scores in 0-100, clipped to that range.

    The variance is shrunk towards that of a yes/no score with the same mean (two pseudo-trials), so that a few equal
    scores do not give a zero-width interval.
    """
    from scipy.special import stdtrit

    n = len(scores)
    values = np.asarray(scores, dtype=float) / 100.0
    mean = float(values.mean())
    centre = (n * mean + 0.5) / (n + 1)
    variance = (float(((values - mean) ** 2).sum()) + 2 * centre * (1 - centre)) / (n + 1)
    half = float(stdtrit(max(n - 1, 1), 0.975)) * math.sqrt(variance / n)
    return 100 * max(mean - half, 0.0), 100 * min(mean + half, 1.0)
