"""Experiment 8, no steering (specification section "Experiment 8", Figs. A7 and A8).

The identical protocol with the addition left out. The judge is told the label that the trial would have had, so that
it looks for the same thing. Expected is no restart at all, so what matters is the upper bound.
"""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.experiments.base import Experiment, NoOptions
from steerback.store.facts import UNSTEERED
from steerback.study.study import Study


class NoSteering(Experiment[NoOptions]):
    """How often the model restarts when nothing pushes it."""

    name = "no-steering"
    title = "No steering (experiment 8)"
    calibrates = False

    def conditions(self, config: RunConfig) -> int:
        return 1 if config.from_run is None else 2

    async def run(self, study: Study) -> None:
        """Every cell without steering; in a run that starts from another one, its steered baseline as well.

        On its own it needs no thresholds, so none are searched and all chosen latents take part.
        """
        paired = study.config.from_run is not None
        if paired:
            await study.baseline()
        cells = await study.cells(calibrated=paired)
        await study.measure(UNSTEERED, [study.at(cell, UNSTEERED, boost=0.0) for cell in cells])
