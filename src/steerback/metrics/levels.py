"""Peak and trend of a metric over ordered conditions, such as boosts, doses or mixes.

Each level is one condition, and all conditions have the same latents. Intervals and tests are clustered by latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.outcomes import Outcomes
from steerback.metrics.rates import METRICS, MetricResult, View, influence, view

LEAST = 10
"""Levels with fewer trials in a metric's denominator are left out of the search for the peak."""


@dataclass(frozen=True)
class Peak:
    """Position and height of a metric's maximum; [low, high] is the expanded percentile interval over latents.

    `edge` is the share of resamples whose highest level is the first or the last one; if it is large, the peak may be
    outside the measured levels. `undefined` counts the resamples in which no level defines the metric.
    """

    metric: str
    at: float
    value: float
    low: float
    high: float
    edge: float
    undefined: int = 0


@dataclass(frozen=True)
class Trend(MetricResult):
    """Least-squares slope of a metric over the levels, per unit of the level; all levels have equal weight.

    `p` is two-sided, from permuting the levels within latents. Slope and p are None if a level has no trials.
    """

    metric: str
    levels: tuple[float, ...]
    values: tuple[float | None, ...]
    slope: float | None
    low: float | None
    high: float | None
    method: str
    p: float | None
    p_method: str
    clusters: int


def find_peak(
    levels: Sequence[float], outcomes: Sequence[Outcomes], metric: str, draws: int = 2000, seed: int = 0
) -> Peak | None:
    """Return the peak of `metric` over increasing `levels`, one condition per level, clustered by latent.

    The maximum is refined by the parabola through the highest level and its two neighbours. All levels of a latent are
    resampled together, because they share prompts and seeds. Of equally high levels one is drawn at random, so that
    the interval covers a plateau. Levels with fewer than LEAST trials in the metric's denominator are left out: an
    improvement rate of 1 out of 1 is no peak. Returns None if the metric is equal at all levels or known at fewer than
    two.
    """
    sums = _sums(metric, [view(x) for x in outcomes])
    enough = sums[..., 1].sum(axis=0) >= LEAST
    sums, grid = sums[:, enough], np.asarray(levels, dtype=np.float64)[enough]
    if len(grid) < 2 or not len(sums):
        return None
    rng = np.random.default_rng(seed)
    curve = _ratio(sums.sum(axis=0)[None])
    if np.ptp(curve) == 0:
        return None
    (at,), (value,) = _vertex(grid, curve, _highest(curve, np.full(1, 0.5)))  # of equally high levels the middle one
    flat = sums.reshape(len(sums), -1)
    curves = _ratio(iv.resample_sums(flat, draws, rng).reshape(draws, len(grid), 2))
    curves = curves[np.any(np.isfinite(curves), axis=1)]
    highest = _highest(curves, rng.random(len(curves)))
    places, _ = _vertex(grid, curves, highest)
    low, high = iv.percentile(places, clusters=len(sums)) or (grid[0], grid[-1])
    edge = float(np.mean((highest == 0) | (highest == len(grid) - 1)))
    return Peak(metric, float(at), float(value), float(low), float(high), edge, draws - len(curves))


def trend(
    levels: Sequence[float],
    outcomes: Sequence[Outcomes],
    metric: str = "multi_attempt_rate",
    draws: int = 10_000,
    seed: int = 0,
) -> Trend:
    """Return the trend of `metric` over conditions measured at `levels`.

    Under the null hypothesis, the conditions of one latent are exchangeable. Raises ValueError unless there are at
    least two different levels and one condition per level.
    """
    x = np.asarray(levels, dtype=np.float64)
    if len(x) != len(outcomes) or len(np.unique(x)) < 2:
        raise ValueError(f"a trend needs one condition per level and two different levels, got {list(levels)}")
    m = METRICS[metric]
    views = [view(o) for o in outcomes]
    sums = _sums(metric, views)
    values = tuple(float(n / d) if d > 0 else None for n, d in sums.sum(axis=0))
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)  # the least-squares slope is weights @ values
    if any(v is None for v in values):
        why = "no trials at one of the levels"
        return Trend(metric, tuple(x.tolist()), values, None, None, None, why, None, why, len(sums))
    slope = float(weights @ np.array(values, dtype=np.float64))
    parts = [m.parts(v) for v in views]
    places = _places(views)
    cluster = np.concatenate(places)
    effect = np.concatenate([w * influence(num, den) for w, (num, den) in zip(weights, parts, strict=True)])
    member = np.concatenate([den > 0 for _, den in parts])
    event = member & np.concatenate([num != (np.nan if m.rest is None else m.rest) for num, _ in parts])
    reach = float(np.sum(np.abs(weights)) * (m.limits[1] - m.limits[0]))
    bounds = iv.mean_interval(
        slope,
        iv.cluster_sums(cluster, member.astype(np.float64)),
        iv.influence_variance(effect, cluster, member),
        int(event.sum()),
        len(np.unique(cluster[event])),
        (-reach, reach),
    )
    p, p_method = _permute(sums, weights, slope, draws, seed)
    return Trend(metric, tuple(x.tolist()), values, slope, *bounds, p, p_method, len(sums))


