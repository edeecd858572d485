"""Experiment 5, meta-prompts (specification section "Experiment 5", Fig. 4).

The same latents, thresholds, prompts and seeds as the baseline, with a sentence about distraction after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from steerback.config import RunConfig, Settings
from steerback.data.prompts import AUTHORS_META_PROMPTS, META_PROMPTS
from steerback.errors import unknown
from steerback.experiments.base import Analysis, Experiment, measured, planted, settings
from steerback.store.ledger import Ledger
from steerback.study.study import Study

KNOWN = {**META_PROMPTS, **AUTHORS_META_PROMPTS}
SETS = {"specification": tuple(META_PROMPTS), "authors": tuple(AUTHORS_META_PROMPTS)}


def _named(given: Any) -> Any:
    """The names that a text stands for."""
    if not isinstance(given, str):
        return given
    return list(SETS.get(given) or (part.strip() for part in given.split(",")))


class Options(Settings):
    """Which meta-prompts are measured."""

    variants: Annotated[list[str], BeforeValidator(_named)] = Field(list(SETS["specification"]))
    """A set's name, or a list of names (also separated by commas)."""


class MetaPrompts(Experiment):
    """Whether telling the model to watch itself makes it resist more."""

    name = "meta-prompts"
    title = "Meta-prompts (experiment 5)"
    options = Options
    authors: Mapping[str, Any] = {"variants": "authors"}

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(self.variants(config))

    def variants(self, config: RunConfig) -> tuple[str, ...]:
        """Names of the meta-prompts."""
        given = settings(self, config)["variants"]
        for name in given:
            if name not in KNOWN:
                raise unknown("meta-prompt", name, (*SETS, *KNOWN))
        return tuple(given)

    async def run(self, study: Study) -> None:
        """The baseline, then every variant on the same cells; variants with the label need latents that have one."""
        await study.baseline()
        cells, variants = await study.cells(), self.variants(study.config)
        labelled = [cell for cell in cells if cell.latent.label]
        study.run.ledger.set_fact(
            study.name,
            "meta-prompts",
            {
                "variants": {name: KNOWN[name] for name in variants},
                "cells_without_label": len(cells) - len(labelled),
                "parameters": study.target.parameters(),
            },
        )
        trials = [
            study.at(cell, name, meta_prompt=KNOWN[name].format(label=cell.latent.label))
            for name in variants
            for cell in (labelled if "{label}" in KNOWN[name] else cells)
        ]
        await study.measure("meta-prompts", trials)

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Every variant against the baseline, paired; Figure 4, with the effect by model size."""
        from steerback.figures import meta_prompts as figure

        found = measured(ledger, judge, draws)
        facts = {target: ledger.fact(target, "meta-prompts") for target in found.targets}
        return Analysis(
            summary=found.to_json(self.name, {target: {"meta_prompts": fact} for target, fact in facts.items()}),
            tables=found.tables(),
            figures={"figure4": partial(figure.draw, found, facts, note=planted(found.targets))},
            lines=[
                f"{target}: {fact['cells_without_label']} cells without label, left out of the variants that name it"
                for target, fact in facts.items()
                if fact["cells_without_label"]
            ],
        )
