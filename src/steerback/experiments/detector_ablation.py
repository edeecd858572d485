"""Experiment 3, second phase: off-topic detectors clamped to zero (Fig. 5).

The baseline's trials are replayed with the same prompts, seeds and boosts, and with the detectors clamped. A dose curve
clamps the best quarter, half and three quarters of the detectors to zero. Partial clamps hold all of them at a fixed
part of their level on mismatched pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.base import Experiment
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, search_responses
from steerback.records import Intervention
from steerback.store.facts import ABLATED, BASELINE, DOSES, Dose
from steerback.study.study import Study


class DetectorAblationOptions(SearchOptions):
    """Doses that are measured besides none and all of the detectors at zero."""

    doses: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.25, 0.5, 0.75])
    """Shares of the detectors, best first."""
    levels: list[Annotated[float, Field(gt=0)]] = Field([0.25, 0.5])
    """Partial clamps: all detectors held at this part of their level on mismatched pairs."""


class DetectorAblation(Experiment[DetectorAblationOptions]):
    """Does resistance need the detectors? Baseline against all of them at zero, and the doses in between."""

    name = "detector-ablation"
    needs_sae = True
    title = "Detectors clamped to zero, with dose curve (experiment 3)"
    options_type = DetectorAblationOptions
    authors: ClassVar[Mapping[str, object]] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(self.doses())

    def further(self, config: RunConfig) -> dict[str, int]:
        return search_responses(self.options)

    def doses(self) -> list[Dose]:
        """All detectors at zero, smaller shares of them at zero, all at a part of their level."""
        return [
            Dose(condition=ABLATED, share=1.0, level=0.0),
            *(Dose(condition=f"{ABLATED} {x:.0%}", share=x, level=0.0) for x in sorted(set(self.options.doses))),
            *(Dose(condition=f"held at {x:.0%}", share=1.0, level=x) for x in sorted(set(self.options.levels))),
        ]

    async def run(self, study: Study) -> None:
        """Measure the baseline, all detectors at zero, then the doses and the partial clamps."""
        detectors = (await detectors_of(study, self.options)).detectors
        doses = distinct([Dose(condition=BASELINE, share=0.0, level=0.0), *self.doses()], len(detectors))
        study.run.ledger.put(study.name, DOSES, doses)
        await study.baseline()
        for dose in doses:
            if dose.latents:
                await ablate(study, dose.condition, {d.latent: dose.level * d.level for d in detectors[: dose.latents]})


def distinct(doses: list[Dose], size: int) -> list[Dose]:
    """The doses with the number of latents that their share of `size` detectors comes to (halves up).

    With few detectors several shares come to the same number: the first of these doses stands for all, in the place of
    the last.
    """
    kept: dict[tuple[int, float], Dose] = {}
    for dose in doses:
        number = math.floor(dose.share * size + 0.5)
        exact = Dose(condition=dose.condition, share=number / size, level=dose.level, latents=number)
        key = (number, dose.level)
        kept[key] = kept.pop(key, exact)
    return list(kept.values())


async def ablate(study: Study, condition: str, values: Mapping[int, float]) -> None:
    """Replay every grid point with latents clamped to `values`."""
    clamps = [Intervention("clamp", k, v) for k, v in values.items()]
    await study.measure(condition, [study.at(cell, condition, clamps=clamps) for cell in await study.cells()])
