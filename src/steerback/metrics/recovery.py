"""Recovery without regard to restart phrases: from the relevance of a response's windows, one after the other.

A response has recovered if one of its early windows is off the prompt and every later one is on it. How often that
happens by chance is known exactly: it is the share of all orders of the same windows in which it is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb

import numpy as np
from pydantic import JsonValue

from steerback.metrics.intervals import Codes, Flags, Floats
from steerback.metrics.rates import Estimate
from steerback.metrics.regions import mean_of, rate_of

BINS = 20
"""Positions of the time course."""


@dataclass(frozen=True)
class Rule:
    """Thresholds of recovery: `early` is the share of the windows that are early, `least` the fewest windows."""

    low: float = 30.0
    high: float = 70.0
    early: float = 0.67
    least: int = 4

    def first_late(self, windows: int) -> int:
        """Return the number of early windows: at least one, and not all."""
        return min(max(int(self.early * windows), 1), windows - 1)


@dataclass(frozen=True, eq=False)
class Series:
    """Window scores (0-100) of n responses with their clusters; `single`: those with one attempt."""

    scores: Sequence[Floats]
    cluster: Codes
    single: Flags


@dataclass(frozen=True)
class Recovery:
    """Recovery in one condition, over the `n` responses with enough windows; `short` ones are left out.

    `silent`: recovered in a single attempt, so without a restart phrase. `shuffled`: the share that windows in random
    order would show; `above` is `recovered` minus that. `course` is the mean score at BINS positions from the first
    window to the last.
    """

    n: int
    short: int
    recovered: Estimate
    silent: Estimate
    shuffled: Estimate
    above: Estimate
    course: Sequence[Estimate]

    def to_json(self) -> dict[str, JsonValue]:
        """Plain dicts, lists and numbers."""
        return asdict(self)


def recovery(series: Series, rule: Rule) -> Recovery:
    """Return the recovery of a condition, with intervals clustered by latent."""
    long = np.array([len(s) >= rule.least for s in series.scores], dtype=bool)
    scores = [s for s, kept in zip(series.scores, long, strict=True) if kept]
    cluster, single = series.cluster[long], series.single[long]
    yes = np.array([has_recovered(s, rule) for s in scores], dtype=np.float64)
    chance = np.array([by_chance(s, rule) for s in scores], dtype=np.float64)
    return Recovery(
        n=len(scores),
        short=int(np.sum(~long)),
        recovered=rate_of(yes, cluster),
        silent=rate_of(yes * single, cluster),
        shuffled=mean_of(chance, cluster, (0.0, 1.0)),
        above=mean_of(yes - chance, cluster, (-1.0, 1.0)),
        course=course(scores, cluster),
    )


def has_recovered(scores: Floats, rule: Rule) -> bool:
    """Return whether an early window is at most `low` and every later one at least `high`."""
    late = rule.first_late(len(scores))
    return bool(scores[:late].min() <= rule.low and scores[late:].min() >= rule.high)


def by_chance(scores: Floats, rule: Rule) -> float:
    """Return the share of all orders of these windows in which the response has recovered.

    All late windows have to be high; then every low one is early, so it is enough that there is one.
    """
    n, late = len(scores), len(scores) - rule.first_late(len(scores))
    high = int(np.sum(scores >= rule.high))
    return comb(high, late) / comb(n, late) if scores.min() <= rule.low else 0.0


def course(scores: Sequence[Floats], cluster: Codes, bins: int = BINS) -> list[Estimate]:
    """Return the mean score at `bins` relative positions, each response having the score of the window there."""
    positions = (np.arange(bins) + 0.5) / bins
    at = np.array([s[(positions * len(s)).astype(np.int64)] for s in scores], dtype=np.float64).reshape(-1, bins)
    return [mean_of(at[:, k], cluster, (0.0, 100.0)) for k in range(bins)]
