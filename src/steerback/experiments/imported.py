"""Imported results whose conditions do not match those of another experiment."""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment, NoOptions
from steerback.study.study import Study


class ImportedConditions(Experiment[NoOptions]):
    """Analyse conditions that another program generated; nothing is planned."""

    name = "imported"
    title = "Imported results"

    def conditions(self, config: RunConfig) -> int:
        """0: nothing is generated."""
        return 0

    async def run(self, study: Study) -> None:
        """Raise SteerbackError, because imported results cannot be run."""
        raise SteerbackError(
            "experiment 'imported' contains the results of another program; show them with: steerback figures RUN"
        )
