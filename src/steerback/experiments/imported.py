"""Imported results of any conditions, for files that are not the conditions of one of the other experiments."""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment, NoOptions
from steerback.study.study import Study


class ImportedConditions(Experiment[NoOptions]):
    """An analysis without a plan: results that another program has generated."""

    name = "imported"
    title = "Imported results"

    def conditions(self, config: RunConfig) -> int:
        """None: nothing is generated."""
        return 0

    async def run(self, study: Study) -> None:
        """Refuse: there is nothing to run."""
        raise SteerbackError("experiment 'imported' holds results of elsewhere; see them with: steerback figures RUN")
