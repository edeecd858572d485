"""Matched prefix: the model's correction compared with a generic prefix, paired by episode and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.store.facts import CONTINUATION, GENERIC_PREFIX, MATCHED_PREFIX, PrefixPairs
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class MatchedPrefixResults(Results):
    """Summaries of the continuations, and the number of prefix pairs per target."""

    measured: Measured
    pairs: Mapping[str, PrefixPairs]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        stored = {target: MATCHED_PREFIX.dump(p) for target, p in self.pairs.items()}
        per_target = {target: {"matched_prefix": p} for target, p in stored.items()}
        return self.measured.to_json("matched-prefix", per_target, episodes=stored)


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> MatchedPrefixResults:
    """Compare every type of prefix with the generic one; only the continuation is scored."""
    conditions = measured(
        ledger, judge, draws, against=lambda c: None if c == GENERIC_PREFIX else GENERIC_PREFIX, stage=CONTINUATION
    )
    targets = list(dict.fromkeys(conditions.targets or [target for target, _ in ledger.conditions()]))
    stored = ledger.targets_with(MATCHED_PREFIX)
    return MatchedPrefixResults(conditions, {t: stored[t] for t in targets}, planted(ledger, targets))
