"""Judges without key, network or download: `offline` and, for comparison, `offline-bayes`.

They split a response at explicit restarts (restarts.py) and score each attempt by the share of its words that are on
topic (relevance.py). They compare words with unsteered responses of the target, so they cannot judge whether an answer
is correct. This module knows nothing about models, engines or ledgers.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from steerback.judging.base import JudgeItem, References
from steerback.judging.gating import gate
from steerback.judging.processes import Processes
from steerback.judging.restarts import Restart, find_restarts
from steerback.judging.text import Span, sentences, words
from steerback.judging.windows import MOST_WINDOWS, join
from steerback.records import Attempt, Judgement, LatentKey, Spend, WindowScores, digest

if TYPE_CHECKING:
    from steerback.judging.relevance import Relevance, WordLikelihood

NOTICE = "the offline judge compares words; its scores are not comparable with the paper's"
BATCH, SHARE = 64, 16
"""Responses that this process judges together, and that it gives to another one: fewer, so that all get some."""
MANY = 256
"""Number of judged responses after which more processes judge; at once if more are expected."""
KEPT, SHORT = 8192, 4000
"""Number of responses whose parts are kept, and their largest number of characters."""
STAY = 0.8
"""Prior probability that two neighbouring sentences are both on topic or both off topic, as drifts are contiguous."""

_ASKS = re.compile(
    r"\b(?:could|can|would|will|do|did|are|were|what|which|how|should|is|may)\b.*\b(?:you|your|this|that|context)\b.*\?"
    r"|\b(?:clarify|more (?:details?|context|information)|specify|elaborate)\b",
    re.I,
)
_POLITE = re.compile(
    r"(?:i(?:'m| am)? .{0,30}\b(?:sorry|not sure|unsure|happy|glad)|i'd be|i would be|i don't (?:quite )?understand"
    r"|sure|of course|certainly|hello|hi\b|happy to help|thanks?|great|please)",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a response: the restart that opens it, its end, its sentences after the restart, their log-odds."""

    restart: Restart
    end: int
    sentences: Sequence[Span]
    odds: Sequence[float]


T = TypeVar("T")
Verdicts = Callable[["OfflineJudge", Sequence[JudgeItem]], Sequence[T]]
"""A method that returns the verdicts of a batch."""
Key = tuple[str, str, LatentKey | None, str | None]
Model = tuple["Relevance | WordLikelihood | None", dict[Key, Sequence[Part]]]
_models: dict[str, Model] = {}
"""By judge, for the last two: relevance model and responses read with it. The runs of a campaign share references."""
_processes: dict[str, Processes[OfflineJudge]] = {}
"""By judge, for the last two: the processes that judge beside this one."""


