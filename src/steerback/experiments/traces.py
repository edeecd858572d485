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

from steerback.config import RunConfig, parse_config
from steerback.experiments import episodes as ep
from steerback.experiments.base import Analysis, planted, settings
from steerback.experiments.detectors import AUTHORS, searched
from steerback.ledger import Ledger
from steerback.metrics import Estimate
from steerback.metrics.regions import mean_of, median_of, rate_of
from steerback.report.tables import Table, show
from steerback.study import Study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAD_OPTIONS: Mapping[str, Any] = {
    "window": 3,  # tokens in the running mean
    "quantile": 0.95,  # of the largest running mean in each unsteered response: what counts as an onset
}


class Traces:
    """Detector onset, correction and return, token by token, with the lead time over all episodes."""

    name = "traces"
    title = "Activation traces of episodes and lead time (experiment 6)"
    options: Mapping[str, Any] = {
        **ep.OPTIONS,
        **LEAD_OPTIONS,
        "show": 3,  # the figure shows the episodes that gained most ...
        "trials": None,  # ... or the trials of these indices
    }
    authors: Mapping[str, Any] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 1

    def further(self, config: RunConfig) -> dict[str, int]:
        return searched(settings(self, config)) | ep.replays(settings(self, config))

    async def run(self, study: Study) -> None:
        """Baseline, then episodes and controls with recording."""
        await ep.record(study, settings(self, study.config))

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Lead times with intervals; Figure 7 and the distribution of leads."""
        from steerback.figures import traces as figure

        options = options_of(self, ledger)
        rule = _rule(options)
        found, leads = {}, {}
        for target in ep.recorded_targets(ledger):
            found[target] = ep.recorded(ledger, target, judge, float(options["drift_below"]))
            leads[target] = lead_times(found[target], int(options["window"]), float(options["quantile"]))
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


def options_of(experiment: Any, ledger: Ledger) -> dict[str, Any]:
    """The options a run was started with."""
    return settings(experiment, parse_config(ledger.fact("", "config")))


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
    """Onsets of a target's n episodes, every array (n,).

    `lead`: tokens from onset to correction, nan where there is no onset before it. `own` is 1 where there is one;
    `drifts` and `unsteered` are the shares of its controls (`episodes.beside`) with an onset before the same position,
    nan where it has none.
    """

    threshold: float
    cluster: NDArray[np.int64]
    lead: Floats
    own: Floats
    drifts: Floats
    unsteered: Floats

    def estimates(self, draws: int) -> dict[str, Estimate]:
        """Lead times in tokens and shares of responses with an onset, clustered by latent."""
        share = (-1.0, 1.0)
        return {
            "median lead": median_of(self.lead, self.cluster, draws),
            "mean lead": mean_of(self.lead, self.cluster, (0.0, np.inf)),
            "onset, episodes": rate_of(self.own, self.cluster),
            "onset, steered without restart": mean_of(self.drifts, self.cluster, (0.0, 1.0)),
            "onset, unsteered": mean_of(self.unsteered, self.cluster, (0.0, 1.0)),
            "episodes − steered without restart": mean_of(self.own - self.drifts, self.cluster, share),
            "episodes − unsteered": mean_of(self.own - self.unsteered, self.cluster, share),
        }


def lead_times(found: ep.Recorded, window: int, quantile: float) -> Leads:
    """The onset rule on every episode and, before the same positions, on the controls."""

    def curve(trace: ep.Trace) -> Floats:
        return smoothed(trace.sums[ep.DETECTORS], window)

    peaks = [float(curve(t).max()) for t in found.unsteered if len(t)]
    threshold = float(np.quantile(peaks, quantile)) if peaks else 0.0

    def share(controls: Sequence[ep.Trace], stop: int) -> float:
        return float(np.mean([onset(curve(c), threshold, stop) is not None for c in controls])) if controls else np.nan

    rows = []
    for trace in found.episodes:
        stop = trace.regions()["off-topic"].stop
        first = onset(curve(trace), threshold, stop)
        lead = np.nan if first is None else float(stop - first)
        controls = (share(ep.beside(trace, found.drifts), stop), share(ep.beside(trace, found.unsteered), stop))
        rows.append((lead, float(first is not None), *controls))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Leads(threshold, np.array([t.cluster for t in found.episodes], dtype=np.int64), *columns)


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
        f"Tokens from detector onset to the first token of the correction ({rule}), and shares of responses with an "
        "onset before that position. 95 % intervals clustered by latent. Judge: " + judge + "."
    )
    return Table(("target", "quantity", "episodes", "value"), cells, caption, records, left=2)


def told(target: str, found: ep.Recorded, estimates: Mapping[str, Estimate]) -> str:
    """One line: the counts, and the lead."""
    lead = estimates["median lead"]
    said = "no onset before any correction" if lead.value is None else f"median lead {show(lead, False)} tokens"
    return f"{target}: {said}; {found.watched}; {found.told}"
