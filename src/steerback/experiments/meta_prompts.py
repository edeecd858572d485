"""Experiment 5, meta-prompts (specification section "Experiment 5", Fig. 4).

The same latents, thresholds, prompts and seeds as the baseline, with a sentence about distraction after the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from steerback.config import RunConfig, Settings
from steerback.data.prompts import AUTHORS_META_PROMPTS, META_PROMPTS
from steerback.errors import unknown
from steerback.experiments.base import Experiment
from steerback.store.facts import META_PROMPTS as META_PROMPT_FACT
from steerback.store.facts import MetaPromptSet
from steerback.study.study import Study

KNOWN = {**META_PROMPTS, **AUTHORS_META_PROMPTS}
SETS = {"specification": tuple(META_PROMPTS), "authors": tuple(AUTHORS_META_PROMPTS)}


def _named(value: object) -> object:
    """The names that a text stands for: those of a set, or those between its commas."""
    if not isinstance(value, str):
        return value
    return list(SETS.get(value) or (part.strip() for part in value.split(",")))


class MetaPromptOptions(Settings):
    """Which meta-prompts are measured."""

    variants: Annotated[list[str], BeforeValidator(_named)] = Field(list(SETS["specification"]))
    """A set's name, or a list of names (also separated by commas)."""


class MetaPrompts(Experiment[MetaPromptOptions]):
    """Whether telling the model to watch itself makes it resist more."""

    name = "meta-prompts"
    title = "Meta-prompts (experiment 5)"
    options_type = MetaPromptOptions
    authors: ClassVar[Mapping[str, object]] = {"variants": "authors"}

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(self.variants())

    def variants(self) -> tuple[str, ...]:
        """Names of the meta-prompts."""
        for name in self.options.variants:
            if name not in KNOWN:
                raise unknown("meta-prompt", name, (*SETS, *KNOWN))
        return tuple(self.options.variants)

    async def run(self, study: Study) -> None:
        """The baseline, then every variant on the same cells; variants with the label need latents that have one."""
        await study.baseline()
        cells, variants = await study.cells(), self.variants()
        labelled = [cell for cell in cells if cell.latent.label]
        chosen = MetaPromptSet(
            variants={name: KNOWN[name] for name in variants},
            cells_without_label=len(cells) - len(labelled),
            parameters=study.target.parameters(),
        )
        study.run.ledger.put(study.name, META_PROMPT_FACT, chosen)
        trials = [
            study.at(cell, name, meta_prompt=KNOWN[name].format(label=cell.latent.label))
            for name in variants
            for cell in (labelled if "{label}" in KNOWN[name] else cells)
        ]
        await study.measure("meta-prompts", trials)
