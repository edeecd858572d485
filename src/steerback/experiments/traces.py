"""Experiment 6: what detectors and backtracking latents do token by token while a model stops itself (Fig. 7).

Episodes of the baseline are replayed with recording, steering on. The lead time is the number of tokens from the
detectors' onset to the first token of the correction. Its rule is fixed beforehand: the summed activation, averaged
over the last `window` tokens (never later ones), first exceeds what a share `quantile` of the unsteered responses never
reach. The same rule is applied to responses without a restart, cut at the same position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from steerback.experiments import episodes as ep
from steerback.experiments.base import Analysis, planted
from steerback.figures.tables import Table, show
from steerback.metrics import Estimate
from steerback.metrics.regions import mean_of, median_of, rate_of
from steerback.store.ledger import Ledger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

ARMS = ("episodes", "steered without restart", "unsteered")


class Options(ep.Options):
    """The onset's rule, and what the figure shows."""

    window: int = Field(3, ge=1)
    """Tokens in the running mean."""
    quantile: float = Field(0.95, ge=0, le=1)
    """Of the largest running mean in each unsteered response: what counts as an onset."""
    show: int = Field(3, ge=1)
    """The figure shows the episodes that gained most ..."""
    trials: list[int] | None = None
    """... or the trials of these indices."""


class Traces(ep.EpisodeExperiment):
    """Detector onset, correction and return, token by token, with the lead time over all episodes."""

    name = "traces"
    title = "Activation traces of episodes and lead time (experiment 6)"
    options = Options

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Lead times with intervals; Figure 7 and the distribution of leads."""
        from steerback.figures import traces as figure

        options = ep.options_of(self, ledger)
        rule = _rule(options)
        found, leads = {}, {}
        for target in ep.recorded_targets(ledger):
            found[target] = ep.recorded(ledger, target, judge, options["drift_below"])
            leads[target] = lead_times(found[target], options["window"], options["quantile"])
        estimates = {target: x.estimates(draws) for target, x in leads.items()}
        note = planted(found)
        return Analysis(
            summary={
                "experiment": self.name,
                "judge": judge,
                "rule": rule,
                "targets": {
                    t: {
                        "counts": found[t].counts,
                        "onset_threshold": leads[t].threshold,
                        "lead": {name: asdict(e) for name, e in estimates[t].items()},
                    }
                    for t in found
                },
            },
            tables={"table": lead_table(estimates, judge, rule)},
            figures={
                "figure7": partial(figure.draw, found, leads, options, judge, note),
                "lead_times": partial(figure.draw_leads, found, leads, estimates, judge, rule, note),
            },
            lines=[told(t, found[t], estimates[t]) for t in found],
        )


def smoothed(values: Floats, window: int) -> Floats:
    """Mean of each value and the `window` - 1 before it (fewer at the beginning): nothing later is looked at."""
    total = np.cumsum(values)
    before = np.concatenate([np.zeros(min(window, len(values))), total[:-window]])
    means: Floats = (total - before) / np.minimum(np.arange(len(values)) + 1, window)
    return means


def onset(values: Floats, threshold: float, stop: int) -> int | None:
    """First position before `stop` at which `values` exceed the threshold."""
    above = np.flatnonzero(values[:stop] > threshold)
    return int(above[0]) if len(above) else None


@dataclass(frozen=True, eq=False)
class Leads:
    """Onsets of a target's n episodes.

    `lead` (n,): tokens from onset to correction, nan where there is no onset before it. `onset` and `last` map each of
    ARMS to (n,): whether there is an onset before the correction, and whether the activity is above the threshold at
    the very last token before it; for controls the share of those that stand beside the episode (`episodes.beside`),
    nan where there is none.
    """

    threshold: float
    cluster: NDArray[np.int64]
    lead: Floats
    onset: Mapping[str, Floats]
    last: Mapping[str, Floats]

    def estimates(self, draws: int) -> dict[str, Estimate]:
        """Lead times in tokens and shares of responses, clustered by latent."""
        found = {
            "median lead": median_of(self.lead, self.cluster, draws),
            "mean lead": mean_of(self.lead, self.cluster, (0.0, np.inf)),
        }
        for name, shares in (("onset", self.onset), ("active at last token", self.last)):
            own = shares[ARMS[0]]
            found[f"{name}, {ARMS[0]}"] = rate_of(own, self.cluster)
            for arm in ARMS[1:]:
                found[f"{name}, {arm}"] = mean_of(shares[arm], self.cluster, (0.0, 1.0))
            for arm in ARMS[1:]:
                found[f"{name}, {ARMS[0]} − {arm}"] = mean_of(own - shares[arm], self.cluster, (-1.0, 1.0))
        return found


def lead_times(found: ep.Recorded, window: int, quantile: float) -> Leads:
    """The onset rule on every episode and, before the same positions, on the controls."""
    every = (*found.episodes, *found.drifts, *found.unsteered)
    curves = {id(t): smoothed(t.sums[ep.DETECTORS], window) for t in every}
    peaks = [float(curves[id(t)].max()) for t in found.unsteered if len(t)]
    threshold = float(np.quantile(peaks, quantile)) if peaks else 0.0

    def flags(traces: Sequence[ep.Trace], stop: int) -> tuple[float, float]:
        """Shares of responses with an onset before `stop`, and above the threshold at the last token before it."""
        before = [curves[id(t)][:stop] > threshold for t in traces]
        if not before or not stop:
            return np.nan, np.nan
        return float(np.mean([b.any() for b in before])), float(np.mean([b[-1] for b in before]))

    rows, lead = [], []
    for trace in found.episodes:
        stop = trace.regions()["off-topic"].stop
        first = onset(curves[id(trace)], threshold, stop)
        lead.append(np.nan if first is None else float(stop - first))
        controls = (ep.beside(trace, found.drifts), ep.beside(trace, found.unsteered))
        rows.append([flags(traces, stop) for traces in ([trace], *controls)])
    shares = np.array(rows, dtype=np.float64).reshape(-1, len(ARMS), 2)
    return Leads(
        threshold,
        np.array([t.cluster for t in found.episodes], dtype=np.int64),
        np.array(lead, dtype=np.float64),
        *({arm: shares[:, i, kind] for i, arm in enumerate(ARMS)} for kind in (0, 1)),
    )


def _rule(options: Mapping[str, Any]) -> str:
    return (
        f"onset: the detectors' sum, averaged over the last {options['window']} tokens, first exceeds what "
        f"{options['quantile']:.0%} of the unsteered responses never reach"
    )


def lead_table(estimates: Mapping[str, Mapping[str, Estimate]], judge: str, rule: str) -> Table:
    """One row per target and quantity."""
    cells, records = [], []
    for target, own in estimates.items():
        for name, e in own.items():
            lead = name.endswith("lead")
            cells.append((target, name + (" (tokens)" if lead else " (%)"), f"{e.n:,}", show(e, rate=not lead)))
            records.append({"target": target, "quantity": name, "judge": judge, **asdict(e)})
    caption = (
        f"Tokens from detector onset to the first token of the correction ({rule}); shares of responses with an onset "
        "before that position, and above the threshold at the last token before it. 95 % intervals clustered by "
        f"latent. Judge: {judge}."
    )
    return Table(("target", "quantity", "episodes", "value"), cells, caption, records, left=2)


def told(target: str, found: ep.Recorded, estimates: Mapping[str, Estimate]) -> str:
    """One line: the counts, and the lead."""
    lead = estimates["median lead"]
    said = "no onset before any correction" if lead.value is None else f"median lead {show(lead, False)} tokens"
    return f"{target}: {said}; {found.watched}; {found.told}"
