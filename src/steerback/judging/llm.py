"""The judge that asks a language model: one attempts rubric, any model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from steerback.judging.asking import Answer, Asker
from steerback.judging.base import Judge, JudgeItem, References
from steerback.judging.graders import ATTEMPTS, WINDOWS
from steerback.judging.prompt import Rubric
from steerback.judging.transport import Transport
from steerback.judging.windows import cut
from steerback.records import Attempt, Judgement, Spend, WindowScores


class LLMJudge:
    """Judge protocol over a model. `name` is an alias or an Inspect model string."""

    def __init__(self, name: str, transport: Transport, own: Rubric | None = None) -> None:
        """`own` is a rubric of the user."""
        self.name, self.transport = name, transport
        self._task = ATTEMPTS if own is None else replace(ATTEMPTS, rubric=own)
        self.rubric = self._task.rubric.version
        self._asker, self._window_asker = Asker(transport, self._task), Asker(transport, WINDOWS)

    @property
    def fingerprint(self) -> str:
        return self._asker.fingerprint

    def describe(self) -> dict[str, object]:
        """Describe the judge with the full text of its rubric, so that a run can be read without this version."""
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "rubric text": self._task.rubric.text,
            **self.transport.describe(),
        }

    def prepare(self, references: References) -> None:
        """Needs nothing."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Return the calls, tokens and cost that judging `items` would take."""
        return self._asker.estimate(items)

    def spend(self) -> Spend:
        """Return what was spent so far."""
        return self.transport.spend()

    def drain(self) -> Spend:
        """Return what was spent since the last call of this method."""
        return self.transport.drain()

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yield (item key, judgement) in the order of completion; failures are unscored with their reason."""
        for item in items:
            if not item.response.strip():
                yield item.key, Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        async for item, answer in self._asker.ask([item for item in items if item.response.strip()]):
            yield item.key, judgement(answer, self.name, self.rubric)

    async def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its windows) in the order of completion, one call a response."""
        version, starts = WINDOWS.rubric.version, {i.key: tuple(s.start for s in cut(i.response)) for i in items}
        for item in items:
            if not starts[item.key]:
                yield item.key, WindowScores(self.name, version, reason="no words in the response")
        async for item, answer in self._window_asker.ask([item for item in items if starts[item.key]]):
            found = (starts[item.key], answer.value) if answer.value else ((), ())
            yield item.key, WindowScores(self.name, version, *found, answer.reason, answer.raw, answer.over_budget)

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Return the calls, tokens and cost that scoring the windows of `items` would take."""
        return self._window_asker.estimate(items)


def judgement(answer: Answer[tuple[Attempt, ...]], judge: str, version: str = ATTEMPTS.rubric.version) -> Judgement:
    """Return the judgement that an answer to the attempts rubric amounts to."""
    if answer.value is None:
        return Judgement(judge, version, "unscored", (), answer.reason, answer.raw, answer.over_budget)
    if not answer.value:
        return Judgement(judge, version, "empty", reason="a clarifying question, says the judge", raw=answer.raw)
    return Judgement(judge, version, "scored", answer.value, raw=answer.raw)


def lacking(judge: Judge) -> list[str]:
    """Return what a judge that was made for estimates lacks before it can be asked, as lines to print."""
    return [f"note: {judge.transport.missing}"] if isinstance(judge, LLMJudge) and judge.transport.missing else []
