"""Windows of a response: its sentences, each of which a judge can score for relevance, restart phrase or not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from steerback.config import RecoveryConfig
from steerback.judging.base import JudgeItem, PaidJudge
from steerback.judging.text import Span, sentences
from steerback.records import Spend, WindowScores

MOST_WINDOWS = 50
"""Longer responses have several sentences in a window, so that a reply of a language model stays short."""


@runtime_checkable
class WindowScorer(Protocol):
    """A judge that scores the windows of responses as well. Every item comes back once, with scores or a reason."""

    name: str

    def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its windows) in any order."""
        ...

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend | None:
        """Return what scoring the windows of `items` would take; None for a judge that costs nothing."""
        ...


def cut(response: str) -> list[Span]:
    """Return the windows of a response: its sentences, evenly joined where there are more than MOST_WINDOWS."""
    return join(sentences(response))


def join(spans: Sequence[Span]) -> list[Span]:
    """Join neighbours evenly until there are at most MOST_WINDOWS."""
    size = -(-len(spans) // MOST_WINDOWS) or 1
    return [Span(g[0].start, g[-1].end) for i in range(0, len(spans), size) for g in (spans[i : i + size],)]


def window_scorer(judge: object, settings: RecoveryConfig) -> WindowScorer | None:
    """Return the judge if it is to score windows: as the settings say, else if it costs nothing."""
    wanted = settings.judge if settings.judge is not None else not isinstance(judge, PaidJudge)
    return judge if wanted and isinstance(judge, WindowScorer) else None
