"""Judges without key, network or download: `offline` and, to compare it with, `offline-bayes`.

They split a response at explicit restarts (restarts.py) and score each attempt by the share of its words that are on
topic (relevance.py). They know responses, prompts, steering labels and the target's own unsteered responses; nothing of
models, engines or ledgers. They compare words: they cannot tell whether an answer is right.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from steerback.judging.base import JudgeItem, References
from steerback.judging.gating import gate
from steerback.judging.restarts import Restart, find_restarts
from steerback.judging.text import Span, sentences, words
from steerback.judging.windows import join
from steerback.records import Attempt, Judgement, Spend, WindowScores, digest

if TYPE_CHECKING:
    from steerback.judging.relevance import Relevance, WordLikelihood

NOTICE = "the offline judge compares words; its scores are not comparable with the paper's"
BATCH = 256
STAY = 0.8
"""Prior probability that a sentence is on topic exactly if the one before it is (drifts are contiguous)."""

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


class OfflineJudge:
    """Split at restarts, and score each attempt by the length-weighted share that is on topic."""

    def __init__(self, name: str = "offline") -> None:
        self.name, self.rubric = name, f"{name}-2"
        self._references = References()
        self._relevance: Relevance | WordLikelihood | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the judge, its references, and the code and data files that shape its verdicts."""
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
        """Return what the judge is and cannot do, for the run's manifest."""
        return {
            "judge": self.name,
            "rubric": self.rubric,
            "reference prompts": len(self._references.responses),
            "notice": NOTICE,
            "cannot": "judge correctness; credit paraphrase far from the references; read any language but English",
        }

    def prepare(self, references: References) -> None:
        """Build the model of relevance from the references."""
        from steerback.judging.relevance import Relevance, WordLikelihood  # scikit-learn takes a second to import

        self._references, self._fingerprint = references, None
        has_words = any(words(r) for found in references.responses.values() for r in found)
        model = Relevance if self.name == "offline" else WordLikelihood
        self._relevance = model(references) if has_words else None

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yield (item key, judgement) in order, giving way to other tasks between batches."""
        for at in range(0, len(items), BATCH):
            batch = items[at : at + BATCH]
            for item, judgement in zip(batch, self.judge_batch(batch), strict=True):
                yield item.key, judgement
            await asyncio.sleep(0)

    def judge_batch(self, items: Sequence[JudgeItem]) -> list[Judgement]:
        """Return the judgements of the items, in order."""
        verdicts = [self._without_score(item) for item in items]
        cuts = [[] if verdict else self._attempts(item) for item, verdict in zip(items, verdicts, strict=True)]
        pieces = [(item, text) for item, cut in zip(items, cuts, strict=True) for _, _, found in cut for text in found]
        odds = iter(self._log_odds(pieces))
        for i, (item, cut) in enumerate(zip(items, cuts, strict=True)):
            attempts = []
            for number, (restart, end, texts) in enumerate(cut):
                lengths = [max(len(words(text)), 1) for text in texts]
                score = score_attempt(lengths, [next(odds) for _ in texts], self._stay)
                phrase = item.response[restart.start : restart.end] if number else ""
                attempts.append(Attempt(restart.start, end, score, phrase))
            verdicts[i] = verdicts[i] or Judgement(self.name, self.rubric, "scored", gate(item.response, attempts))
        return [v for v in verdicts if v is not None]

    async def windows(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, WindowScores]]:
        """Yield (item key, scores of its sentences) in order; restart phrases belong to no window."""
        for at in range(0, len(items), BATCH):
            batch = items[at : at + BATCH]
            for item, scores in zip(batch, self._window_batch(batch), strict=True):
                yield item.key, scores
            await asyncio.sleep(0)

    def window_estimate(self, items: Sequence[JudgeItem]) -> Spend | None:
        """Return None: it costs nothing."""
        return None

    def _window_batch(self, items: Sequence[JudgeItem]) -> list[WindowScores]:
        missing = [self._without_score(item) for item in items]
        spans = [[] if m else self._windows(item) for item, m in zip(items, missing, strict=True)]
        pieces = [(item, item.response[s.start : s.end]) for item, own in zip(items, spans, strict=True) for s in own]
        odds = iter(self._log_odds(pieces))
        found = []
        for own, m in zip(spans, missing, strict=True):
            on_topic = chain([next(odds) for _ in own], self._stay)
            scores, reason = tuple(round(100 * p, 2) for p in on_topic), m.reason if m else ""
            nothing = "" if scores else reason or "no sentence"
            found.append(WindowScores(self.name, self.rubric, tuple(s.start for s in own), scores, nothing))
        return found

    def _windows(self, item: JudgeItem) -> list[Span]:
        """Return the sentences of a response without its restart phrases, as these say nothing about the prompt."""
        restarts = [Restart(0, 0), *find_restarts(item.response, item.prompt, self.name)]
        ends = [*(r.start for r in restarts[1:]), len(item.response)]
        return join(
            [
                Span(restart.end + s.start, restart.end + s.end)
                for restart, end in zip(restarts, ends, strict=True)
                for s in sentences(item.response[restart.end : end])
            ]
        )

    def _without_score(self, item: JudgeItem) -> Judgement | None:
        """Return the judgement where there is nothing to score, else None."""
        if not words(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="no words in the response")
        if is_clarifying_question(item.response):
            return Judgement(self.name, self.rubric, "empty", reason="a clarifying question")
        if self._relevance is None or not self._relevance.knows(item.prompt):
            reason = "no unsteered reference responses for this prompt, which the offline judge compares with"
            return Judgement(self.name, self.rubric, "unscored", reason=reason)
        return None

    def _attempts(self, item: JudgeItem) -> list[tuple[Restart, int, list[str]]]:
        """Return the restart that opens each attempt, where the attempt ends, and its sentences after the restart."""
        text = item.response
        restarts = [Restart(0, 0), *find_restarts(text, item.prompt, self.name)]
        ends = [*(r.start for r in restarts[1:]), len(text)]
        bodies = [text[r.end : end] for r, end in zip(restarts, ends, strict=True)]
        cuts = [[body[s.start : s.end] for s in sentences(body)] for body in bodies]
        return list(zip(restarts, ends, cuts, strict=True))

    def _log_odds(self, pieces: Sequence[tuple[JudgeItem, str]]) -> list[float]:
        """Return the evidence that each sentence is on topic: minus infinity for degenerate ones."""
        from steerback.judging.relevance import is_degenerate

        if self._relevance is None or not pieces:
            return []
        texts, prompts = [t for _, t in pieces], [item.prompt for item, _ in pieces]
        odds = self._relevance.log_odds(texts, prompts, [(item.latent, item.label) for item, _ in pieces])
        return [-math.inf if is_degenerate(t) else float(x) for t, x in zip(texts, odds, strict=True)]

    @property
    def _stay(self) -> float:
        return STAY if self.name == "offline" else 0.5


@cache
def _code_hash() -> str:
    """Return the hash of everything here that shapes a verdict."""
    names = ("offline.py", "relevance.py", "restarts.py", "text.py", "vocabulary.txt")
    weights = ("restarts-offline.json", "restarts-offline-bayes.json")
    return digest([(resources.files("steerback.judging") / n).read_text(encoding="utf-8") for n in (*names, *weights)])


def score_attempt(lengths: Sequence[int], log_odds: Sequence[float], stay: float = STAY) -> float:
    """Return 100 x the expected share of words on topic, by forward-backward over a two-state chain of sentences.

    Sentences that say little by themselves ("This takes some patience.") take the score of their neighbours; with
    `stay` 0.5 each sentence stands alone. Evidence of minus infinity (degenerate text) is off topic and tells nothing
    about the neighbours.
    """
    if not lengths:
        return 0.0
    total = sum(p * n for p, n in zip(chain(log_odds, stay), lengths, strict=True))
    return round(100.0 * total / sum(lengths), 4)


def chain(log_odds: Sequence[float], stay: float = STAY) -> list[float]:
    """Return the probability that each sentence is on topic, by forward-backward over a two-state chain.

    Sentences of minus infinity have probability 0, whatever their neighbours.
    """
    shares = [0.5 if math.isinf(x) else 1 / (1 + math.exp(-max(min(x, 20.0), -20.0))) for x in log_odds]
    forward: list[float] = []  # probability of being on topic, from the sentences so far
    on = 0.5
    for share in shares:
        prior = on * stay + (1 - on) * (1 - stay)
        on = prior * share / (prior * share + (1 - prior) * (1 - share))
        forward.append(on)
    backward = 0.5  # the same from the sentences after this one
    found: list[float] = []
    for i in range(len(shares) - 1, -1, -1):
        posterior = forward[i] * backward / (forward[i] * backward + (1 - forward[i]) * (1 - backward))
        found.append(0.0 if math.isinf(log_odds[i]) else posterior)
        both = shares[i] * backward / (shares[i] * backward + (1 - shares[i]) * (1 - backward))
        backward = both * stay + (1 - both) * (1 - stay)
    return found[::-1]


def is_clarifying_question(response: str) -> bool:
    """Return whether a response only asks back: questions to the user, and polite sentences around them."""
    cut = [response[s.start : s.end][:300] for s in sentences(response)] if len(response) < 3000 else []
    if not 1 <= len(cut) <= 5:
        return False
    asks = [bool(_ASKS.search(c)) for c in cut]
    polite = [bool(_POLITE.match(c)) and len(words(c)) <= 20 for c in cut]
    return any(asks) and all(a or p for a, p in zip(asks, polite, strict=True))
