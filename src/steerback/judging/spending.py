"""What judges cost: calls, tokens and money, before and after. It asks nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from steerback.judging.base import Judge, JudgeItem
from steerback.records import Spend

OVER_BUDGET = "budget spent"
"""How the reason of a verdict begins that was not asked for because the budget is spent; such a verdict is not kept."""


@runtime_checkable
class Paid(Protocol):
    """A judge that is asked over a wire: it can say what it would take, and what it has taken."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """What judging `items` would take, from their lengths."""
        ...

    def drain(self) -> Spend:
        """What was spent since the last call of this method, by the provider's counts."""
        ...


def estimated(judge: Judge, items: Sequence[JudgeItem]) -> Spend | None:
    """What judging `items` would take; None for a judge that costs nothing."""
    return judge.estimate(items) if isinstance(judge, Paid) else None


def drain(judge: object) -> Spend | None:
    """What was spent since the last call; None for what costs nothing, or where nothing was asked."""
    spent = judge.drain() if isinstance(judge, Paid) else Spend()
    return spent if spent.calls else None
