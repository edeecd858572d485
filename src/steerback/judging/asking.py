"""Ask a language model about many items, with one rubric and one function that reads the verdicts.

Every use of a language model is a `Task`: judging, grading, rating labels, labelling latents, writing training
examples. An `Asker` sends the questions of a task through one transport, which enforces one budget, and reads the
replies. It caches each reply under everything that shaped it, so that no question is paid for twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from steerback.judging.parse import Unusable, Verdict, find_verdict
from steerback.judging.prompt import CLOSING, Query, Rubric, compose
from steerback.judging.transport import Reply, Transport
from steerback.records import Spend, digest
from steerback.store.cache import Cache, KeptReply, cache_key

Item = TypeVar("Item")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Answer(Generic[Value]):
    """The value read from a reply for one item, or None with the reason.

    `over_budget`: the budget was spent, so the question was never sent.
    """

    value: Value | None
    reason: str = ""
    raw: str = ""
    over_budget: bool = False


@dataclass(frozen=True, slots=True)
class Task(Generic[Item, Value]):
    """One use of a language model.

    `places` returns the texts of a question about the items of one call. `enclosed` names the text that is untrusted.
    `parse` reads the value of one item from the verdict; its third argument is the item's number in the call, from 1.
    `parse` raises Unusable if the verdict has no valid value.
    """

    rubric: Rubric
    places: Callable[[Sequence[Item]], Mapping[str, str]]
    parse: Callable[[Verdict, Item, int], Value]
    enclosed: str = ""
    closing: str = CLOSING
    items_per_call: int = 1
    output_tokens: int = 150  # length of a typical reply, for estimates
    keep_unusable: bool = False  # whether the cache also keeps replies that cannot be parsed

    def question(self, items: Sequence[Item]) -> Query:
        """Return the question about the items of one call, with a fresh nonce."""
        return compose(self.rubric, self.places(items), self.enclosed, self.closing)

    def read(self, reply: str, nonce: str, item: Item, number: int = 1) -> Answer[Value]:
        """Parse the answer for one item from a reply."""
        try:
            return Answer(self.parse(find_verdict(reply, nonce), item, number), raw=reply)
        except Unusable as unusable:
            return Answer(None, str(unusable), reply)


class Asker(Generic[Item, Value]):
    """Asks a model the questions of a task. `cache` is the file that stores replies; None disables the cache."""

    def __init__(self, transport: Transport, task: Task[Item, Value], cache: Path | None = None) -> None:
        self.transport, self.task, self._cache = transport, task, cache

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything except the items that shapes a reply."""
        body = {
            "model": self.transport.model,
            "rubric": self.task.rubric.system,
            "temperature": self.transport.temperature,
            "max_tokens": self.transport.limits.max_tokens,
            "base_url": self.transport.base_url,
        }
        return digest(body | ({"template": self.task.rubric.template} if self.task.rubric.template else {}))

    def estimate(self, items: Sequence[Item]) -> Spend:
        """Estimate calls, tokens and cost of asking about the items that have no cached reply."""
        known = self._known(items)
        missing = [item for item in items if self._key(item) not in known] if known else items
        questions = (self.task.question(group) for group in self._calls(missing))
        return self.transport.estimate(questions, self.task.output_tokens)

    async def ask(self, items: Sequence[Item]) -> AsyncGenerator[tuple[Item, Answer[Value]]]:
        """Yield each item once with its answer: cached answers first, the others in order of completion.

        If nothing in a reply can be parsed, the question is asked again, up to `Limits.ask_again` times.
        """
        known, missing = self._known(items), []
        for item in items:
            kept = known.get(self._key(item)) if known else None
            if kept is None:
                missing.append(item)
            else:
                yield item, self.task.read(kept.text, kept.nonce, item, kept.number)
        waiting = list(self._calls(missing))
        for left in range(self.transport.limits.ask_again, -1, -1):
            asked = {str(i): (group, self.task.question(group)) for i, group in enumerate(waiting)}
            waiting = []
            if not asked:
                return
            replies = self.transport.ask((key, question) for key, (_, question) in asked.items())
            async with contextlib.aclosing(replies):
                async for key, reply in replies:
                    group, question = asked[key]
                    answers = self._read(group, question, reply)
                    # nothing could be parsed: ask again, except in the last round and after a failed call
                    if left and not reply.reason and all(answer.reason for answer in answers):
                        waiting.append(group)
                        continue
                    for item, answer in zip(group, answers, strict=True):
                        yield item, answer

    def _read(self, group: Sequence[Item], question: Query, reply: Reply) -> list[Answer[Value]]:
        """Parse the answers to the items of one call and store the reply in the cache."""
        if reply.reason:
            return [Answer(None, reply.reason, reply.text, reply.over_budget) for _ in group]
        answers = [self.task.read(reply.text, question.nonce, item, n) for n, item in enumerate(group, 1)]
        if self._cache is not None:
            kept = {
                self._key(item): KeptReply(reply.text, question.nonce, n)
                for n, (item, answer) in enumerate(zip(group, answers, strict=True), 1)
                if not answer.reason or self.task.keep_unusable
            }
            with contextlib.closing(Cache(self._cache)) as cache:
                cache.put_replies(kept)
        return answers

    def _calls(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        size = self.task.items_per_call
        return (items[i : i + size] for i in range(0, len(items), size))

    def _key(self, item: Item) -> str:
        return cache_key("reply", self.fingerprint, digest(item))

    def _known(self, items: Sequence[Item]) -> dict[str, KeptReply]:
        if self._cache is None or not self._cache.is_file():
            return {}
        with contextlib.closing(Cache(self._cache)) as cache:
            return cache.replies([self._key(item) for item in items])
