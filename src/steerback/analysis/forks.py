"""Forks of single responses: rates of each arm, and comparisons with the first arm, paired by seed.

The trials of a fork differ only in their seed. Given the beginning of the response, they are independent draws, so each
seed is a separate cluster, and results apply to this response only. Only attempts that begin after the fork count; the
text before them, from the beginning of the response, is the first attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steerback.analysis.base import outcomes_of
from steerback.analysis.conditions import after_cut
from steerback.metrics import Comparison, Summary, compare, correct, summarize
from steerback.store.facts import FORK, FORKS, Fork
from steerback.store.ledger import Ledger, Row


@dataclass(frozen=True, eq=False)
class ForkedArm:
    """Continuations of an arm with their summary, and tests against the first arm (None: this is the first arm)."""

    name: str
    rows: Sequence[Row]
    summary: Summary
    comparison: Comparison | None = None


@dataclass(frozen=True, eq=False)
class Forked:
    """Results of one fork by one judge."""

    target: str
    fork: Fork
    judge: str
    arms: Sequence[ForkedArm]

    def to_json(self) -> dict[str, object]:
        """Return the results as plain dicts, lists and numbers."""
        return {
            "target": self.target,
            "parent": self.fork.parent,
            "tokens": self.fork.tokens,
            "at": self.fork.at,
            "throughout": self.fork.throughout,
            "judge": self.judge,
            "n": "seeds of one response",
            "arms": {
                arm.name: {
                    "summary": _by_seed(arm.summary.to_json()),
                    "against": {self.arms[0].name: _by_seed(arm.comparison.to_json())} if arm.comparison else {},
                }
                for arm in self.arms
            },
        }


def forks(ledger: Ledger, judge: str, parent: str | None = None) -> list[Forked]:
    """Return the results of every fork of a run, or of one trial."""
    stored = [(t, fork) for t, by_name in ledger.targets_with(FORKS).items() for fork in by_name.values()]
    chosen = [(t, fork) for t, fork in stored if parent in (None, fork.parent)]
    return [forked(ledger, target, fork, judge) for target, fork in chosen]


def forked(ledger: Ledger, target: str, fork: Fork, judge: str) -> Forked:
    """Return the results of one fork."""
    rows = {arm.name: ledger.rows(target, FORK, fork.condition(arm), judge) for arm in fork.arms}
    outcomes = {
        name: outcomes_of(
            after_cut(row for row in own if row.completion is not None), ledger.includes_degraded, lambda t: t.index
        )
        for name, own in rows.items()
    }
    first, *others = outcomes
    tests = correct({name: compare(outcomes[first], outcomes[name]) for name in others})
    arms = [ForkedArm(n, rows[n], summarize(outcomes[n], draws=0), tests.get(n)) for n in outcomes]
    return Forked(target, fork, judge, arms)


def _by_seed(value: object) -> object:
    """Return a copy of the JSON whose methods describe the clusters as seeds."""
    if isinstance(value, dict):
        return {key: _by_seed(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value.replace("latents", "seeds").replace("by latent", "by seed").replace("latent", "seed")
    return value
