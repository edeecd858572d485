"""The judge that asks a language model, with the built-in attempts rubric or the user's."""

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
    """Implements `Judge` with a language model. `name` is an alias or an Inspect model string."""

    def __init__(self, name: str, transport: Transport, rubric: Rubric | None = None) -> None:
        """Build the judge; `rubric` is the user's rubric, None for the built-in one."""
        self.name, self.transport = name, transport
        self._task = ATTEMPTS if rubric is None else replace(ATTEMPTS, rubric=rubric)
        self.rubric = self._task.rubric.version
        self._asker, self._window_asker = Asker(transport, self._task), Asker(transport, WINDOWS)

    @property
    def fingerprint(self) -> str:
        return self._asker.fingerprint

    def describe(self) -> dict[str, object]:
        """Describe the judge with the full text of its rubric, so that the record needs no other version to read."""
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "rubric text": self._task.rubric.text,
            **self.transport.describe(),
        }

    def prepare(self, references: References) -> None:
        """Do nothing: this judge compares with no reference texts."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Estimate calls, tokens and cost of judging `items`."""
        return self._asker.estimate(items)

    def drain(self) -> Spend:
        """Return the spend since the last call of this method."""
        return self.transport.drain()

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yield (item key, judgement) in order of completion; a failed call gives `unscored` with the reason."""
        for item in items:
            if not item.response.strip():
                yield item.key, Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        async for item, answer in self._asker.ask([item for item in items if item.response.strip()]):
            yield item.key, judgement(answer, self.name, self.rubric)

    async def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its windows) in order of completion; one call per response."""
        version, starts = WINDOWS.rubric.version, {i.key: tuple(s.start for s in cut(i.response)) for i in items}
        for item in items:
            if not starts[item.key]:
                yield item.key, WindowScores(self.name, version, reason="no words in the response")
        async for item, answer in self._window_asker.ask([item for item in items if starts[item.key]]):
            scored = (starts[item.key], answer.value) if answer.value else ((), ())
            yield item.key, WindowScores(self.name, version, *scored, answer.reason, answer.raw, answer.over_budget)

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Estimate calls, tokens and cost of scoring the windows of `items`."""
        return self._window_asker.estimate(items)


def judgement(answer: Answer[tuple[Attempt, ...]], judge: str, version: str = ATTEMPTS.rubric.version) -> Judgement:
    """Convert an answer to the attempts rubric into a judgement."""
    if answer.value is None:
        return Judgement(judge, version, "unscored", (), answer.reason, answer.raw, answer.over_budget)
    if not answer.value:
        return Judgement(judge, version, "empty", reason="a clarifying question, says the judge", raw=answer.raw)
    return Judgement(judge, version, "scored", answer.value, raw=answer.raw)


def lacking(judge: Judge) -> list[str]:
    """Return printable notes on what a judge made for estimates still needs before it can be asked, such as a key."""
    return [f"note: {judge.transport.missing}"] if isinstance(judge, LLMJudge) and judge.transport.missing else []
