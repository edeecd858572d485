"""Recovery without a restart phrase, from the relevance scores of a response's windows in order.

A response has recovered if an early window is off topic and every late window is on topic. The probability of this by
chance is exact: the share of all orders of the same windows that satisfy the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from steerback.metrics.intervals import Codes, Flags, Floats
from steerback.metrics.rates import Estimate, MetricResult
from steerback.metrics.regions import mean_of, rate_of

BINS = 20
"""Number of positions of the time course."""


@dataclass(frozen=True)
class Rule:
    """Thresholds of recovery.

    A window with a score of at most `low` is off topic, one of at least `high` is on topic. `early` is the share of
    windows that count as early. Responses with fewer than `least` windows are left out.
    """

    low: float = 30.0
    high: float = 70.0
    early: float = 0.67
    least: int = 4

    def first_late(self, windows: int) -> int:
        """Return the number of early windows: at least one, and fewer than all."""
        return min(max(int(self.early * windows), 1), windows - 1)


@dataclass(frozen=True, eq=False)
class Series:
    """Window scores (0-100) and clusters of n responses; `single` marks the responses with one attempt."""

    scores: Sequence[Floats]
    cluster: Codes
    single: Flags


@dataclass(frozen=True)
class Recovery(MetricResult):
    """Recovery in one condition, over the `n` responses with enough windows; `short` counts the others.

    `silent`: share that recovered within a single attempt, so without a restart phrase. `shuffled`: expected share for
    windows in random order; `above` is `recovered` minus `shuffled`. `course`: mean score at BINS positions from the
    first window to the last.
    """

    n: int
    short: int
    recovered: Estimate
    silent: Estimate
    shuffled: Estimate
    above: Estimate
    course: Sequence[Estimate]


def recovery(series: Series, rule: Rule) -> Recovery:
    """Return the recovery of a condition, with intervals clustered by latent."""
    long = np.array([len(s) >= rule.least for s in series.scores], dtype=bool)
    scores = [s for s, kept in zip(series.scores, long, strict=True) if kept]
    cluster, single = series.cluster[long], series.single[long]
    yes, chance = recovered(scores, rule).astype(np.float64), by_chance(scores, rule)
    return Recovery(
        n=len(scores),
        short=int(np.sum(~long)),
        recovered=rate_of(yes, cluster),
        silent=rate_of(yes * single, cluster),
        shuffled=mean_of(chance, cluster, (0.0, 1.0)),
        above=mean_of(yes - chance, cluster, (-1.0, 1.0)),
        course=course(scores, cluster),
    )


def recovered(scores: Sequence[Floats], rule: Rule) -> Flags:
    """Return for each response whether it recovered: an early window <= `low`, all late windows >= `high`."""
    if not scores:
        return np.zeros(0, dtype=bool)
    lengths, flat, starts = _flat(scores)
    late = starts + np.array([rule.first_late(n) for n in lengths])
    lowest = np.minimum.reduceat(flat, np.stack([starts, late], axis=1).ravel()).reshape(-1, 2)
    flags: Flags = (lowest[:, 0] <= rule.low) & (lowest[:, 1] >= rule.high)
    return flags


def by_chance(scores: Sequence[Floats], rule: Rule) -> Floats:
    """Return for each response the share of all orders of its windows in which it would have recovered.

    In such an order all late windows are high. Every low window is then early, so one low window is enough.
    """
    if not scores:
        return np.zeros(0)
    lengths, flat, starts = _flat(scores)
    high = np.add.reduceat((flat >= rule.high).astype(np.int64), starts)
    low = np.minimum.reduceat(flat, starts) <= rule.low
    late = [n - rule.first_late(n) for n in lengths]
    return np.where(low, [comb(h, k) / comb(n, k) for h, k, n in zip(high.tolist(), late, lengths, strict=True)], 0.0)


def _flat(scores: Sequence[Floats]) -> tuple[list[int], Floats, Codes]:
    """Return the number of windows of each response, the concatenated windows, and the start of each response."""
    lengths = [len(s) for s in scores]
    return lengths, np.concatenate(scores), np.cumsum([0, *lengths[:-1]])


def course(scores: Sequence[Floats], cluster: Codes, bins: int = BINS) -> list[Estimate]:
    """Return the mean score at `bins` relative positions; each response contributes the score of its window there."""
    positions = (np.arange(bins) + 0.5) / bins
    at = np.zeros((0, bins))
    if scores:
        lengths, flat, starts = _flat(scores)
        at = flat[starts[:, None] + (positions * np.array(lengths)[:, None]).astype(np.int64)]
    return [mean_of(at[:, k], cluster, (0.0, 100.0)) for k in range(bins)]
