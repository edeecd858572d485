"""Experiments whose results are conditions, their paired comparisons, and at most one stored fact of each target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.records import Judgement
from steerback.store.facts import (
    CONFIG,
    CONTINUATION,
    GENERIC_PREFIX,
    MATCHED_PREFIX,
    META_PROMPTS,
    PREFILL,
    PREFILL_ARMS,
    Fact,
    MetaPromptSet,
    PrefixCounts,
    PrefixPairs,
)
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline, Row

Kind = TypeVar("Kind", Row, Outline)
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ConditionResults(Results, Generic[T]):
    """Summaries and comparisons of every condition of `experiment`.

    `facts` are by target the stored facts of the kind `fact` that the figure shows; empty if it shows none.
    """

    experiment: str
    measured: Measured
    planted: Sequence[str]
    facts: Mapping[str, T] = field(default_factory=dict)
    fact: Fact[T] | None = None

    def stored(self) -> dict[str, object]:
        """Return the facts as plain dicts, lists and numbers, by target."""
        return {} if self.fact is None else {target: self.fact.dump(value) for target, value in self.facts.items()}

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        name = "" if self.fact is None else self.fact.name.replace("-", "_")
        return self.measured.to_json(self.experiment, {t: {name: value} for t, value in self.stored().items()})


class MatchedPrefixResults(ConditionResults[PrefixPairs]):
    """Summaries of the continuations, and the number of prefix pairs per target."""

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json; `episodes` also has the targets without a continuation."""
        return super().to_json() | {"episodes": self.stored()}


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> ConditionResults[object]:
    """Return every condition, compared with the baseline if there is one."""
    conditions = measured(ledger, judge, draws)
    experiment = str((ledger.get("", CONFIG) or {}).get("experiment", "imported"))
    return ConditionResults(experiment, conditions, planted(ledger, conditions.targets))


def meta_prompts(ledger: Ledger, judge: str, draws: int, options: object = None) -> ConditionResults[MetaPromptSet]:
    """Compare every variant with the baseline, paired by latent, prompt and seed (Fig. 4)."""
    conditions = measured(ledger, judge, draws)
    return ConditionResults("meta-prompts", conditions, *facts_of(ledger, conditions.targets, META_PROMPTS))


def prefill_control(ledger: Ledger, judge: str, draws: int, options: object = None) -> ConditionResults[PrefixCounts]:
    """Return restart and improvement rates by prefix length, and paired tests of unsteered against steered."""
    conditions = measured(ledger, judge, draws, against=other_arm, prepare=after_cut)
    return ConditionResults("prefill-control", conditions, *facts_of(ledger, conditions.targets, PREFILL))


def matched_prefix(ledger: Ledger, judge: str, draws: int, options: object = None) -> MatchedPrefixResults:
    """Compare every type of prefix with the generic one, paired by episode and seed; scores are of continuations."""
    conditions = measured(
        ledger, judge, draws, against=lambda c: None if c == GENERIC_PREFIX else GENERIC_PREFIX, stage=CONTINUATION
    )
    targets = conditions.targets or list(dict.fromkeys(target for target, _ in ledger.conditions()))
    return MatchedPrefixResults("matched-prefix", conditions, *facts_of(ledger, targets, MATCHED_PREFIX))


def facts_of(ledger: Ledger, targets: Sequence[str], fact: Fact[T]) -> tuple[list[str], dict[str, T], Fact[T]]:
    """Return the targets with planted behaviour, the stored fact of each target, and the kind of the fact."""
    stored = ledger.targets_with(fact)
    return planted(ledger, targets), {target: stored[target] for target in targets}, fact


def other_arm(condition: str) -> str | None:
    """Compare unsteered continuations with steered ones of the same prefixes."""
    arm, _, length = condition.partition(" ")
    return f"{PREFILL_ARMS[1]} {length}" if arm == PREFILL_ARMS[0] else None


def after_cut(rows: Iterable[Kind]) -> list[Kind]:
    """Return rows without attempts that begin before the cut; such an attempt is merged into the previous one."""
    return [replace(row, judgement=_merged(row.judgement, len(row.trial.lead))) for row in rows]


def _merged(judgement: Judgement | None, cut_at: int) -> Judgement | None:
    if judgement is None or judgement.status != "scored" or not cut_at:
        return judgement
    late = [replace(a, gated=n == 0 or a.start >= cut_at) for n, a in enumerate(judgement.attempts)]
    merged = replace(judgement, attempts=tuple(late)).gated_attempts()
    opened = {a.start: a.gated for a in judgement.attempts}
    return replace(judgement, attempts=tuple(replace(a, gated=opened[a.start]) for a in merged))
