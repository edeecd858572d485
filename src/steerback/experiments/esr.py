"""Experiment 1, ESR across models (specification section "Experiment 1", Fig. 2).

Every latent is steered at its threshold boost; how often does the model restart, and does it come back?
"""

from __future__ import annotations

from steerback.config import RunConfig
from steerback.experiments.base import Experiment, NoOptions
from steerback.study.study import Study


class Esr(Experiment[NoOptions]):
    """Incidence of Endogenous Steering Resistance at calibrated boosts."""

    name = "esr"
    title = "ESR at threshold boosts (experiment 1)"

    def conditions(self, config: RunConfig) -> int:
        """One: steered at threshold."""
        return 1

    async def run(self, study: Study) -> None:
        """Steer every cell of the grid."""
        await study.baseline("steered")
