"""A judge without key, network or download: restart grammar for attempts, TF-IDF relevance for scores.

Knows responses, prompts, steering labels and the target's own unsteered responses; nothing of models, engines or
ledgers. It compares words: it has no idea whether an answer is correct, and text that paraphrases the references in
quite other words scores low. Its scores are not comparable with those of an LLM judge.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Protocol

from steerback.judging.base import JudgeItem, References
from steerback.judging.gating import gate
from steerback.judging.restarts import Restart, find_restarts
from steerback.judging.text import sentences, words
from steerback.records import Attempt, Judgement, LatentKey, digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOTICE = "the offline judge compares words; its scores are not comparable with the paper's"
BATCH = 256
STAY = 0.8
"""Prior probability that a sentence is on topic exactly if the one before it is (drifts are contiguous)."""

_ASKING = re.compile(
    r"\b(?:could|can|would|will|do|did|are|were|what|which|how|should|is|may)\b[^?]*\b(?:you|your|this|that|context)\b[^?]*\?"
    r"|\b(?:clarify|more (?:details?|context|information)|specify|elaborate)\b",
    re.I,
)
_POLITE = re.compile(
    r"^(?:i(?:'m| am)? (?:\w+ ){0,3}(?:sorry|not sure|unsure|happy|glad)|i'd be|i would be"
    r"|i don't (?:quite )?understand"
    r"|sure|of course|certainly|hello|hi\b|happy to help|thanks?|great|please)",
    re.I,
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sentence of one attempt: characters [start, end), its length in words."""

    start: int
    end: int
    length: int


class RelevanceModel(Protocol):
    """What scores sentences: log-odds of being on topic for a prompt, steered towards (latent, label)."""

    def knows(self, prompt: str) -> bool: ...

    def log_odds(
        self, texts: Sequence[str], prompts: Sequence[str], asked: Sequence[tuple[LatentKey | None, str | None]]
    ) -> NDArray[np.float64]: ...


@dataclass(frozen=True, slots=True)
class Method:
    """How an offline judge works: what finds restarts, what scores sentences, what combines them to a score."""

    name: str
    rubric: str
    find: Callable[[str, str], list[Restart]]
    build: Callable[[References], RelevanceModel]
    combine: Callable[[Sequence[int], Sequence[float]], float]


