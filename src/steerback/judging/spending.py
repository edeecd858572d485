"""What judges cost: calls, tokens and money, before and after. It asks nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from steerback.judging.base import Judge, JudgeItem

OVER_BUDGET = "budget spent"
"""How the reason of a verdict begins that was not asked for because the budget is spent; such a verdict is not kept."""


@dataclass(frozen=True, slots=True)
class Spend:
    """What was or would be asked: `cost` in USD, None where the price is unknown."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0

    def __add__(self, other: Spend) -> Spend:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        tokens = (self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)
        return Spend(self.calls + other.calls, *tokens, cost)

    def __sub__(self, other: Spend) -> Spend:
        cost = None if self.cost is None or other.cost is None else self.cost - other.cost
        tokens = (self.input_tokens - other.input_tokens, self.output_tokens - other.output_tokens)
        return Spend(self.calls - other.calls, *tokens, cost)

    def __mul__(self, times: int) -> Spend:
        cost = None if self.cost is None else self.cost * times
        return Spend(self.calls * times, self.input_tokens * times, self.output_tokens * times, cost)

    def __str__(self) -> str:
        money = "price unknown (--judge-price IN OUT)" if self.cost is None else f"{self.cost:,.2f} USD"
        return f"{self.calls:,} calls, {self.input_tokens:,} input and {self.output_tokens:,} output tokens, {money}"


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
