"""Experiment 5, meta-prompts (specification section "Experiment 5", Fig. 4).

Repeats the baseline with the same latents, thresholds, prompts and seeds, and adds a sentence about distraction after
the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from steerback.config import RunConfig, Settings
from steerback.data.prompts import AUTHORS_META_PROMPTS, META_PROMPTS
from steerback.errors import SteerbackError, unknown
from steerback.experiments.base import Experiment
from steerback.store.facts import BASELINE, MetaPromptSet
from steerback.store.facts import META_PROMPTS as META_PROMPT_FACT
from steerback.study.study import Study

KNOWN = {**META_PROMPTS, **AUTHORS_META_PROMPTS}
SETS = {"specification": tuple(META_PROMPTS), "authors": tuple(AUTHORS_META_PROMPTS)}


def _named(value: object) -> object:
    """Return the meta-prompts that `variants` names; the text is None for built-in ones."""
    if isinstance(value, str):
        value = SETS.get(value) or ([value] if "=" in value else [part.strip() for part in value.split(",")])
    if isinstance(value, dict):
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected the name of a set, names, NAME=TEXT or {{name: text}}, not {value!r}")
    pairs = [entry.partition("=") for entry in value if isinstance(entry, str)]
    if len(pairs) != len(value):
        raise ValueError("a list of meta-prompts must contain names, or texts as NAME=TEXT")
    return {name.strip(): text.strip() if sign else None for name, sign, text in pairs}


class MetaPromptOptions(Settings):
    """Choice of the meta-prompts."""

    variants: Annotated[dict[str, str | None], BeforeValidator(_named)] = Field(
        default_factory=lambda: dict.fromkeys(SETS["specification"])
    )
    """A set's name, names separated by commas, or custom texts (`{name: text}` or NAME=TEXT); `{label}` inserts the
    label."""


def _checked(name: str, text: str | None) -> str:
    """Return the checked text of a built-in or custom meta-prompt; raise SteerbackError if it is invalid."""
    if text is None and name in KNOWN:
        return KNOWN[name]
    if text is None:
        raise unknown("meta-prompt", name, (*SETS, *KNOWN, "a text of your own as NAME=TEXT"))
    if not name or name == BASELINE or KNOWN.get(name, text) != text:
        raise SteerbackError(f"meta-prompt {name!r}: this name is reserved; choose another name for your text")
    try:
        places = _places(text)
        plain = text.format(label="x") if places <= {"label"} else ""
    except (ValueError, AttributeError, KeyError, IndexError):
        places, plain = {""}, ""
    if places - {"label"}:
        raise SteerbackError(
            f"meta-prompt {name!r}: {{label}} is the only allowed placeholder; write {{{{ and }}}} for braces"
        )
    if not plain.strip():
        raise SteerbackError(f"meta-prompt {name!r} is empty; write a sentence")
    return text


class MetaPrompts(Experiment[MetaPromptOptions]):
    """Test whether a prompt that tells the model to watch for distraction increases resistance."""

    name = "meta-prompts"
    title = "Meta-prompts (experiment 5)"
    options_type = MetaPromptOptions
    authors: ClassVar[Mapping[str, object]] = {"variants": "authors"}

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(self.variants())

    def variants(self) -> dict[str, str]:
        """Texts of the meta-prompts by name."""
        return {name: _checked(name, text) for name, text in self.options.variants.items()}

    async def run(self, study: Study) -> None:
        """Measure the baseline, then every variant on the same grid points; some variants need labelled latents."""
        await study.baseline()
        cells, variants = await study.cells(), self.variants()
        labelled = [cell for cell in cells if cell.latent.label]
        chosen = MetaPromptSet(
            variants={**variants},
            cells_without_label=len(cells) - len(labelled),
            parameters=study.target.parameters(),
        )
        study.run.ledger.put(study.name, META_PROMPT_FACT, chosen)
        trials = (
            study.at(cell, name, meta_prompt=text.format(label=cell.latent.label))
            for name, text in variants.items()
            for cell in (labelled if "label" in _places(text) else cells)
        )
        await study.measure("meta-prompts", trials)


def _places(text: str) -> set[str]:
    """Return the names of the placeholders in a text."""
    return {place for _, place, _, _ in Formatter().parse(text) if place is not None}
