"""Matched prefix (paper's second version): tests whether the model's correction lasts longer than other on-topic text.

Steering stays on. The model continues from the corrective text of a response with a restart, or from equally long text
of an unsteered response to the same prompt. A third arm continues the whole response up to the same point, with the
drift. Only the continuation is judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.experiments.base import Experiment
from steerback.records import Trial, is_degraded
from steerback.store.facts import (
    CONTINUATION,
    GENERIC_PREFIX,
    MATCHED_PREFIX,
    OWN_CORRECTION,
    OWN_CORRECTION_IN_CONTEXT,
    PrefixPairs,
)
from steerback.store.ledger import Row
from steerback.study.study import Study

SHORTEST = 20  # characters; shorter prefixes contain little more than the restart phrase


class MatchedPrefixOptions(Settings):
    """Selection of prefixes, and number of continuations."""

    characters: int = Field(200, ge=SHORTEST)
    """Maximum length of the corrective text."""
    repeats: int = Field(4, ge=1)
    """Continuations per prefix."""
    episodes: int = Field(100, ge=1)
    """Maximum number of episodes, in rotation over the latents."""
    in_context: bool = True
    """Also continue the whole response up to the same point."""
    improved_only: bool = True
    """Use only restarts that score higher than the text before them."""


class MatchedPrefix(Experiment[MatchedPrefixOptions]):
    """Compare continuations under steering: corrective text against length-matched on-topic text."""

    name = "matched-prefix"
    title = "Matched prefix: does a correction last?"
    options_type = MatchedPrefixOptions

    def conditions(self, config: RunConfig) -> int:
        return 1  # the baseline; `further` counts the continuations

    def further(self, config: RunConfig) -> dict[str, int]:
        chosen = self.options
        return {CONTINUATION: (2 + chosen.in_context) * chosen.repeats * chosen.episodes}

    async def run(self, study: Study) -> None:
        """Build pairs of prefixes of equal length, and continue each `repeats` times with the same seeds."""
        chosen = self.options
        rows, tally = await study.baseline_rows(), Counter[str]()
        unsteered = responses_by_prompt(await study.references())
        trials: list[Trial] = []
        turns = study.config.trials_per_latent
        # First trials of all latents come first, so that a limit on episodes covers many latents.
        for row in sorted(rows, key=lambda r: (r.trial.index % turns, r.trial.index)):
            prefixes, why = prefixes_of(row, unsteered.get(row.trial.prompt, []), chosen)
            if prefixes and tally["used"] == chosen.episodes:
                prefixes, why = {}, "beyond the number of episodes wanted"
            tally[why] += 1
            trials += continuations(study, row.trial, prefixes, chosen.repeats)
        study.run.ledger.put(study.name, MATCHED_PREFIX, PrefixPairs(pairs=dict(tally), repeats=chosen.repeats))
        await study.measure("matched prefix", trials)


def responses_by_prompt(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return by prompt the unsteered responses that can supply a prefix."""
    responses: dict[str, list[str]] = {}
    for row in rows:
        if row.completion is not None and not is_degraded(row.completion.text):
            responses.setdefault(row.trial.prompt, []).append(row.completion.text)
    return responses


def prefixes_of(row: Row, unsteered: Sequence[str], chosen: MatchedPrefixOptions) -> tuple[dict[str, str], str]:
    """Return (prefix by condition, "used"), or ({}, reason).

    Corrective text is the second attempt from its restart phrase on, at most `characters` long.
    """
    attempts = row.attempts
    if not attempts:
        return {}, "not scored"
    if len(attempts) < 2:
        return {}, "without a restart"
    if chosen.improved_only and attempts[1].score <= attempts[0].score:
        return {}, "restarts without improvement"
    text, start = row.judged_text, attempts[1].start
    start += len(text[start:]) - len(text[start:].lstrip())
    own = shorten(text[start : attempts[1].end].rstrip(), chosen.characters)
    long_enough = [other for other in unsteered if len(other.strip()) > len(own)]
    if len(own) < SHORTEST or is_degraded(own):
        return {}, "corrections too short or degraded"
    if not long_enough:
        return {}, "without an unsteered response that is long enough"
    generic = long_enough[row.trial.index % len(long_enough)].strip()
    prefixes = {OWN_CORRECTION: own}
    if chosen.in_context:
        prefixes[OWN_CORRECTION_IN_CONTEXT] = text[: start + len(own)]
    prefixes[GENERIC_PREFIX] = shorten(generic, len(own))
    return prefixes, "used"


def shorten(text: str, characters: int) -> str:
    """Return the longest beginning of at most `characters` that ends at a word boundary."""
    if len(text) <= characters:
        return text
    end = text.rfind(" ", 1, characters + 1)
    return text[:end].rstrip() if end > 0 else text[:characters]


def continuations(study: Study, trial: Trial, prefixes: Mapping[str, str], repeats: int) -> list[Trial]:
    """Return trials that continue every prefix `repeats` times; their index pairs the arms."""
    return [
        study.trial(
            CONTINUATION,
            condition,
            index,
            prompt=trial.prompt,
            seed=study.seed("measure", index),
            latent=trial.latent,
            label=trial.label,
            prefill=prefix,
            interventions=trial.interventions,
        )
        for condition, prefix in prefixes.items()
        for index in range(trial.index * repeats, (trial.index + 1) * repeats)
    ]