def _places(views: Sequence[View]) -> list[Codes]:
    """Return the cluster of each view's trials, numbered over the latents of all views."""
    latents = np.unique(np.concatenate([v.latents for v in views]))
    return [np.searchsorted(latents, v.latents)[v.cluster] for v in views]


def _sums(metric: str, views: Sequence[View]) -> Floats:
    """Return the sums of numerator and denominator, shape (latents, levels, 2)."""
    places = _places(views)
    n = max((int(p.max()) + 1 for p in places if len(p)), default=0)
    parts = [METRICS[metric].parts(v) for v in views]
    levels = [
        np.stack([iv.cluster_sums(place, part, n) for part in pair], axis=1)
        for place, pair in zip(places, parts, strict=True)
    ]
    return np.stack(levels, axis=1)


def _ratio(totals: Floats) -> Floats:
    """Return ratios (draws, levels) of totals (draws, levels, 2); nan where the denominator is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals[..., 1] > 0, totals[..., 0] / totals[..., 1], np.nan)


def _highest(curves: Floats, choice: Floats) -> Codes:
    """Return the index of each curve's highest level; of n equal levels, number floor(n x choice), choice in [0, 1)."""
    filled = np.where(np.isfinite(curves), curves, -np.inf)
    top = filled.max(axis=1, keepdims=True)
    ties = filled >= top - 1e-12 * np.abs(top)
    wanted = np.floor(ties.sum(axis=1) * choice) + 1
    chosen: Codes = np.argmax(ties & (np.cumsum(ties, axis=1) == wanted[:, None]), axis=1)
    return chosen


def _vertex(grid: Floats, curves: Floats, best: Codes) -> tuple[Floats, Floats]:
    """Return position and height of each curve's maximum, refined by a parabola if both neighbours are known."""
    rows = np.arange(len(curves))
    at, value = grid[best].copy(), curves[rows, best].copy()
    inner = (best > 0) & (best < len(grid) - 1)
    i, b = rows[inner], best[inner]
    x0, x1, x2 = grid[b - 1], grid[b], grid[b + 1]
    y0, y1, y2 = curves[i, b - 1], curves[i, b], curves[i, b + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        bend = (right - left) / (x2 - x0)
        x = (x0 + x1) / 2 - left / (2 * bend)
        y = y0 + (x - x0) * (left + bend * (x - x1))
    good = np.isfinite(x) & (bend < 0)
    at[i[good]], value[i[good]] = x[good], y[good]
    return at, value


def _permute(sums: Floats, weights: Floats, slope: float, draws: int, seed: int) -> tuple[float, str]:
    """Return (1 + hits) / (1 + draws) over random orders of each latent's conditions; an undefined slope is a hit."""
    moving = np.any(sums != sums[:, :1], axis=(1, 2))
    if not np.any(moving):
        return 1.0, "no latent differs between levels"
    still, sums = sums[~moving].sum(axis=0), sums[moving]  # latents without differences are constant in every draw
    rng, hits = np.random.default_rng(seed), 0
    for rows in iv.blocks(draws, 2 * sums.shape[0] * sums.shape[1]):
        order = np.argsort(rng.random((rows, *sums.shape[:2])), axis=2)
        totals = still + np.take_along_axis(sums[None], order[..., None], axis=2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = np.abs((totals[..., 0] / totals[..., 1]) @ weights)
        hits += int(np.sum(~(slopes < abs(slope) * (1 - 1e-9) - 1e-15)))
    return (1 + hits) / (1 + draws), f"levels permuted within latents, {draws} drawn"
