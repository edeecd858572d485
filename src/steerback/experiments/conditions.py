"""Experiments that measure the grid once or twice: esr, no-steering, held-out prompts, and imported results."""

from __future__ import annotations

from steerback.config import RunConfig, Settings
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment, NoOptions
from steerback.store.facts import UNSTEERED
from steerback.study.study import Study


class Esr(Experiment[NoOptions]):
    """Measure the incidence of Endogenous Steering Resistance at calibrated boosts.

    Specification section "Experiment 1", Fig. 2: every latent is steered at its threshold boost.
    """

    name = "esr"
    title = "ESR at threshold boosts (experiment 1)"

    def conditions(self, config: RunConfig) -> int:
        """1: steered at the threshold."""
        return 1

    async def run(self, study: Study) -> None:
        """Steer every grid point."""
        await study.baseline("steered")


class NoSteering(Experiment[NoOptions]):
    """Measure how often the model restarts without steering.

    Specification section "Experiment 8", Figs. A7 and A8. The judge gets the label of the latent that the trial would
    have used, so that it looks for the same content. No restarts are expected, so the main result is the upper bound
    of the rate.
    """

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
        await study.measure(UNSTEERED, (study.at(cell, UNSTEERED, boost=0.0) for cell in cells))


CONDITION = "held-out"


class HeldOutOptions(Settings):
    """Choice of the held-out prompts."""

    prompts: str = "auto"
    """Built-in list or file; `auto`: the target's list."""


class HeldOut(Experiment[HeldOutOptions]):
    """Measure resistance on prompts that were not used for calibration or detector search.

    Control of the paper's second version: latents and thresholds were calibrated on the evaluation prompts. This
    control repeats the measurement on other prompts, with the same latents, boosts and seeds.
    """

    name = "held-out"
    title = "Held-out prompts"
    options_type = HeldOutOptions

    def conditions(self, config: RunConfig) -> int:
        return 2

    def further(self, config: RunConfig) -> dict[str, int]:
        return {"reference to held-out prompts": 20 * config.reference_responses}

    async def run(self, study: Study) -> None:
        """Measure the baseline first, so that its thresholds and verdicts do not depend on the held-out prompts."""
        prompts = held_out_prompts(study, self.options.prompts)
        await study.baseline()
        await study.prepare(prompts)
        cells = await study.cells()
        trials = (study.at(cell, CONDITION, prompt=prompts[cell.index % len(prompts)]) for cell in cells)
        await study.measure(CONDITION, trials)


def held_out_prompts(study: Study, source: str) -> tuple[str, ...]:
    """Return the prompts of a list, a file or `auto`. Raises SteerbackError if they share a prompt with the run."""
    if source == "auto":
        source = "organism-held-out" if study.target.planted else "held-out"
    prompts = load_prompts(source)
    shared = sorted(set(prompts) & set(study.prompts))
    if shared:
        raise SteerbackError(f"held-out prompts {source} share {shared[0]!r} with the run's prompts; take another list")
    return prompts


class ImportedConditions(Experiment[NoOptions]):
    """Analyse conditions that another program generated, and that match no other experiment; nothing is planned."""

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
