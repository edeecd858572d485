"""Prefill control: restarts after the cut by prefix length, unsteered compared with steered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.records import Judgement
from steerback.store.facts import PREFILL, PREFILL_ARMS, PrefixCounts
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline, Row

Kind = TypeVar("Kind", Row, Outline)


@dataclass(frozen=True, eq=False)
class PrefillResults(Results):
    """Summaries of both arms by prefix length, and the number of prefixes."""

    measured: Measured
    prefixes: Mapping[str, PrefixCounts]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(
            "prefill-control", {target: {"prefill": PREFILL.dump(p)} for target, p in self.prefixes.items()}
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> PrefillResults:
    """Return restart and improvement rates by prefix length, and paired tests of unsteered against steered."""
    conditions = measured(ledger, judge, draws, against=other_arm, prepare=after_cut)
    stored = ledger.targets_with(PREFILL)
    return PrefillResults(conditions, {t: stored[t] for t in conditions.targets}, planted(ledger, conditions.targets))


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
