"""The one way to ask a language model about many items: a rubric, the items, and a function that reads a verdict.

Judges, graders, the rater of labels, the labeller of latents and the writer of training examples are each a `Task`. An
`Asker` sends the task's questions through one transport (and so within one budget), reads the replies, and keeps
them in the cache under everything that shaped them, so that nothing is paid for twice.
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
    """The value that a reply gives an item, or None with the reason; `over_budget`: the question was never sent."""

    value: Value | None
    reason: str = ""
    raw: str = ""
    over_budget: bool = False


@dataclass(frozen=True, slots=True)
class Task(Generic[Item, Value]):
    """One use of a language model.

    `places` turns the items of one call into the texts of the question, of which `enclosed` is not trusted. `parse`
    reads the value of an item from the verdict, by the item's number in its call (from 1), or raises Unusable.
    """

    rubric: Rubric
    places: Callable[[Sequence[Item]], Mapping[str, str]]
    parse: Callable[[Verdict, Item, int], Value]
    enclosed: str = ""
    closing: str = CLOSING
    items_per_call: int = 1
    output_tokens: int = 150  # of a usual reply, for estimates
    keep_unusable: bool = False  # whether a reply that cannot be read counts as an answer in the cache

    def question(self, items: Sequence[Item]) -> Query:
        """Return the question about the items of one call, with a new nonce."""
        return compose(self.rubric, self.places(items), self.enclosed, self.closing)

    def read(self, reply: str, nonce: str, item: Item, number: int = 1) -> Answer[Value]:
        """Return the answer that a reply gives to one of its items."""
        try:
            return Answer(self.parse(find_verdict(reply, nonce), item, number), raw=reply)
        except Unusable as unusable:
            return Answer(None, str(unusable), reply)


class Asker(Generic[Item, Value]):
    """Asks a model a task's questions. `cache` is a cache file that keeps the replies; None keeps nothing."""

    def __init__(self, transport: Transport, task: Task[Item, Value], cache: Path | None = None) -> None:
        self.transport, self.task, self._cache = transport, task, cache

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that shapes a reply besides the items."""
        body = {
            "model": self.transport.model,
            "rubric": self.task.rubric.system,
            "temperature": self.transport.temperature,
            "max_tokens": self.transport.limits.max_tokens,
            "base_url": self.transport.base_url,
        }
        return digest(body | ({"template": self.task.rubric.template} if self.task.rubric.template else {}))

    def estimate(self, items: Sequence[Item]) -> Spend:
        """Return what asking about the items would take, those with a kept reply left out."""
        known = self._known(items)
        missing = [item for item in items if self._key(item) not in known] if known else items
        questions = (self.task.question(group) for group in self._calls(missing))
        return self.transport.estimate(questions, self.task.output_tokens)

    async def ask(self, items: Sequence[Item]) -> AsyncGenerator[tuple[Item, Answer[Value]]]:
        """Yield each item once with its answer: first those with a kept reply, then in the order of completion.

        A reply of which nothing can be read is asked for again, `Limits.ask_again` times.
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
                    if left and not reply.reason and all(answer.reason for answer in answers):
                        waiting.append(group)
                        continue
                    for item, answer in zip(group, answers, strict=True):
                        yield item, answer

    def _read(self, group: Sequence[Item], question: Query, reply: Reply) -> list[Answer[Value]]:
        """Read the answers to the items of one call, and keep the reply."""
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
