"""Held-out prompts (control of the paper's second version).

Latents and thresholds were calibrated on the evaluation prompts. This control repeats the measurement on prompts that
neither calibration nor detector search used, with the same latents, boosts and seeds.
"""

from __future__ import annotations

from steerback.config import RunConfig, Settings
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment
from steerback.study.study import Study

CONDITION = "held-out"


class HeldOutOptions(Settings):
    """Choice of the held-out prompts."""

    prompts: str = "auto"
    """Built-in list or file; `auto`: the target's list."""


class HeldOut(Experiment[HeldOutOptions]):
    """Measure resistance on prompts that were not used for calibration or detector search."""

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
        trials = [study.at(cell, CONDITION, prompt=prompts[cell.index % len(prompts)]) for cell in cells]
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
