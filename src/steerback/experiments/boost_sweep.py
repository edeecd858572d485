"""Experiment 2, boost sweep (specification section "Experiment 2", Fig. 3).

Resistance against steering strength: each latent at its threshold plus so many standard deviations, where the
standard deviation is that of the thresholds across latents. Levels that would be negative are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment
from steerback.store.facts import SWEEP, Sweep
from steerback.study.study import Study


class SweepOptions(Settings):
    """Levels in standard deviations from each latent's threshold."""

    levels: int = Field(8, ge=2)
    """Number of levels, evenly spaced from `low` to `high`."""
    low: float = -1.5
    """Lowest level."""
    high: float = 3.0
    """Highest level."""

    @model_validator(mode="after")
    def _are_a_range(self) -> SweepOptions:
        if not self.low < self.high:
            raise ValueError(f"low must be smaller than high, not {self.low:g} and {self.high:g}")
        return self


class BoostSweep(Experiment[SweepOptions]):
    """Restarts and recovery from weak to strong steering, and where each peaks."""

    name = "boost-sweep"
    title = "Resistance against boost (experiment 2)"
    options_type = SweepOptions
    authors: ClassVar[Mapping[str, object]] = {"low": -3.0}

    def conditions(self, config: RunConfig) -> int:
        return self.options.levels

    def levels(self) -> list[float]:
        """Normalised boosts, in standard deviations from each latent's threshold."""
        import numpy as np

        chosen = self.options
        return [round(float(x), 6) for x in np.linspace(chosen.low, chosen.high, chosen.levels)]

    async def run(self, study: Study) -> None:
        """Every cell at every level that is not negative; prompts and seeds are the same at all levels."""
        import numpy as np

        cells = await study.cells()
        thresholds = {c.latent.key: c.boost for c in cells}
        if len(thresholds) < 2:
            raise SteerbackError(f"{study.name}: a boost sweep needs at least two latents with a threshold")
        sd = float(np.std(list(thresholds.values()), ddof=1))
        levels = self.levels()
        negative = {level: sum(b + level * sd < 0 for b in thresholds.values()) for level in levels}
        dropped = {Sweep.condition(level): count for level, count in negative.items()}
        sweep = Sweep(sd=sd, levels=levels, dropped=dropped, latents=len(thresholds))
        study.run.ledger.put(study.name, SWEEP, sweep)
        trials = [
            study.at(cell, Sweep.condition(level), boost=cell.boost + level * sd)
            for level in levels
            for cell in cells
            if cell.boost + level * sd >= 0
        ]
        await study.measure("boost sweep", trials)
