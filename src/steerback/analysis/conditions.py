"""Conditions and their paired comparisons with the baseline, for experiments without further results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.store.facts import CONFIG
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class ConditionResults(Results):
    """Summaries and comparisons of every condition of `experiment`."""

    experiment: str
    measured: Measured
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(self.experiment)


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> ConditionResults:
    """Return every condition, compared with the baseline if there is one."""
    conditions = measured(ledger, judge, draws)
    experiment = str((ledger.get("", CONFIG) or {}).get("experiment", "imported"))
    return ConditionResults(experiment, conditions, planted(ledger, conditions.targets))
