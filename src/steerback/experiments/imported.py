"""Imported results of any conditions: summaries, paired comparisons with the baseline, one figure.

For files that are not the conditions of one of the other experiments, such as ablations of another code's detectors.
"""

from __future__ import annotations

from functools import partial

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.experiments.base import Analysis, Experiment, measured, planted
from steerback.store.ledger import Ledger
from steerback.study.study import Study


class ImportedConditions(Experiment):
    """An analysis without a plan."""

    name = "imported"
    title = "Imported results"

    def conditions(self, config: RunConfig) -> int:
        return 0

    async def run(self, study: Study) -> None:
        """There is nothing to run."""
        raise SteerbackError("experiment 'imported' holds results of elsewhere; see them with: steerback figures RUN")

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Every condition, and each against the baseline where there is one."""
        from steerback.figures import conditions as figure

        found = measured(ledger, judge, draws)
        return Analysis(
            summary=found.to_json(self.name),
            tables=found.tables(),
            figures={"conditions": partial(figure.draw, found, note=planted(found.targets))},
        )
