"""LLM judges: the attempts rubric asked of any model through `transport`, parsed by `parse`.

Knows the rubric, the model's name and the budget; nothing of ledgers, engines or providers' protocols.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from steerback.judging.base import JudgeItem, References
from steerback.judging.parse import parse_attempts
from steerback.judging.prompt import ATTEMPTS, Asked, ask, rubric
from steerback.judging.transport import Transport
from steerback.records import Judgement, Spend, digest


class LLMJudge:
    """Judge protocol over a model. `name` is what the user asked for: an alias or an Inspect model string."""

    def __init__(self, name: str, transport: Transport, version: str = ATTEMPTS) -> None:
        self.name = name
        self.rubric = version
        self.transport = transport
        self._temperature = transport.temperature  # as asked for; a model that takes none is still the same judge

    @property
    def fingerprint(self) -> str:
        body = {
            "model": self.transport.model,
            "rubric": rubric(self.rubric).system,
            "temperature": self._temperature,
            "max_tokens": self.transport.limits.max_tokens,
            "base_url": self.transport.base_url,
        }
        return digest(body)

    def describe(self) -> dict[str, object]:
        """With the full text of the rubric, so that a run can be read without this version of the code."""
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "rubric text": rubric(self.rubric).system,
            **self.transport.describe(),
        }

    def prepare(self, references: References) -> None:
        """Needs nothing."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Calls, tokens and cost that judging `items` would take."""
        return self.transport.estimate(self._ask(item) for item in items)

    def spend(self) -> Spend:
        """What was spent so far."""
        return self.transport.spend()

    def drain(self) -> Spend:
        """What was spent since the last call of this method."""
        return self.transport.drain()

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yields (item key, judgement) in the order of completion; failures are unscored with their reason."""
        places = {str(i): item for i, item in enumerate(items)}
        asked = {place: self._ask(item) for place, item in places.items() if item.response.strip()}
        for item in items:
            if not item.response.strip():
                yield item.key, Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        async for place, reply in self.transport.ask(asked.items()):
            item = places[place]
            if reply.reason:
                verdict = Judgement(self.name, self.rubric, "unscored", (), reply.reason, reply.text, reply.over_budget)
            else:
                verdict = parse_attempts(
                    reply.text, item.response, asked[place].nonce, judge=self.name, rubric=self.rubric
                )
            yield item.key, verdict

    def _ask(self, item: JudgeItem) -> Asked:
        return ask(rubric(self.rubric), item)
