"""Two runs compared: paired where they replay the same prompts, seeds and latents, else as two samples of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steerback.analysis.base import outcomes_of
from steerback.metrics import Comparison, Summary, TwoSampleTest, between, compare, correct, correct_pairs, summarize
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline

Place = tuple[str, str]
"""Target and condition."""


@dataclass(frozen=True, slots=True)
class TwoRuns:
    """Tests of run b against run a, by their names for each compared condition; differences are b - a.

    `rates` are those of each run by itself, over all its valid trials. `samples` are conditions of which the two runs
    share no prompt, seed and latent. Holm's correction covers all pairs, and all samples.
    """

    rates: dict[str, tuple[Summary, Summary]]
    pairs: dict[str, Comparison]
    samples: dict[str, dict[str, TwoSampleTest]]


def compare_runs(a: Ledger, b: Ledger, judges: tuple[str, str]) -> TwoRuns:
    """Compare the measured conditions that both ledgers have; runs of one target each need not have the same one."""
    matches = _matched(a.conditions(), b.conditions())
    rates: dict[str, tuple[Summary, Summary]] = {}
    pairs: dict[str, Comparison] = {}
    samples: dict[str, dict[str, TwoSampleTest]] = {}
    for (target_a, condition), (target_b, _) in matches:
        rows_a = [*a.outlines(target_a, "measure", condition, judges[0])]
        rows_b = [*b.outlines(target_b, "measure", condition, judges[1])]
        name = f"{target_a if target_a == target_b else f'{target_b} − {target_a}'}: {condition}"
        keys = sorted({_key(r) for r in (*rows_a, *rows_b)})
        shared = target_a == target_b and {_key(r) for r in rows_a} & {_key(r) for r in rows_b}
        first = outcomes_of(_numbered(rows_a, keys), a.includes_degraded)
        second = outcomes_of(_numbered(rows_b, keys), b.includes_degraded)
        rates[name] = summarize(first), summarize(second)
        if shared:
            pairs[name] = compare(first, second)
        else:
            samples[name] = between(first, second)
    return TwoRuns(rates, correct(pairs), correct_pairs(samples))


def _matched(a: Sequence[Place], b: Sequence[Place]) -> list[tuple[Place, Place]]:
    """Return the places that are compared: of equal target and condition, or of equal condition for one target each."""
    alone = len({t for t, _ in a}) == len({t for t, _ in b}) == 1
    return [(x, y) for x in a for y in b if x == y or (alone and x[1] == y[1])]


def _key(row: Outline) -> str:
    trial = row.trial
    return repr((str(trial.latent), trial.prompt, trial.seed))


def _numbered(rows: Sequence[Outline], keys: Sequence[str]) -> list[Outline]:
    """Return the rows with the places of their keys as indices, by which pairs are matched."""
    place = {key: n for n, key in enumerate(keys)}
    return [replace(row, trial=replace(row.trial, index=place[_key(row)])) for row in rows]