class OfflineJudge:
    """Implements `Judge`: splits at restarts and scores each attempt by its length-weighted share on topic."""

    def __init__(self, name: str = "offline") -> None:
        self.name, self.rubric = name, f"{name}-2"
        self._references = References()
        self._own: Model | None = None
        self._fingerprint: str | None = None
        self._processes: Processes[OfflineJudge] | None = None
        self._count = 0

    @property
    def fingerprint(self) -> str:
        """Hash of the judge, its references, and the code and data files that shape its verdicts."""
        if self._fingerprint is None:
            body = {
                "judge": self.name,
                "rubric": self.rubric,
                "code": _code_hash(),
                "responses": {p: list(r) for p, r in self._references.responses.items()},
                "contexts": _hash_of_contexts(tuple((str(k), *c) for k, c in self._references.contexts.items())),
            }
            self._fingerprint = digest(body)  # cached, because every verdict needs it
        return self._fingerprint

    def describe(self) -> dict[str, object]:
        """Describe the judge and its limits, for the run's manifest."""
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "reference prompts": len(self._references.responses),
            "notice": NOTICE,
            "cannot": "judge correctness; credit paraphrase far from the references; read any language but English",
        }

    def prepare(self, references: References) -> None:
        """Build the relevance model from the references; if other processes do, only when it is needed here."""
        self._references, self._fingerprint, self._own = references, None, None
        self._processes = _processes.get(self.fingerprint)
        if self._processes is None and references.expected > MANY:
            self._start_processes()
        if self._processes is None or self._processes.starting() is None:
            self._model()

    def _model(self) -> Model:
        """Return the relevance model, None without references, and the parts that were read with it."""
        self._own = self._own or _models.get(self.fingerprint)
        if self._own is None:
            from steerback.judging.relevance import Relevance, WordLikelihood  # scikit-learn takes a second to import

            responses = self._references.responses
            has_words = any(words(r) for texts in responses.values() for r in texts)
            relevance = Relevance if self.name == "offline" else WordLikelihood
            self._own = relevance(self._references) if has_words else None, {}
            _keep(_models, self.fingerprint, self._own)
        return self._own

    def _start_processes(self) -> None:
        self._processes = Processes(partial(_prepared, self.name, replace(self._references, expected=0)))
        _keep(_processes, self.fingerprint, self._processes)

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yield (item key, judgement) in order; other tasks can run between batches."""
        async for key, judgement in self._in_batches(items, OfflineJudge.judge_batch):
            yield key, judgement

    async def _in_batches(self, items: Sequence[JudgeItem], work: Verdicts[T]) -> AsyncIterator[tuple[str, T]]:
        elsewhere = self._processes is not None and self._processes.starting() is not None
        size = SHARE if elsewhere else BATCH
        for at in range(0, len(items), BATCH):
            batch = items[at : at + BATCH]
            parts = [batch[i : i + size] for i in range(0, len(batch), size)]
            verdicts = await asyncio.gather(*(self._worked(work, part) for part in parts))
            for item, verdict in zip(batch, itertools.chain(*verdicts), strict=True):
                yield item.key, verdict
            await asyncio.sleep(0)

    async def _worked(self, work: Verdicts[T], batch: Sequence[JudgeItem]) -> Sequence[T]:
        """Return the verdicts of a batch: of another process if many are judged, so that an engine's driver can work.

        Until the processes have started, this process judges if it has a model. It also judges if one of them ends.
        """
        self._count += len(batch)
        try:
            if self._processes is None and self._count > MANY:
                self._start_processes()
            if self._processes is not None:
                if self._own is None and (starting := self._processes.starting()) is not None:
                    await asyncio.shield(asyncio.wrap_future(starting))
                if (judging := self._processes.start(work, batch)) is not None:
                    return await asyncio.wrap_future(judging)
        except BrokenExecutor:
            assert self._processes is not None
            self._processes.stop()
        return work(self, batch)

    def judge_batch(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Return the judgements of the items, in order."""
        verdicts = [self._without_score(item) for item in items]
        read = iter(self._read([item for item, verdict in zip(items, verdicts, strict=True) if verdict is None]))
        return [verdict or self._scored(item, next(read)) for item, verdict in zip(items, verdicts, strict=True)]

    def _scored(self, item: JudgeItem, parts: Sequence[Part]) -> Judgement:
        text, attempts = item.response, []
        for number, part in enumerate(parts):
            lengths = [max(len(words(text[s.start : s.end])), 1) for s in part.sentences]
            phrase = text[part.restart.start : part.restart.end] if number else ""
            score = score_attempt(lengths, part.odds, self._stay)
            attempts.append(Attempt(part.restart.start, part.end, score, phrase))
        return Judgement(self.name, self.rubric, "scored", gate(text, attempts))

    async def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its sentences) in order; restart phrases are in no window."""
        async for key, scores in self._in_batches(items, OfflineJudge._window_batch):
            yield key, scores

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend | None:
        """Return None: this judge is free."""
        return None

    def _window_batch(self, items: Sequence[JudgeItem]) -> list[WindowScores]:
        missing = [self._without_score(item) for item in items]
        read = iter(self._read([item for item, m in zip(items, missing, strict=True) if m is None], joined=True))
        results = []
        for m in missing:
            parts = () if m else next(read)
            on_topic = chain([x for part in parts for x in part.odds], self._stay)
            scores, starts = tuple(round(100 * p, 2) for p in on_topic), [s.start for p in parts for s in p.sentences]
            nothing = "" if scores else (m.reason if m else "") or "no sentence"
            results.append(WindowScores(self.name, self.rubric, tuple(starts), scores, nothing))
        return results

    def _without_score(self, item: JudgeItem) -> Judgement | None:
        """Return the judgement of a response that cannot be scored, None for all others."""
        if not words(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        if is_clarifying_question(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="a clarifying question")
        relevance, _ = self._model()
        if relevance is None or not relevance.knows(item.prompt):
            reason = "no unsteered reference responses for this prompt, which the offline judge compares with"
            return Judgement(self.name, self.rubric, "unscored", reason=reason)
        return None

    def _read(self, items: Sequence[JudgeItem], joined: bool = False) -> list[Sequence[Part]]:
        """Return the parts of each response; with `joined`, one part with the windows of a response of many sentences.

        The parts of the last short responses are kept, because verdicts and windows need the same.
        """
        keys, (_, known) = [(item.response, item.prompt, item.latent, item.label) for item in items], self._model()
        read = {key: known[key] for key in keys if key in known}
        fresh = {key: item for key, item in zip(keys, items, strict=True) if key not in read}
        kept: list[Key] = []
        cuts, pieces = {}, []
        for key, item in fresh.items():
            cuts[key] = _cut(*key[:2], self.name)
            spans = [span for *_, spans in cuts[key] for span in spans]
            if len(spans) <= MOST_WINDOWS and len(key[0]) <= SHORT:
                kept.append(key)
            elif joined:
                cuts[key] = [(Restart(0, 0), len(key[0]), spans := join(spans))]
            pieces += [(item, key[0][s.start : s.end]) for s in spans]
        odds = iter(self._log_odds(pieces))
        for key, cut in cuts.items():
            read[key] = [Part(restart, end, spans, [next(odds) for _ in spans]) for restart, end, spans in cut]
        known.update((key, read[key]) for key in kept)
        while len(known) > KEPT:
            del known[next(iter(known))]
        return [read[key] for key in keys]

    def _log_odds(self, pieces: Sequence[tuple[JudgeItem, str]]) -> list[float]:
        """Return the log-odds that each sentence is on topic; minus infinity for degenerate sentences."""
        from steerback.judging.relevance import is_degenerate

        relevance, _ = self._model()
        if relevance is None or not pieces:
            return []
        texts, prompts = [t for _, t in pieces], [item.prompt for item, _ in pieces]
        odds = relevance.log_odds(texts, prompts, [(item.latent, item.label) for item, _ in pieces])
        return [-math.inf if is_degenerate(t) else float(x) for t, x in zip(texts, odds, strict=True)]

    @property
    def _stay(self) -> float:
        return STAY if self.name == "offline" else 0.5


def _keep(kept: dict[str, T], judge: str, new: T) -> None:
    """Keep something for the last two judges."""
    while len(kept) > 1:
        del kept[next(iter(kept))]
    kept[judge] = new


def _prepared(name: str, references: References) -> OfflineJudge:
    judge = OfflineJudge(name)
    judge.prepare(references)
    return judge


def _cut(text: str, prompt: str, judge: str) -> list[tuple[Restart, int, list[Span]]]:
    """Return for each attempt the restart that opens it, its end, and its sentences after the restart."""
    restarts = [Restart(0, 0), *find_restarts(text, prompt, judge)]
    ends = [*(r.start for r in restarts[1:]), len(text)]
    pairs = zip(restarts, ends, strict=True)
    return [(r, end, [Span(r.end + s.start, r.end + s.end) for s in sentences(text[r.end : end])]) for r, end in pairs]


@lru_cache(2)  # the contexts of 16,384 latents take up to half a second, and the runs of a campaign share them
def _hash_of_contexts(contexts: tuple[tuple[str, ...], ...]) -> str:
    return digest(sorted(contexts))


@cache
def _code_hash() -> str:
    """Hash the code and data files that shape a verdict."""
    names = ("offline.py", "relevance.py", "restarts.py", "text.py", "vocabulary.txt")
    weights = ("restarts-offline.json", "restarts-offline-bayes.json")
    return digest([(resources.files("steerback.judging") / n).read_text(encoding="utf-8") for n in (*names, *weights)])


def score_attempt(lengths: Sequence[int], log_odds: Sequence[float], stay: float = STAY) -> float:
    """Return 100 x the expected share of words on topic, by forward-backward over a two-state chain of sentences.

    Sentences with little evidence ("This takes some patience.") take the score of their neighbours; with `stay` 0.5
    sentences are independent. A sentence with log-odds of minus infinity (degenerate text) is off topic and has no
    influence on its neighbours.
    """
    if not lengths:
        return 0.0
    total = sum(p * n for p, n in zip(chain(log_odds, stay), lengths, strict=True))
    return round(100.0 * total / sum(lengths), 4)


def chain(log_odds: Sequence[float], stay: float = STAY) -> list[float]:
    """Return the probability that each sentence is on topic, by forward-backward over a two-state chain.

    Sentences with log-odds of minus infinity have probability 0.
    """
    shares = [0.5 if math.isinf(x) else 1 / (1 + math.exp(-max(min(x, 20.0), -20.0))) for x in log_odds]
    forward: list[float] = []  # probability of being on topic, given the sentences up to this one
    on = 0.5
    for share in shares:
        prior = on * stay + (1 - on) * (1 - stay)
        on = prior * share / (prior * share + (1 - prior) * (1 - share))
        forward.append(on)
    backward = 0.5  # probability of being on topic, given the sentences after this one
    probabilities: list[float] = []
    for i in range(len(shares) - 1, -1, -1):
        posterior = forward[i] * backward / (forward[i] * backward + (1 - forward[i]) * (1 - backward))
        probabilities.append(0.0 if math.isinf(log_odds[i]) else posterior)
        both = shares[i] * backward / (shares[i] * backward + (1 - shares[i]) * (1 - backward))
        backward = both * stay + (1 - both) * (1 - stay)
    return probabilities[::-1]


def is_clarifying_question(response: str) -> bool:
    """Return whether a response is a clarifying question: questions to the user, with optional polite sentences."""
    cut = [response[s.start : s.end][:300] for s in sentences(response)] if len(response) < 3000 else []
    if not 1 <= len(cut) <= 5:
        return False
    asks = [bool(_ASKS.search(c)) for c in cut]
    polite = [bool(_POLITE.match(c)) and len(words(c)) <= 20 for c in cut]
    return any(asks) and all(a or p for a, p in zip(asks, polite, strict=True))
