"""Comparison of two runs: paired if they share prompts, seeds and latents, else as two samples of latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from steerback.analysis.base import outcomes_of
from steerback.metrics import Comparison, Summary, TwoSampleTest, between, compare, correct, correct_pairs, summarize
from steerback.store.facts import FLOOR
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline


@dataclass(frozen=True, slots=True)
class TwoRuns:
    """Tests of run b against run a, by the names of each compared condition; differences are b - a.

    `rates` are those of each run separately, over all its valid trials. `floors` are the judge's floor of each run,
    None if not measured. `samples` are conditions in which the two runs share no combination of prompt, seed and
    latent. Holm's correction covers all pairs, and separately all samples.
    """

    rates: dict[str, tuple[Summary, Summary]]
    floors: dict[str, tuple[Summary | None, Summary | None]]
    pairs: dict[str, Comparison]
    samples: dict[str, dict[str, TwoSampleTest]]


def compare_runs(a: Ledger, b: Ledger, judges: tuple[str, str]) -> TwoRuns:
    """Compare the measured conditions of both ledgers; two runs with one target each may have different targets."""
    places_a, places_b = a.conditions(), b.conditions()
    alone = len({target for target, _ in places_a}) == len({target for target, _ in places_b}) == 1
    matches = [(x, y) for x in places_a for y in places_b if x == y or (alone and x[1] == y[1])]
    rates: dict[str, tuple[Summary, Summary]] = {}
    floors: dict[str, tuple[Summary | None, Summary | None]] = {}
    pairs: dict[str, Comparison] = {}
    samples: dict[str, dict[str, TwoSampleTest]] = {}
    for (target_a, condition), (target_b, _) in matches:
        rows_a = [*a.outlines(target_a, "measure", condition, judges[0])]
        rows_b = [*b.outlines(target_b, "measure", condition, judges[1])]
        name = f"{target_a if target_a == target_b else f'{target_b} − {target_a}'}: {condition}"
        keys_a, keys_b = _keys(rows_a), _keys(rows_b)
        shared = target_a == target_b and not set(keys_a).isdisjoint(keys_b)
        place = {key: n for n, key in enumerate(sorted({*keys_a, *keys_b}))}
        first = outcomes_of(_numbered(rows_a, keys_a, place), a.includes_degraded)
        second = outcomes_of(_numbered(rows_b, keys_b, place), b.includes_degraded)
        rates[name] = summarize(first), summarize(second)
        floors[name] = _floor(a, target_a, judges[0]), _floor(b, target_b, judges[1])
        if shared:
            pairs[name] = compare(first, second)
        else:
            samples[name] = between(first, second)
    return TwoRuns(rates, floors, correct(pairs), correct_pairs(samples))


def _floor(ledger: Ledger, target: str, judge: str) -> Summary | None:
    """Return the rates of a target's unsteered responses, clustered by prompt."""
    rows = [*ledger.outlines(target, FLOOR, judge=judge)]
    return summarize(outcomes_of(rows, ledger.includes_degraded, lambda trial: trial.prompt)) if rows else None


def _keys(rows: Sequence[Outline]) -> list[str]:
    """Return latent, prompt and seed of each trial, and a number for duplicates (imported files may lack seeds)."""
    seen: Counter[str] = Counter()
    keys = []
    for row in rows:
        key = repr((str(row.trial.latent), row.trial.prompt, row.trial.seed))
        keys.append(f"{key} {seen[key]}")
        seen[key] += 1
    return keys


def _numbered(rows: Sequence[Outline], keys: Sequence[str], place: Mapping[str, int]) -> list[Outline]:
    """Return the rows with their keys as indices, which match the pairs."""
    return [replace(row, trial=replace(row.trial, index=place[key])) for row, key in zip(rows, keys, strict=True)]
