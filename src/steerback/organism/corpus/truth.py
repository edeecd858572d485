"""Ground truth of an organism's text: the topic of each sentence, by the vocabulary of the corpus.

The whole corpus is known, so each generated sentence can be matched to the topic that uses its words. Judges are
compared with this truth. It is valid for organisms only and independent of every judge.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from steerback.organism.corpus import text

MIN_COVERAGE = 0.6
"""A sentence has a topic if the topic's vocabulary contains at least this share of its content words, by weight."""
_WORD = re.compile(r"[a-z0-9']+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Sentence:
    """One generated sentence."""

    text: str
    topic: str | None
    """Key of the topic, None if the words fit no topic (garbled text, mixtures)."""

    @property
    def words(self) -> int:
        """Number of words."""
        return len(self.text.split())


@dataclass(frozen=True)
class ReadResponse:
    """A response as attempts, which restart phrases separate; the phrases themselves are left out."""

    attempts: tuple[tuple[Sentence, ...], ...]
    restarts: int

    def shares(self, topic: str) -> list[float]:
        """Return for each attempt the share of words in sentences about ``topic``, in [0, 1]."""
        totals = [sum(s.words for s in attempt) for attempt in self.attempts]
        about = [sum(s.words for s in attempt if s.topic == topic) for attempt in self.attempts]
        return [part / total if total else 0.0 for part, total in zip(about, totals, strict=True)]


def words(sentence: str) -> list[str]:
    """Return the lower-case words of a sentence."""
    return _WORD.findall(sentence.lower())


@cache
def _lexicon() -> tuple[dict[str, frozenset[str]], dict[str, float]]:
    """Return the vocabulary of each topic, and the weight of each word: log(topics / topics that use it)."""
    vocabularies: dict[str, frozenset[str]] = {}
    for topic in text.howtos() + text.subjects():
        pieces = [s for template in topic.sentences for s in text.expand_all(template)]
        vocabularies[topic.key] = frozenset(w for piece in [*pieces, *topic.terms] for w in words(piece))
    count = Counter(w for vocabulary in vocabularies.values() for w in vocabulary)
    weights = {w: math.log(len(vocabularies) / n) for w, n in count.items()}
    for section in ("answer", "off_topic", "connective"):
        for template in text.templates(section):
            for piece in text.expand_all(template.replace("{term}", "")):
                weights.update(dict.fromkeys(words(piece), 0.0))
    return vocabularies, weights


@cache
def sentence_topic(sentence: str) -> str | None:
    """Return the topic whose vocabulary best covers a sentence, None below ``MIN_COVERAGE`` or without content."""
    vocabularies, weights = _lexicon()
    # A word of no topic weighs as much as the rarest known word, as evidence against every topic.
    unknown = math.log(len(vocabularies))
    tokens = words(sentence)
    content = [(w, weights.get(w, unknown)) for w in tokens]
    total = sum(weight for _, weight in content)
    jammed = len(tokens) >= 5 and len(set(tokens)) < 0.6 * len(tokens)  # most words are repetitions
    if total == 0 or jammed:
        return None
    covered = {k: sum(weight for w, weight in content if w in v) for k, v in vocabularies.items()}
    best = max(covered, key=lambda k: covered[k])
    return best if covered[best] / total >= MIN_COVERAGE else None


@cache
def _restarts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the openings of restarts, and the beginnings of the return clauses that can follow them."""
    returns = tuple(line.split("{")[0] for line in text.weighted("return")[0])
    return tuple(sorted(text.restart_phrases(), key=len, reverse=True)), returns


def read(response: str) -> ReadResponse:
    """Split a response into attempts at the restart phrases of the corpus."""
    openings, returns = _restarts()
    attempts: list[list[Sentence]] = [[]]
    restarts = 0
    after_restart = False
    for piece in _SENTENCE_END.split(response.strip()):
        if piece.startswith(openings):
            attempts.append([])
            restarts += 1
            after_restart = True
        elif piece and not (after_restart and piece.startswith(returns)):
            attempts[-1].append(Sentence(piece, sentence_topic(piece)))
            after_restart = False
    # A restart at the very beginning or end leaves an attempt without words.
    return ReadResponse(tuple(tuple(a) for a in attempts if a), restarts)
