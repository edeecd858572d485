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


@dataclass(frozen=True)
class Peak:
    """Position and height of a metric's maximum; [low, high] is the percentile interval over resampled latents.

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
    latent are resampled together, since they share prompts and seeds. None where the metric is the same everywhere
    (such as no event at any level) or known at fewer than two levels.
    """
    sums = _sums([view_parts(METRICS[metric], x) for x in outcomes])  # (clusters, levels, 2)
    if not len(sums):
        return None
    grid = np.asarray(levels, dtype=np.float64)
    curve = _ratio(sums.sum(axis=0)[None])
    known = curve[np.isfinite(curve)]
    if len(known) < 2 or np.ptp(known) == 0:
        return None
    (at,), (value,) = _vertex(grid, curve)
    flat = sums.reshape(len(sums), -1)
    drawn = iv.resample_sums(flat, draws, np.random.default_rng(seed)).reshape(draws, len(grid), 2)
    curves = _ratio(drawn)
    curves = curves[np.any(np.isfinite(curves), axis=1)]
    places, _ = _vertex(grid, curves)
    low, high = iv.percentile(places) or (grid[0], grid[-1])
    highest = _highest(curves)
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


def _highest(curves: Floats) -> NDArray[np.intp]:
    """Index of each curve's highest level; the middle one where several are equal."""
    filled = np.where(np.isfinite(curves), curves, -np.inf)
    ties = filled == filled.max(axis=1, keepdims=True)
    rank = np.cumsum(ties, axis=1)
    wanted = (ties.sum(axis=1, keepdims=True) + 1) // 2
    chosen: NDArray[np.intp] = np.argmax(ties & (rank == wanted), axis=1)
    return chosen


def _vertex(grid: Floats, curves: Floats) -> tuple[Floats, Floats]:
    """Position and height of each curve's maximum, refined by a parabola where both neighbours are known."""
    best = _highest(curves)
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
