"""What else judges are asked for: how concrete labels are, where an episode's parts begin, how far a text recovers.

All go through the one transport, with untrusted text enclosed and quotations verified. Knows labels, responses and
judgements; nothing of ledgers or latents.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.judging.base import JudgeItem
from steerback.judging.parse import Quotable, WholeScore, parse_ratings, parse_verdict, parse_whole
from steerback.judging.prompt import BOUNDARIES, CONCRETENESS, WHOLE, Asked, ask, enclose, encodable, rubric
from steerback.judging.spending import OVER_BUDGET
from steerback.judging.transport import Transport
from steerback.records import Judgement, Spend, digest
from steerback.store.files import make_folder, write_atomic

LABELS_PER_CALL = 40


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Character offsets in a response of an episode: where it leaves the topic, says so, and is back; None if nowhere.

    `reason` says why there are none at all.
    """

    off_topic: int | None = None
    correction: int | None = None
    on_topic: int | None = None
    reason: str = ""


def _questions(labels: Sequence[str]) -> list[tuple[Sequence[str], Asked]]:
    """Many labels a call, each numbered on a line of its own."""
    found = []
    for i in range(0, len(labels), LABELS_PER_CALL):
        group = labels[i : i + LABELS_PER_CALL]
        listed = "\n".join(f"{n}. {' '.join(encodable(label).split())}" for n, label in enumerate(group, 1))
        found.append((group, enclose(rubric(CONCRETENESS), "labels", listed)))
    return found


class LLMRater:
    """Concreteness of labels by an LLM, 0-100, many labels a call; each rating is asked for once per model and rubric.

    Implements `latents.concreteness.Rater`. `store` is a JSON file, None keeps nothing.
    """

    version = CONCRETENESS

    def __init__(self, name: str, transport: Transport, store: Path | None = None) -> None:
        self.name = name
        self._transport = transport
        self._store = store

    def rate(self, labels: Sequence[str]) -> list[float | None]:
        """One rating per label, None where the judge gave none. Runs in a thread of its own: callers may be async.

        Raises SteerbackError where the budget is spent before all are rated; what was rated is kept.
        """
        known = self._read()
        if missing := self._missing(labels, known):
            with ThreadPoolExecutor(1) as thread:
                found, refused = thread.submit(asyncio.run, self._ask(missing)).result()
            known = self._read() | {self._key(label): rating for label, rating in found.items()}
            self._write(known)
            if refused:
                raise SteerbackError(
                    f"rater {self.name}: {refused}; {len(found)} of {len(missing)} labels were rated and are kept: "
                    "go on with a higher one"
                )
        return [known.get(self._key(label)) for label in labels]

    def estimate(self, labels: Sequence[str]) -> Spend:
        """What rating `labels` would take beyond those that are rated already."""
        questions = _questions(self._missing(labels, self._read()))
        return self._transport.estimate((question for _, question in questions), 10 * LABELS_PER_CALL)

    def drain(self) -> Spend:
        """What was spent since the last call of this method."""
        return self._transport.drain()

    def _missing(self, labels: Sequence[str], known: Mapping[str, float]) -> list[str]:
        return [label for label in dict.fromkeys(labels) if self._key(label) not in known]

    async def _ask(self, labels: Sequence[str]) -> tuple[dict[str, float], str]:
        """Ratings, and why the rest was not asked for if the budget did not allow it."""
        asked = {str(i): question for i, question in enumerate(_questions(labels))}
        ratings: dict[str, float] = {}
        refused = ""
        async for key, reply in self._transport.ask((k, question) for k, (_, question) in asked.items()):
            group, question = asked[key]
            numbers = {} if reply.reason else parse_ratings(reply.text, question.nonce, len(group))
            ratings |= {group[n - 1]: rating for n, rating in numbers.items()}
            refused = reply.reason if reply.reason.startswith(OVER_BUDGET) else refused
        return ratings, refused

    def _key(self, label: str) -> str:
        return digest([self._transport.model, rubric(CONCRETENESS).system, label])

    def _read(self) -> dict[str, float]:
        if self._store is None or not self._store.is_file():
            return {}
        found: dict[str, float] = json.loads(self._store.read_text(encoding="utf-8"))
        return found

    def _write(self, ratings: Mapping[str, float]) -> None:
        if self._store is None:
            return
        make_folder(self._store.parent)
        write_atomic(self._store, json.dumps(ratings).encode())


class WholeJudge:
    """Scores whole responses 0-10 for finding their way back, restart phrase or not (control for gradual recovery)."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """What asking about `items` would take."""
        return self._transport.estimate(ask(rubric(WHOLE), item) for item in items)

    async def score(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WholeScore]]:
        """Yields (item key, score) in the order of completion."""
        asked = {str(i): (item, ask(rubric(WHOLE), item)) for i, item in enumerate(items)}
        async for key, reply in self._transport.ask((k, question) for k, (_, question) in asked.items()):
            item, question = asked[key]
            if reply.reason:
                yield item.key, WholeScore(None, reason=reply.reason, raw=reply.text)
            else:
                yield item.key, parse_whole(reply.text, question.nonce)


class BoundaryAnnotator:
    """Marks the parts of self-correction episodes; every mark is verified against the text."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """What asking about `items` would take."""
        return self._transport.estimate(ask(rubric(BOUNDARIES), item) for item in items)

    async def annotate(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Boundaries]]:
        """Yields (item key, boundaries) in the order of completion."""
        asked = {str(i): (item, ask(rubric(BOUNDARIES), item)) for i, item in enumerate(items)}
        async for key, reply in self._transport.ask((k, question) for k, (_, question) in asked.items()):
            item, question = asked[key]
            if reply.reason:
                yield item.key, Boundaries(reason=reply.reason)
            else:
                yield item.key, verified_boundaries(reply.text, question.nonce, item.response)


def verified_boundaries(reply: str, nonce: str, response: str) -> Boundaries:
    """The boundaries that a reply quotes; none where a quotation does not occur or the order is impossible."""
    verdict = parse_verdict(reply, nonce)
    if isinstance(verdict, str):
        return Boundaries(reason=verdict)
    text, after = Quotable(response), 0
    places: dict[str, int] = {}
    for name in ("off_topic", "correction", "on_topic"):
        quoted = verdict.get(name)
        if quoted is None:
            continue
        found = text.find(quoted, after) if isinstance(quoted, str) else None
        if found is None:
            return Boundaries(reason=f"the quoted words for {name} do not occur in the response (or not in this order)")
        places[name] = after = found[0]
    return Boundaries(places.get("off_topic"), places.get("correction"), places.get("on_topic"))


def offline_boundaries(response: str, judgement: Judgement) -> Boundaries:
    """The same from a judgement: the first attempt, the restart phrase after it, and where that phrase ends.

    Taken from the first restart whose attempt scores more than the attempt before it.
    """
    attempts = judgement.gated_attempts()
    for before, attempt in pairwise(attempts):
        if attempt.score > before.score and attempt.phrase:
            found = Quotable(response[attempt.start : attempt.end]).find(attempt.phrase)
            end = attempt.start + (found[1] if found else len(attempt.phrase))
            while end < attempt.end and not response[end].isalnum():
                end += 1
            return Boundaries(before.start, attempt.start, end)
    return Boundaries(reason="no attempt that improves on the one before it")
