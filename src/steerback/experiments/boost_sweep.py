"""Experiment 2, boost sweep (specification section "Experiment 2", Fig. 3).

Measures resistance at several boosts. Each latent is steered at its threshold plus a multiple of the standard deviation
of the thresholds across latents. Negative boosts are dropped and counted. The authors instead use the same boosts for
all latents: the mean threshold plus a multiple of the standard deviation, at least 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment
from steerback.store.facts import SWEEP, Sweep
from steerback.study.study import Study


class SweepOptions(Settings):
    """Levels of the boost sweep, in standard deviations from a threshold."""

    boosts: Literal["own", "shared"] = "own"
    """`own`: levels around each latent's threshold; `shared` (authors): around the mean threshold, the same boosts
    for all latents."""
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
    """Measure restarts and recovery from weak to strong steering, and the boost at which each peaks."""

    name = "boost-sweep"
    title = "Resistance against boost (experiment 2)"
    options_type = SweepOptions
    authors: ClassVar[Mapping[str, object]] = {"boosts": "shared", "levels": 10, "low": -3.0}

    def conditions(self, config: RunConfig) -> int:
        return self.options.levels

    def levels(self) -> list[float]:
        """Levels as normalised boosts: standard deviations from each latent's threshold, or from the mean threshold."""
        import numpy as np

        chosen = self.options
        return [round(float(x), 6) for x in np.linspace(chosen.low, chosen.high, chosen.levels)]

    async def run(self, study: Study) -> None:
        """Measure every grid point at every non-negative level; all levels share prompts and seeds."""
        cells = await study.cells()
        thresholds = {c.latent.key: c.boost for c in cells}
        if len(thresholds) < 2:
            raise SteerbackError(f"{study.name}: a boost sweep needs at least two latents with a threshold")
        sweep, boosts = self.plan(list(thresholds.values()), study.name)
        study.run.ledger.put(study.name, SWEEP, sweep)
        trials = (
            study.at(cell, Sweep.condition(level), boost=boost)
            for level, shared in zip(sweep.levels, boosts, strict=True)
            for cell in cells
            if (boost := cell.boost + level * sweep.sd if shared is None else shared) >= 0
        )
        await study.measure("boost sweep", trials)

    def plan(self, thresholds: Sequence[float], target: str) -> tuple[Sweep, list[float | None]]:
        """Return the sweep for latents with these thresholds, and for each level the boost shared by all latents.

        The shared boost is None if each latent has a separate boost. Shared boosts are `numpy.linspace` around the
        mean, in units of the population standard deviation, and negative ones become 0. Levels with the same boost are
        merged, because with equal seeds they give identical responses. Levels with the same name (closer than 0.01 sd)
        are merged too.
        """
        import numpy as np

        levels = self.levels()
        if self.options.boosts == "own":
            sd = float(np.std(thresholds, ddof=1))
            negative = {level: sum(b + level * sd < 0 for b in thresholds) for level in levels}
            dropped = {Sweep.condition(level): count for level, count in negative.items()}
            return Sweep(sd=sd, levels=levels, dropped=dropped, latents=len(thresholds)), [None] * len(levels)
        mean, sd = float(np.mean(thresholds)), float(np.std(thresholds))
        if not sd:
            raise SteerbackError(f"{target}: all thresholds are {mean:g}, so shared boosts have no levels")
        ends = mean + self.options.low * sd, mean + self.options.high * sd
        # The authors clip negative boosts to 0 instead of dropping them.
        swept = [max(float(b), 0.0) for b in np.linspace(*ends, self.options.levels)]
        boosts = sorted({Sweep.condition((b - mean) / sd): b for b in reversed(swept)}.values())
        placed = [round((boost - mean) / sd, 6) for boost in boosts]
        return Sweep(sd=sd, levels=placed, latents=len(thresholds), boosts="absolute", mean=mean), [*boosts]
