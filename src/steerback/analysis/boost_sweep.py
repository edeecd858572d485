"""Boost sweep: every metric at every level, and the boost at which each metric peaks (Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.metrics import Peak, Summary, find_peak
from steerback.store.facts import SWEEP, Sweep
from steerback.store.ledger import Ledger

PEAKS = ("multi_attempt_rate", "esr_rate", "improvement_rate", "msi", "mean_attempts")


@dataclass(frozen=True, eq=False)
class SweepResults(Results):
    """Summaries per level and peaks per metric, by target (None: no peak, because nothing was scored)."""

    measured: Measured
    sweeps: Mapping[str, Sweep]
    peaks: Mapping[str, Mapping[str, Peak | None]]
    planted: Sequence[str]

    def curve(self, target: str) -> dict[float, Summary]:
        """Return the summaries of the measured levels."""
        summaries, sweep = self.measured.of(target), self.sweeps[target]
        named = {level: sweep.condition(level) for level in sweep.levels}
        return {level: summaries[name] for level, name in named.items() if name in summaries}

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(
            "boost-sweep",
            {
                target: {
                    "sweep": SWEEP.dump(sweep),
                    "peaks": {name: None if p is None else asdict(p) for name, p in self.peaks[target].items()},
                }
                for target, sweep in self.sweeps.items()
            },
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> SweepResults:
    """Return summaries of every level, and each metric's peak with an interval from resampled latents."""
    conditions = measured(ledger, judge, draws, against=lambda _: None)
    stored = ledger.targets_with(SWEEP)
    sweeps = {target: stored[target] for target in conditions.targets}
    peaks = {target: peaks_of(conditions, target, sweep, draws) for target, sweep in sweeps.items()}
    return SweepResults(conditions, sweeps, peaks, planted(ledger, conditions.targets))


def peaks_of(measured: Measured, target: str, sweep: Sweep, draws: int) -> dict[str, Peak | None]:
    """Return the peak of every metric over the measured levels."""
    places = {level: (target, sweep.condition(level)) for level in sweep.levels}
    outcomes = {level: measured.outcomes[key] for level, key in places.items() if key in measured.outcomes}
    return {name: find_peak([*outcomes], [*outcomes.values()], name, draws) for name in PEAKS}
