"""Experiment 2, boost sweep (specification section "Experiment 2", Fig. 3).

Resistance against steering strength: each latent at its threshold plus so many standard deviations, where the
standard deviation is that of the thresholds across latents. Levels that would be negative are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import Field, model_validator

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Analysis, Experiment, Measured, measured, planted, settings
from steerback.figures.tables import Table, number
from steerback.metrics import METRICS, Peak, find_peak
from steerback.records import Intervention
from steerback.store.ledger import Ledger
from steerback.study.study import Study

PEAKS = ("multi_attempt_rate", "esr_rate", "improvement_rate", "msi", "mean_attempts")


class Options(Settings):
    """Levels in standard deviations from each latent's threshold."""

    levels: int = Field(8, ge=2)
    low: float = -1.5
    high: float = 3.0

    @model_validator(mode="after")
    def _are_a_range(self) -> Options:
        if not self.low < self.high:
            raise ValueError(f"low must be smaller than high, not {self.low:g} and {self.high:g}")
        return self


class BoostSweep(Experiment):
    """Restarts and recovery from weak to strong steering, and where each peaks."""

    name = "boost-sweep"
    title = "Resistance against boost (experiment 2)"
    options = Options
    authors: Mapping[str, Any] = {"low": -3.0}

    def conditions(self, config: RunConfig) -> int:
        return len(self.levels(config))

    def levels(self, config: RunConfig) -> list[float]:
        """Normalised boosts, in standard deviations from each latent's threshold."""
        import numpy as np

        given = settings(self, config)
        return [round(float(x), 6) for x in np.linspace(given["low"], given["high"], given["levels"])]

    async def run(self, study: Study) -> None:
        """Every cell at every level that is not negative; prompts and seeds are the same at all levels."""
        import numpy as np

        cells = await study.cells()
        thresholds = {c.latent.key: c.boost for c in cells}
        if len(thresholds) < 2:
            raise SteerbackError(f"{study.name}: a boost sweep needs at least two latents with a threshold")
        sd = float(np.std(list(thresholds.values()), ddof=1))
        levels = self.levels(study.config)
        dropped = {condition(level): sum(b + level * sd < 0 for b in thresholds.values()) for level in levels}
        study.run.ledger.set_fact(
            study.name, "sweep", {"sd": sd, "levels": levels, "dropped": dropped, "latents": len(thresholds)}
        )
        trials = [
            study.at(
                cell,
                condition(level),
                boost=cell.boost + level * sd,
                interventions=(Intervention("add", cell.latent.key, cell.boost + level * sd),),
            )
            for level in levels
            for cell in cells
            if cell.boost + level * sd >= 0
        ]
        await study.measure("boost sweep", trials)

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Every metric at every level, and the peaks with intervals; Figure 3."""
        from steerback.figures import boost_sweep as figure

        found = measured(ledger, judge, draws, against=lambda _: None)
        sweeps = {target: ledger.fact(target, "sweep") for target in found.targets}
        peaks = {target: peaks_of(found, target, sweeps[target], draws) for target in found.targets}
        curves = {target: _curve(found, target, sweeps[target]) for target in found.targets}
        return Analysis(
            summary=found.to_json(
                self.name,
                {
                    target: {
                        "sweep": sweeps[target],
                        "peaks": {name: None if p is None else vars(p) for name, p in peaks[target].items()},
                    }
                    for target in found.targets
                },
            ),
            tables={**found.tables(), "peaks": peak_table(peaks, judge)},
            figures={"figure3": partial(figure.draw, curves, peaks, sweeps, judge, note=planted(found.targets))},
            lines=[_line(target, sweep) for target, sweep in sweeps.items()],
        )


def condition(level: float) -> str:
    """Name of a level's condition."""
    return f"{level:+.2f} sd"


def _curve(found: Measured, target: str, sweep: Mapping[str, Any]) -> dict[float, Any]:
    """Summary per level, for the levels at which anything was measured."""
    summaries = found.of(target)
    return {level: summaries[condition(level)] for level in sweep["levels"] if condition(level) in summaries}


def peaks_of(found: Measured, target: str, sweep: Mapping[str, Any], draws: int) -> dict[str, Peak | None]:
    """The peak of every metric over the levels."""
    levels = list(_curve(found, target, sweep))
    outcomes = [found.outcomes[target, condition(level)] for level in levels]
    return {name: find_peak(levels, outcomes, name, draws) for name in PEAKS}


def peak_table(peaks: Mapping[str, Mapping[str, Peak | None]], judge: str) -> Table:
    """One row per target and metric."""
    cells, records = [], []
    for target, found in peaks.items():
        for name, peak in found.items():
            rate = METRICS[name].rate
            shown = (
                ("-", "-", "-")
                if peak is None
                else (
                    number(peak.value, rate),
                    f"{peak.at:+.2f} [{peak.low:+.2f}, {peak.high:+.2f}]",
                    f"{peak.edge:.0%}",
                )
            )
            cells.append((target, METRICS[name].label, *shown))
            records.append({"target": target, "metric": name, "judge": judge, **({} if peak is None else vars(peak))})
    return Table(
        ("target", "metric", "peak", "at (sd from threshold)", "at the edge"),
        cells,
        "Peaks of the curves, with 95 % intervals from resampled latents; sd is that of thresholds across latents. "
        "At the edge: share of resamples that peak at the first or last level. Rates in per cent.",
        records,
        left=2,
    )


def _line(target: str, sweep: Mapping[str, Any]) -> str:
    lost = {level: n for level, n in sweep["dropped"].items() if n}
    said = ", ".join(f"{n} of {sweep['latents']} latents at {level}" for level, n in lost.items()) or "none"
    return f"{target}: sd of thresholds across latents {sweep['sd']:.4g}; dropped because the boost is negative: {said}"
