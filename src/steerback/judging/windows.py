"""Windows of a response: its sentences. A judge can score the relevance of each, with or without a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from steerback.config import RecoveryConfig
from steerback.judging.base import JudgeItem, PaidJudge
from steerback.judging.text import Span, sentences
from steerback.records import Spend, WindowScores

MOST_WINDOWS = 50
"""Largest number of windows. Longer responses get several sentences per window, so that a judge's reply stays short."""


@runtime_checkable
class WindowScorer(Protocol):
    """A judge that can also score windows. Each item is returned exactly once, with scores or a reason."""

    name: str

    def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its windows) in any order."""
        ...

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend | None:
        """Estimate calls, tokens and cost of scoring the windows of `items`; None for a free judge."""
        ...


def cut(response: str) -> list[Span]:
    """Return the windows of a response: its sentences, joined evenly to at most MOST_WINDOWS."""
    return join(sentences(response))


def join(spans: Sequence[Span]) -> list[Span]:
    """Join neighbouring spans evenly until at most MOST_WINDOWS are left."""
    size = -(-len(spans) // MOST_WINDOWS) or 1
    return [Span(g[0].start, g[-1].end) for i in range(0, len(spans), size) for g in (spans[i : i + size],)]


def window_scorer(judge: object, settings: RecoveryConfig) -> WindowScorer | None:
    """Return the judge if it should score windows, else None. Without a setting, only free judges score windows."""
    wanted = settings.judge if settings.judge is not None else not isinstance(judge, PaidJudge)
    return judge if wanted and isinstance(judge, WindowScorer) else None
