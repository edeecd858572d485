"""Experiment 1, ESR across models (specification section "Experiment 1", Fig. 2).

Steers every latent at its threshold boost, and measures how often the model restarts and improves.
"""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.experiments.base import Experiment, NoOptions
from steerback.study.study import Study


class Esr(Experiment[NoOptions]):
    """Measure the incidence of Endogenous Steering Resistance at calibrated boosts."""

    name = "esr"
    title = "ESR at threshold boosts (experiment 1)"

    def conditions(self, config: RunConfig) -> int:
        """1: steered at the threshold."""
        return 1

    async def run(self, study: Study) -> None:
        """Steer every grid point."""
        await study.baseline("steered")
