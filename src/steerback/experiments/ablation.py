"""Experiment 3, second phase: detectors clamped to zero (Fig. 5), and matched random sets for comparison (Fig. A9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.detectors import AUTHORS, SearchOptions, UsesDetectors, detectors_of
from steerback.records import Intervention
from steerback.store.facts import ABLATED, BASELINE, DOSES, RANDOM_SETS, ControlSets, Detector, Dose
from steerback.store.ledger import Row
from steerback.study.study import Study


class DetectorAblationOptions(SearchOptions):
    """Doses to measure, in addition to the baseline and all detectors at zero."""

    doses: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.25, 0.5, 0.75])
    """Shares of the detectors to clamp to zero, best detectors first."""
    levels: list[Annotated[float, Field(gt=0)]] = Field([0.25, 0.5])
    """Partial clamps: shares of their activity that all detectors keep."""
    partial: Literal["scale", "level"] = "scale"
    """`scale`: each token keeps this share of its activation; `level`: every token is clamped to this share of the
    detector's mean max-pooled activation on mismatched pairs."""


class DetectorAblation(UsesDetectors[DetectorAblationOptions]):
    """Compare the baseline with all detectors clamped to zero, and with the doses in between.

    The baseline's trials are replayed with the same prompts, seeds and boosts, and with the detectors clamped. A dose
    curve clamps the best quarter, half and three quarters of the detectors to zero. Partial clamps reduce the activity
    of all detectors instead.
    """

    name = "detector-ablation"
    title = "Detectors clamped to zero, with dose curve (experiment 3)"
    options_type = DetectorAblationOptions

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(self.doses())

    def doses(self) -> list[Dose]:
        """The doses: all detectors at zero, smaller shares of them at zero, then all of them at partial levels."""
        scaled, levels = self.options.partial == "scale", self.options.levels
        kept = "scaled to" if scaled else "held at"
        return [
            Dose(condition=ABLATED, share=1.0, level=0.0),
            *(Dose(condition=f"{ABLATED} {x:.0%}", share=x, level=0.0) for x in sorted(set(self.options.doses))),
            *(Dose(condition=f"{kept} {x:.0%}", share=1.0, level=x, scaled=scaled) for x in sorted(set(levels))),
        ]

    async def run(self, study: Study) -> None:
        """Measure the baseline, then all doses and partial clamps together."""
        detectors = (await detectors_of(study, self.options)).detectors
        doses = distinct([Dose(condition=BASELINE, share=0.0, level=0.0), *self.doses()], len(detectors))
        study.run.ledger.put(study.name, DOSES, doses)
        await study.baseline()
        await clamp(study, {d.condition: clamps_of(d, detectors[: d.latents]) for d in doses if d.latents})


def distinct(doses: list[Dose], size: int) -> list[Dose]:
    """Return the distinct doses with their number of latents: the share of `size` detectors, halves rounded up.

    With few detectors several shares give the same number. The first of these doses is kept, at the position of the
    last.
    """
    kept: dict[tuple[int, float], Dose] = {}
    for dose in doses:
        number = math.floor(dose.share * size + 0.5)
        exact = dose.model_copy(update={"share": number / size, "latents": number})
        key = (number, dose.level)
        kept[key] = kept.pop(key, exact)
    return list(kept.values())


def clamps_of(dose: Dose, detectors: Sequence[Detector]) -> list[Intervention]:
    """Return the clamps of a dose."""
    if dose.scaled:
        return [Intervention("scale", d.latent, dose.level) for d in detectors]
    return [Intervention("clamp", d.latent, dose.level * d.level) for d in detectors]


async def clamp(study: Study, conditions: Mapping[str, Sequence[Intervention]]) -> None:
    """Replay every grid point in each condition, with its clamps in addition to the other edits.

    The conditions are measured together, so that batches stay full from one condition to the next.
    """
    cells = await study.cells()
    trials = (study.at(cell, name, clamps=clamps) for name, clamps in conditions.items() for cell in cells)
    await study.measure("detectors and other latents clamped", trials)


class RandomAblationOptions(SearchOptions):
    """Random sets for comparison with the detectors."""

    sets: int | None = Field(None, ge=1)
    """Number of random sets; default: the target's (3; 19 for the built-in organisms)."""
    draw: Literal["matched", "uniform"] = "matched"
    """`matched`: sets matched to the detectors in activity; `uniform` (authors): drawn from all live latents."""


class RandomAblation(UsesDetectors[RandomAblationOptions]):
    """Compare the detector ablation with ablations of random sets.

    Tests whether the effect is specific to the detectors: clamping any active latents to zero disturbs a model. The
    random sets have the size of the detectors and are matched to them in activity on the baseline's responses.
    """

    name = "random-ablation"
    title = "Detector ablation against matched random sets (appendix A5.2)"
    options_type = RandomAblationOptions
    authors: ClassVar[Mapping[str, object]] = {**AUTHORS, "draw": "uniform"}

    def conditions(self, config: RunConfig) -> int:
        from steerback.targets import resolve

        if self.options.sets is not None:
            return 2 + self.options.sets
        return 2 + max(resolve(t, config.definitions).random_sets for t in config.targets)

    async def run(self, study: Study) -> None:
        """Measure the baseline, then the detectors and every random set clamped to zero together."""
        latents = (await detectors_of(study, self.options)).latents
        rows = await study.baseline_rows()
        control = study.run.ledger.get(study.name, RANDOM_SETS)
        if control is None:
            control = self._draw(study, rows, latents)
            study.run.ledger.put(study.name, RANDOM_SETS, control)
        sets = {ABLATED: latents, **dict(zip(control.conditions, control.sets, strict=True))}
        await clamp(study, {name: [Intervention("clamp", k, 0.0) for k in members] for name, members in sets.items()})

    def _draw(self, study: Study, rows: Sequence[Row], latents: Sequence[int]) -> ControlSets:
        """Draw random sets matched on the responses of `rows`; steered latents are never drawn.

        Activities are read without steering on the steered texts, at the layer of the clamps. If that is also the
        steered layer, a clamp changes exactly these activations.
        """
        from steerback.latents.matching import LatentActivity, matched_sets, uniform_sets

        number = study.target.random_sets if self.options.sets is None else self.options.sets
        texts = [(r.trial.prompt, r.completion.text) for r in rows if r.completion is not None and r.completion.text]
        prompts, responses = zip(*texts, strict=True)
        means, frequencies = (
            study.engine.activations(prompts, responses, pool=p, at="clamp") for p in ("mean", "active")
        )
        activity = LatentActivity.measure(means, frequencies, study.engine.decoder_norms())
        steered = {r.trial.latent for r in rows if isinstance(r.trial.latent, int)}
        choose = matched_sets if self.options.draw == "matched" else uniform_sets
        return choose(activity, latents, number, exclude=steered, seed=study.config.seeds.latents)
