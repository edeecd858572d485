"""Recovery without a restart phrase, from the relevance scores of a response's windows in order.

A response has recovered if an early window is off topic and every late window is on topic. The probability of this by
chance is exact: the share of all orders of the same windows that satisfy the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
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

    def first_late(self, windows: Codes) -> Codes:
        """Return the number of early windows of responses with so many windows: at least one, and fewer than all."""
        return np.minimum(np.maximum((self.early * windows).astype(np.int64), 1), windows - 1)


@dataclass(frozen=True, eq=False)
class Windows:
    """Window scores (0-100) of n responses: the `lengths` are their numbers of windows, `flat` has all scores in order.

    Each response has at least one window.
    """

    lengths: Codes
    flat: Floats

    @staticmethod
    def of(scores: Iterable[Sequence[float]]) -> Windows:
        """Return the windows of responses from the scores of each."""
        scores = list(scores)
        lengths = np.array([len(s) for s in scores], dtype=np.int64)
        return Windows(lengths, np.fromiter(chain.from_iterable(scores), np.float64, int(lengths.sum())))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> Codes:
        """First window of each response."""
        return np.cumsum(self.lengths) - self.lengths

    def take(self, kept: Flags) -> Windows:
        """Return the responses that a mask keeps."""
        return Windows(self.lengths[kept], self.flat[np.repeat(kept, self.lengths)])

    def recovered(self, rule: Rule) -> Flags:
        """Return for each response whether it recovered: an early window <= `low`, all late windows >= `high`."""
        if not len(self):
            return np.zeros(0, dtype=bool)
        late = self.starts + rule.first_late(self.lengths)
        lowest = np.minimum.reduceat(self.flat, np.stack([self.starts, late], axis=1).ravel()).reshape(-1, 2)
        flags: Flags = (lowest[:, 0] <= rule.low) & (lowest[:, 1] >= rule.high)
        return flags

    def by_chance(self, rule: Rule) -> Floats:
        """Return for each response the share of all orders of its windows in which it would have recovered.

        In such an order all late windows are high. Every low window is then early, so one low window is enough.
        """
        if not len(self):
            return np.zeros(0)
        high = np.add.reduceat((self.flat >= rule.high).astype(np.int64), self.starts)
        low = np.minimum.reduceat(self.flat, self.starts) <= rule.low
        late = self.lengths - rule.first_late(self.lengths)
        counts = zip(high.tolist(), late.tolist(), self.lengths.tolist(), strict=True)
        return np.where(low, [_all_high(*count) for count in counts], 0.0)

    def course(self, cluster: Codes, bins: int = BINS) -> list[Estimate]:
        """Return the mean score at `bins` relative positions; each response contributes the score of its window
        there.
        """
        positions = (np.arange(bins) + 0.5) / bins
        at = np.zeros((0, bins))
        if len(self):
            at = self.flat[self.starts[:, None] + (positions * self.lengths[:, None]).astype(np.int64)]
        return [mean_of(at[:, k], cluster, (0.0, 100.0)) for k in range(bins)]


@dataclass(frozen=True, eq=False)
class Series:
    """Windows and clusters of n responses; `single` marks the responses with one attempt."""

    windows: Windows
    cluster: Codes
    single: Flags

    @staticmethod
    def concat(parts: Sequence[Series]) -> Series:
        """Concatenate at least one part of a condition."""
        windows = [part.windows for part in parts]
        return Series(
            Windows(np.concatenate([w.lengths for w in windows]), np.concatenate([w.flat for w in windows])),
            np.concatenate([part.cluster for part in parts]),
            np.concatenate([part.single for part in parts]),
        )


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
    long = series.windows.lengths >= rule.least
    windows = series.windows.take(long)
    cluster, single = series.cluster[long], series.single[long]
    yes, chance = windows.recovered(rule).astype(np.float64), windows.by_chance(rule)
    return Recovery(
        n=len(windows),
        short=int(np.sum(~long)),
        recovered=rate_of(yes, cluster),
        silent=rate_of(yes * single, cluster),
        shuffled=mean_of(chance, cluster, (0.0, 1.0)),
        above=mean_of(yes - chance, cluster, (-1.0, 1.0)),
        course=windows.course(cluster),
    )


@lru_cache(4096)
def _all_high(high: int, late: int, windows: int) -> float:
    """Return the share of all orders of the windows in which all late ones are among the high ones."""
    return comb(high, late) / comb(windows, late)
