"""Experiment 8, no steering (specification section "Experiment 8", Figs. A7 and A8).

Repeats the protocol without the addition. The judge gets the label of the latent that the trial would have used, so
that it looks for the same content. No restarts are expected, so the main result is the upper bound of the rate.
"""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.experiments.base import Experiment, NoOptions
from steerback.store.facts import UNSTEERED
from steerback.study.study import Study


class NoSteering(Experiment[NoOptions]):
    """Measure how often the model restarts without steering."""

    name = "no-steering"
    title = "No steering (experiment 8)"
    calibrates = False

    def conditions(self, config: RunConfig) -> int:
        return 1 if config.from_run is None else 2

    async def run(self, study: Study) -> None:
        """Measure every grid point without steering, and the steered baseline if the run has a base run.

        Without a base run it needs no thresholds, so nothing is calibrated and all selected latents take part.
        """
        paired = study.config.from_run is not None
        if paired:
            await study.baseline()
        cells = await study.cells(calibrated=paired)
        await study.measure(UNSTEERED, [study.at(cell, UNSTEERED, boost=0.0) for cell in cells])