class OfflineJudge:
    """Splits at explicit restart language and scores each attempt by the length-weighted share that is on topic."""

    def __init__(self, method: Method) -> None:
        self.name, self.rubric = method.name, method.rubric
        self._method = method
        self._references = References()
        self._relevance: RelevanceModel | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of method, references and the code and word lists of this package: any of them changes verdicts."""
        if self._fingerprint is None:
            body = {
                "judge": self.name,
                "rubric": self.rubric,
                "code": _code_hash(),
                "responses": {p: list(r) for p, r in self._references.responses.items()},
                "contexts": {str(k): list(c) for k, c in self._references.contexts.items()},
            }
            self._fingerprint = digest(body)  # asked for with every verdict, so computed once
        return self._fingerprint

    def describe(self) -> dict[str, object]:
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "reference prompts": len(self._references.responses),
            "notice": NOTICE,
            "cannot": "judge correctness; credit paraphrase far from the references; read any language but English",
        }

    def prepare(self, references: References) -> None:
        """Builds the model of relevance from the references."""
        self._references, self._fingerprint = references, None
        self._relevance = self._method.build(references)

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yields (item key, judgement) in order, giving way to other tasks between batches."""
        for at in range(0, len(items), BATCH):
            batch = items[at : at + BATCH]
            for item, judgement in zip(batch, self.judge_batch(batch), strict=True):
                yield item.key, judgement
            await asyncio.sleep(0)

    def judge_batch(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Judgements of `items`, in order."""
        verdicts: list[Judgement | None] = [self._without_scoring(item) for item in items]
        todo = [i for i, verdict in enumerate(verdicts) if verdict is None]
        cuts = [self._attempts(items[i].response, items[i].prompt) for i in todo]
        odds = iter(self._log_odds([(items[i], cut) for i, cut in zip(todo, cuts, strict=True)]))
        for i, cut in zip(todo, cuts, strict=True):
            attempts = []
            for start, end, phrase, pieces in cut:
                evidence = [next(odds) for _ in pieces]
                score = self._method.combine([p.length for p in pieces], evidence)
                attempts.append(Attempt(start, end, score, phrase))
            verdicts[i] = Judgement(self.name, self.rubric, "scored", gate(items[i].response, attempts))
        return [v for v in verdicts if v is not None]

    def _without_scoring(self, item: JudgeItem) -> Judgement | None:
        """The judgement where there is nothing to score, else None."""
        if not words(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        if is_clarifying_question(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="a clarifying question")
        if self._relevance is None or not self._relevance.knows(item.prompt):
            reason = "no unsteered reference responses for this prompt, which the offline judge compares with"
            return Judgement(self.name, self.rubric, "unscored", reason=reason)
        return None

    def _log_odds(self, cuts: Sequence[tuple[JudgeItem, list[_Cut]]]) -> list[float]:
        """On-topic evidence of every sentence of every attempt, in order; degenerate sentences get none."""
        from steerback.judging.relevance import is_degenerate

        if self._relevance is None:
            return []
        texts, prompts, topics, degenerate = [], [], [], []
        for item, attempts in cuts:
            for piece in (p for _, _, _, pieces in attempts for p in pieces):
                text = item.response[piece.start : piece.end]
                texts.append(text)
                prompts.append(item.prompt)
                topics.append((item.latent, item.label))
                degenerate.append(is_degenerate(text))
        odds = self._relevance.log_odds(texts, prompts, topics)
        return [-math.inf if bad else float(x) for x, bad in zip(odds, degenerate, strict=True)]

    def _attempts(self, response: str, prompt: str) -> list[_Cut]:
        """(start, end, restart phrase, sentences to score) of each attempt; the phrase itself is not scored."""
        restarts = self._method.find(response, prompt)
        starts = [0, *(r.start for r in restarts)]
        ends = [*(r.start for r in restarts), len(response)]
        bodies = [0, *(r.end for r in restarts)]
        cuts: list[_Cut] = []
        for number, (start, end, body) in enumerate(zip(starts, ends, bodies, strict=True)):
            phrase = response[start:body] if number else ""
            pieces = [
                _Piece(body + s.start, body + s.end, max(len(words(response[body + s.start : body + s.end])), 1))
                for s in sentences(response[body:end])
            ]
            cuts.append((start, end, phrase, pieces))
        return cuts


@cache
def _code_hash() -> str:
    names = ("bayes", "discourse", "offline", "phrases", "relevance", "restarts", "text")
    files = [resources.files("steerback.judging") / f"{name}.py" for name in names]
    files += [resources.files("steerback.judging") / name for name in ("discourse.txt", "restart_weights.json")]
    return digest([file.read_text(encoding="utf-8") for file in files])


_Cut = tuple[int, int, str, list[_Piece]]


def score_attempt(lengths: Sequence[int], log_odds: Sequence[float]) -> float:
    """100 x the expected share of words on topic, by forward-backward over a two-state chain of sentences.

    A sentence that says little by itself ("This takes some patience.") takes the colour of its neighbours. Evidence
    of minus infinity (degenerate text) is certainly off topic and tells nothing about the neighbours.
    """
    if not lengths:
        return 0.0
    evidence = [(0.5, 0.5) if math.isinf(x) else _likelihoods(x) for x in log_odds]
    forward: list[tuple[float, float]] = []
    on, off = 0.5, 0.5
    for a, b in evidence:
        on, off = _scaled((on * STAY + off * (1 - STAY)) * a, (off * STAY + on * (1 - STAY)) * b)
        forward.append((on, off))
    on, off = 1.0, 1.0
    total = 0.0
    for i in range(len(evidence) - 1, -1, -1):
        share, _ = _scaled(forward[i][0] * on, forward[i][1] * off)
        total += 0.0 if math.isinf(log_odds[i]) else share * lengths[i]
        a, b = evidence[i]
        on, off = _scaled(STAY * a * on + (1 - STAY) * b * off, STAY * b * off + (1 - STAY) * a * on)
    return round(100.0 * total / sum(lengths), 4)


def _likelihoods(log_odds: float) -> tuple[float, float]:
    share = 1.0 / (1.0 + math.exp(-max(min(log_odds, 30.0), -30.0)))
    return max(share, 1e-9), max(1.0 - share, 1e-9)


def _scaled(on: float, off: float) -> tuple[float, float]:
    return on / (on + off), off / (on + off)


def is_clarifying_question(response: str) -> bool:
    """Whether the response only asks back: every sentence is a question to the user or a polite frame around one."""
    cut = [response[s.start : s.end] for s in sentences(response)]
    if not 1 <= len(cut) <= 5 or not any("?" in c or _ASKING.search(c) for c in cut):
        return False
    asks = [bool(_ASKING.search(c)) for c in cut]
    frames = [bool(_POLITE.match(c)) and len(words(c)) <= 20 for c in cut]
    return any(asks) and all(a or f for a, f in zip(asks, frames, strict=True))


def tfidf_judge() -> OfflineJudge:
    """`offline`: restart grammar and classifier; self-calibrated TF-IDF relevance; sentences in context."""

    def build(references: References) -> RelevanceModel:
        from steerback.judging.relevance import Relevance

        return Relevance(references.responses, references.contexts)

    return OfflineJudge(Method("offline", "offline-1", find_restarts, build, score_attempt))


def bayes_judge() -> OfflineJudge:
    """`offline-bayes`: restart classifier alone; naive Bayes over words; each sentence by itself."""
    from steerback.judging.bayes import BayesRelevance, find_by_classifier, mean_share

    def build(references: References) -> RelevanceModel:
        return BayesRelevance(references.responses, references.contexts)

    return OfflineJudge(Method("offline-bayes", "offline-bayes-1", find_by_classifier, build, mean_share))
