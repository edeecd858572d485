"""A fake judge for tests: it reads the scores that `engines.scripted` writes into its responses.

`[[score 43.0]]` opens an attempt; `[[empty]]` marks a clarifying question; a response without marks is unscored. A
later attempt is gated if its mark follows the restart phrase.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence

from steerback.engines.scripted import RESTART
from steerback.judging.base import JudgeItem, References
from steerback.judging.windows import cut
from steerback.records import Attempt, Judgement, Spend, WindowScores, digest

_MARK = re.compile(rf"(?:(?P<phrase>{re.escape(RESTART)}) )?\[\[score (?P<score>\d+(?:\.\d+)?)\]\]")


class ScriptedJudge:
    """Implements `Judge` with the scores in the responses. `judged` counts the verdicts returned."""

    name = "scripted"
    rubric = "scripted-1"

    def __init__(self) -> None:
        self.judged = 0

    @property
    def fingerprint(self) -> str:
        return digest(self.describe())

    def describe(self) -> dict[str, object]:
        return {"judge": self.name, "rubric": self.rubric}

    def prepare(self, references: References) -> None:
        """Do nothing: this judge compares with no reference texts."""

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        for item in items:
            self.judged += 1
            yield item.key, self.read(item.response)

    async def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores); each sentence has the score of its attempt."""
        for item in items:
            verdict, starts = self.read(item.response), tuple(s.start for s in cut(item.response))
            places = {start: a.score for start in starts for a in verdict.attempts if a.start <= start < a.end}
            reason = "" if places else verdict.reason or "nothing to score"
            yield item.key, WindowScores(self.name, self.rubric, tuple(places), tuple(places.values()), reason)

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend | None:
        """Return None: this judge is free."""
        return None

    def read(self, response: str) -> Judgement:
        """Return the judgement of one response."""
        if "[[empty]]" in response:
            return Judgement(self.name, self.rubric, "empty")
        marks = list(_MARK.finditer(response))
        if not marks:
            return Judgement(self.name, self.rubric, "unscored", reason="the response carries no planted truth")
        ends = [mark.start() for mark in marks[1:]] + [len(response)]
        attempts = tuple(
            Attempt(
                start=mark.start() if n else 0,
                end=end,
                score=float(mark["score"]),
                phrase=(mark["phrase"] or "") if n else "",
                gated=n == 0 or mark["phrase"] is not None,
            )
            for n, (mark, end) in enumerate(zip(marks, ends, strict=True))
        )
        return Judgement(self.name, self.rubric, "scored", attempts)
