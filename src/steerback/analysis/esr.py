"""ESR across models: rates, MSI and intervals per target, and how well its latents were calibrated (Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.calibration import CalibrationReport, assess
from steerback.calibration.thresholds import THRESHOLDS
from steerback.store.facts import LATENTS, Selection
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class EsrResults(Results):
    """Summaries of each target, with its calibration and how its latents were selected."""

    measured: Measured
    calibration: Mapping[str, CalibrationReport]
    selection: Mapping[str, Selection | None]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """The content of summary.json."""
        calibration = {
            target: {**asdict(report), "selection": selected.counts if (selected := self.selection[target]) else {}}
            for target, report in self.calibration.items()
        }
        return self.measured.to_json("esr", {target: {"calibration": report} for target, report in calibration.items()})


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> EsrResults:
    """Rates, MSI and intervals per target; the calibration of its latents."""
    conditions = measured(ledger, judge, draws)
    thresholds = {target: ledger.get(target, THRESHOLDS) or [] for target in conditions.targets}
    return EsrResults(
        conditions,
        {target: assess([entry.threshold for entry in stored]) for target, stored in thresholds.items()},
        {target: ledger.get(target, LATENTS) for target in conditions.targets},
        planted(ledger, conditions.targets),
    )
