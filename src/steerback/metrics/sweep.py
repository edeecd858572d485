"""Where along a swept quantity a metric peaks, with an interval; knows arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.outcomes import VALID, Outcomes
from steerback.metrics.rates import METRICS, Metric, view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


LEAST = 10  # trials in a metric's denominator


@dataclass(frozen=True)
class Peak:
    """Position and height of a metric's maximum; [low, high] is the expanded percentile interval over latents.

    `edge` is the share of resamples whose highest level is the first or the last one: where it is large, the peak may
    lie outside the levels that were measured. `undefined` resamples had the metric at no level.
    """

    metric: str
    at: float
    value: float
    low: float
    high: float
    edge: float
    undefined: int = 0


def find_peak(
    levels: Sequence[float], outcomes: Sequence[Outcomes], metric: str, draws: int = 2000, seed: int = 0
) -> Peak | None:
    """The peak of `metric` over increasing `levels`, one condition per level, clustered by latent.

    Each curve's maximum is refined by the parabola through the highest level and its two neighbours. All levels of a
    latent are resampled together, since they share prompts and seeds; equally high levels are drawn from at random,
    so that the interval spans a plateau. Levels with fewer than LEAST trials in the metric's denominator take no part:
    an improvement rate of 1 out of 1 is no peak. None where the metric is the same at all levels (such as no event
    anywhere) or known at fewer than two.
    """
    sums = _sums([view_parts(METRICS[metric], x) for x in outcomes])  # (clusters, levels, 2)
    enough = sums[..., 1].sum(axis=0) >= LEAST
    sums, grid = sums[:, enough], np.asarray(levels, dtype=np.float64)[enough]
    if len(grid) < 2 or not len(sums):
        return None
    rng = np.random.default_rng(seed)
    curve = _ratio(sums.sum(axis=0)[None])
    if np.ptp(curve) == 0:
        return None
    (at,), (value,) = _vertex(grid, curve, _highest(curve, np.full(1, 0.5)))
    flat = sums.reshape(len(sums), -1)
    curves = _ratio(iv.resample_sums(flat, draws, rng).reshape(draws, len(grid), 2))
    curves = curves[np.any(np.isfinite(curves), axis=1)]
    highest = _highest(curves, rng.random(len(curves)))
    places, _ = _vertex(grid, curves, highest)
    low, high = iv.percentile(places, clusters=len(sums)) or (grid[0], grid[-1])
    edge = float(np.mean((highest == 0) | (highest == len(grid) - 1)))
    return Peak(metric, float(at), float(value), float(low), float(high), edge, draws - len(curves))


def view_parts(metric: Metric, outcomes: Outcomes) -> tuple[NDArray[np.int64], Floats, Floats]:
    """(cluster code, numerator, denominator) of the headline's trials, every array of shape (n_valid,)."""
    v = view(outcomes)
    codes = np.unique(outcomes.cluster[(outcomes.state == VALID) & ~outcomes.degraded])
    return codes[v.cluster], *metric.parts(v)


def _sums(parts: Sequence[tuple[NDArray[np.int64], Floats, Floats]]) -> Floats:
    codes = np.unique(np.concatenate([cluster for cluster, _, _ in parts]))
    table = np.zeros((len(codes), len(parts), 2))
    for level, (cluster, *columns) in enumerate(parts):
        place = np.searchsorted(codes, cluster)
        for i, values in enumerate(columns):
            table[:, level, i] = iv.cluster_sums(place, values, len(codes))
    return table


def _ratio(totals: Floats) -> Floats:
    """(draws, levels) from (draws, levels, 2); nan where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(totals[..., 1] > 0, totals[..., 0] / totals[..., 1], np.nan)


def _highest(curves: Floats, choice: Floats) -> NDArray[np.intp]:
    """Index of each curve's highest level; among n equal ones number floor(n x choice), choice in [0, 1)."""
    filled = np.where(np.isfinite(curves), curves, -np.inf)
    top = filled.max(axis=1, keepdims=True)
    ties = filled >= top - 1e-12 * np.abs(top)
    wanted = np.floor(ties.sum(axis=1) * choice) + 1
    chosen: NDArray[np.intp] = np.argmax(ties & (np.cumsum(ties, axis=1) == wanted[:, None]), axis=1)
    return chosen


def _vertex(grid: Floats, curves: Floats, best: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Position and height of each curve's maximum, refined by a parabola where both neighbours are known."""
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
