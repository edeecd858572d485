"""Experiment 4, fine-tuning on self-corrections (specification section "Experiment 4", Fig. 6).

Base and adapters are steered with the base run's latents, prompts and seeds; each uses separately calibrated
thresholds. Unsteered responses are measured as well. Held-out prompts are included because the specification trains on
its evaluation prompts. Adapters are separate targets in the ledger; in the analysis they are conditions of their base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from steerback.calibration.thresholds import THRESHOLDS
from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment
from steerback.experiments.conditions import held_out_prompts
from steerback.store.facts import ADAPTER, HELD_OUT, HELD_OUT_UNSTEERED, LATENTS, STEERED, UNSTEERED, Adapter
from steerback.study.study import Cell, Study
from steerback.targets import Target


class FinetuningOptions(Settings):
    """Adapters to compare with the base, and the held-out prompts."""

    adapters: (
        Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] | None
    ) = None
    """Folders of adapters, as a list or separated by commas."""
    prompts: str = "auto"
    """Held-out prompts, as in the experiment held-out."""


class Finetuning(Experiment[FinetuningOptions]):
    """Test whether training on corrections makes a model correct itself, and whether this improves its responses."""

    name = "finetuning"
    title = "Fine-tuning on self-corrections (experiment 4)"
    options_type = FinetuningOptions

    def conditions(self, config: RunConfig) -> int:
        if config.from_run is None:
            raise SteerbackError(
                "finetuning takes its latents and prompts from a run: give --from RUN, for example an esr run"
            )
        if len(config.targets) != 1:
            raise SteerbackError("finetuning compares one base with its adapters: give exactly one --target")
        if self.options.adapters is None:
            raise SteerbackError(
                "finetuning needs trained adapters: --set options.adapters=FOLDER (made with: steerback finetune train)"
            )
        return 4

    def further(self, config: RunConfig) -> dict[str, int]:
        latents = len(config.latents) if config.latents is not None else config.n_latents
        cal = config.calibration
        return {
            "reference to held-out prompts": 20 * config.reference_responses,
            "calibration": latents * cal.max_iterations * cal.trials_per_iteration,
            "verification": latents * cal.verify_trials,
        }

    def measured_targets(self, config: RunConfig, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The measured targets: the base, then the base with each adapter, fewest corrections first."""
        from steerback.finetuning.adapters import find_adapters

        base = targets[0]
        adapters = find_adapters(self.options.adapters or [])
        return (base, *(base.with_adapter(adapter.folder.resolve()) for adapter in adapters))

    async def run(self, study: Study) -> None:
        """Calibrate, then measure the four conditions, held-out prompts last: thresholds must not depend on them."""
        if study.target.adapter is not None:
            self._adopt(study)
        further = held_out_prompts(study, self.options.prompts)
        steered, every = await self._grids(study)
        await self._measure(study, steered, every, (STEERED, UNSTEERED))
        await study.prepare(further)
        steered, every = (
            [replace(cell, prompt=further[cell.index % len(further)]) for cell in cells] for cells in (steered, every)
        )
        await self._measure(study, steered, every, (HELD_OUT, HELD_OUT_UNSTEERED))

    async def _measure(
        self, study: Study, steered: Sequence[Cell], every: Sequence[Cell], names: tuple[str, str]
    ) -> None:
        trials = [study.at(cell, names[0]) for cell in steered]
        await study.measure(", ".join(names), [*trials, *(study.at(cell, names[1], boost=0.0) for cell in every)])

    def _adopt(self, study: Study) -> None:
        """Copy the base's latents, and the adapter's properties that the analysis needs."""
        from steerback.finetuning.adapters import CARD, percent_of

        ledger, folder = study.run.ledger, Path(study.target.adapter or "")
        chosen = ledger.get(study.target.base, LATENTS)
        if chosen is None:
            raise SteerbackError(f"{study.name}: its base {study.target.base} has no latents in this run yet")
        ledger.put(study.name, LATENTS, chosen)
        card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else None
        adapter = Adapter(base=study.target.base, adapter=folder.name, percent=percent_of(folder), card=card)
        ledger.put(study.name, ADAPTER, adapter)

    async def _grids(self, study: Study) -> tuple[list[Cell], list[Cell]]:
        """Return grid points for steering and for unsteered responses: the base's grid at this adapter's thresholds.

        Latents without a usable threshold for this adapter are not steered.
        """
        if study.target.adapter is None:
            cells = await study.cells()
            return cells, cells
        stored = study.run.ledger.get(study.target.base, THRESHOLDS) or []
        usable = {entry.latent for entry in stored if entry.threshold.usable}
        latents = [x for x in await study.latents() if x.key in usable]
        own = {key: t.boost for key, t in (await study.thresholds()).items() if t.usable}
        return study.grid(latents, own), study.grid(latents, dict.fromkeys(usable, 0.0))
