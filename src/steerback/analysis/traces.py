"""Lead times of the detectors: tokens from their onset to the first token of the correction (Fig. 7).

The onset rule is fixed before the measurement. The summed activation is averaged over the last `window` tokens (never
later ones). The onset is the first token at which this running mean exceeds the quantile `quantile` of its maximum in
unsteered responses. The same rule applies to responses without a restart, cut at the same position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steerback.analysis.base import Results, planted
from steerback.analysis.episodes import Recorded, Trace, controls_of, recorded_targets
from steerback.metrics import Estimate
from steerback.metrics.intervals import Floats
from steerback.metrics.regions import mean_of, median_of, rate_of
from steerback.store.facts import DETECTORS
from steerback.store.ledger import Ledger

ARMS = ("episodes", "steered without restart", "unsteered")


class OnsetOptions(Protocol):
    """Options that the analysis uses."""

    @property
    def drift_below(self) -> float: ...
    @property
    def window(self) -> int: ...
    @property
    def quantile(self) -> float: ...
    @property
    def show(self) -> int: ...
    @property
    def trials(self) -> list[int] | None: ...


@dataclass(frozen=True, eq=False)
class Leads:
    """Onsets of a target's n episodes.

    `lead` (n,): tokens from onset to correction, nan if there is no onset before the correction. `onset` and `last` map
    each of ARMS to (n,): whether there is an onset before the correction, and whether the activity exceeds the
    threshold at the last token before it. For controls the value is the share of the episode's controls
    (`episodes.controls_of`), nan without controls.
    """

    threshold: float
    cluster: NDArray[np.int64]
    lead: Floats
    onset: Mapping[str, Floats]
    last: Mapping[str, Floats]

    def estimates(self, draws: int) -> dict[str, Estimate]:
        """Return lead times in tokens and shares of responses, clustered by latent."""
        estimates = {
            "median lead": median_of(self.lead, self.cluster, draws),
            "mean lead": mean_of(self.lead, self.cluster, (0.0, np.inf)),
        }
        for name, shares in (("onset", self.onset), ("active at last token", self.last)):
            episodes = shares[ARMS[0]]
            estimates[f"{name}, {ARMS[0]}"] = rate_of(episodes, self.cluster)
            for arm in ARMS[1:]:
                estimates[f"{name}, {arm}"] = mean_of(shares[arm], self.cluster, (0.0, 1.0))
            for arm in ARMS[1:]:
                difference = mean_of(episodes - shares[arm], self.cluster, (-1.0, 1.0))
                estimates[f"{name}, {ARMS[0]} − {arm}"] = difference
        return estimates


@dataclass(frozen=True, eq=False)
class TraceResults(Results):
    """Per target: recorded responses, onsets, estimates by name, and the episodes for the figure.

    `window` is the number of tokens in the running mean, `rule` describes the onset rule. An attempt that scores below
    `drift_below` is off-topic.
    """

    judge: str
    window: int
    rule: str
    recorded: Mapping[str, Recorded]
    leads: Mapping[str, Leads]
    estimates: Mapping[str, Mapping[str, Estimate]]
    examples: Mapping[str, Sequence[Trace]]
    drift_below: float
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return {
            "experiment": "traces",
            "judge": self.judge,
            "rule": self.rule,
            "targets": {
                target: {
                    "counts": recorded.counts,
                    "onset_threshold": self.leads[target].threshold,
                    "lead": {name: asdict(e) for name, e in self.estimates[target].items()},
                }
                for target, recorded in self.recorded.items()
            },
        }


def analyse(ledger: Ledger, judge: str, draws: int, options: OnsetOptions) -> TraceResults:
    """Return lead times of all episodes with intervals, and how often controls have an onset at the same positions."""
    recorded = recorded_targets(ledger, judge, options.drift_below)
    leads = {target: lead_times(r, options.window, options.quantile) for target, r in recorded.items()}
    rule = (
        f"onset: the detectors' sum, averaged over the last {options.window} tokens, first exceeds what "
        f"{options.quantile:.0%} of the unsteered responses never reach"
    )
    return TraceResults(
        judge,
        options.window,
        rule,
        recorded,
        leads,
        {target: x.estimates(draws) for target, x in leads.items()},
        {target: choose(r.episodes, options.show, options.trials) for target, r in recorded.items()},
        options.drift_below,
        planted(ledger, recorded),
    )


def choose(episodes: Sequence[Trace], count: int, indices: Sequence[int] | None) -> list[Trace]:
    """Return episodes by trial index, or the `count` episodes with the largest gain."""
    if indices is not None:
        return [t for t in episodes if t.row.trial.index in indices]
    return sorted(episodes, key=lambda t: (-t.row.gain, t.row.trial.index))[:count]


def smoothed(values: Floats, window: int) -> Floats:
    """Return the running mean of each value and the `window` - 1 values before it (fewer at the beginning)."""
    total = np.cumsum(values)
    before = np.concatenate([np.zeros(min(window, len(values))), total[:-window]])
    means: Floats = (total - before) / np.minimum(np.arange(len(values)) + 1, window)
    return means


def onset(values: Floats, threshold: float, stop: int) -> int | None:
    """Return the first position before `stop` at which `values` exceed the threshold, or None."""
    above = np.flatnonzero(values[:stop] > threshold)
    return int(above[0]) if len(above) else None


def lead_times(recorded: Recorded, window: int, quantile: float) -> Leads:
    """Apply the onset rule to every episode, and to its controls before the same positions."""
    every = (*recorded.episodes, *recorded.drifts, *recorded.unsteered)
    curves = {id(t): smoothed(t.sums[DETECTORS], window) for t in every}
    peaks = [float(curves[id(t)].max()) for t in recorded.unsteered if len(t)]
    threshold = float(np.quantile(peaks, quantile)) if peaks else 0.0

    def flags(traces: Sequence[Trace], stop: int) -> tuple[float, float]:
        """Return the shares of responses with an onset before `stop`, and above the threshold just before it."""
        before = [curves[id(t)][:stop] > threshold for t in traces]
        if not before or not stop:
            return np.nan, np.nan
        return float(np.mean([b.any() for b in before])), float(np.mean([b[-1] for b in before]))

    rows, lead = [], []
    for trace in recorded.episodes:
        stop = trace.regions()["off-topic"].stop
        first = onset(curves[id(trace)], threshold, stop)
        lead.append(np.nan if first is None else float(stop - first))
        controls = (controls_of(trace, recorded.drifts), controls_of(trace, recorded.unsteered))
        rows.append([flags(traces, stop) for traces in ([trace], *controls)])
    shares = np.array(rows, dtype=np.float64).reshape(-1, len(ARMS), 2)
    return Leads(
        threshold,
        np.array([t.cluster for t in recorded.episodes], dtype=np.int64),
        np.array(lead, dtype=np.float64),
        *({arm: shares[:, i, kind] for i, arm in enumerate(ARMS)} for kind in (0, 1)),
    )
