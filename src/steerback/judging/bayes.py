"""The parts of the second offline judge, `offline-bayes`, which differs in kind from the first.

Restarts are found by the discourse classifier alone, without the grammar; relevance is a naive Bayes likelihood of
single words (this prompt's answers against the other prompts', the steering topic's and unknown English), without
similarities, word pairs, calibration or neighbours. It is there to disagree: two judges that err in different ways
say more together than either alone. Knows sentences, prompts and topics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from steerback.judging.discourse import is_about_the_response, prompt_words
from steerback.judging.relevance import stem
from steerback.judging.restarts import MIN_AFTER, MIN_BEFORE, Restart
from steerback.judging.text import mask_quotes, normalise, sentences, words
from steerback.records import LatentKey

SMOOTHING = 0.1
VOCABULARY = 30_000
"""Words of English that text about something unknown is drawn from, uniformly."""
CAP = 6.0
"""Largest log-odds of one sentence, so that a long one is not more certain than the method is."""


def find_by_classifier(text: str, prompt: str = "") -> list[Restart]:
    """Sentences that the discourse classifier takes for talk about the response; neighbours are one restart."""
    masked, asked = mask_quotes(text), prompt_words(prompt)
    found: list[Restart] = []
    previous = -1
    for number, span in enumerate(sentences(masked)):
        if not is_about_the_response(normalise(masked[span.start : span.end]), asked):
            continue
        if found and previous == number - 1:
            found[-1] = Restart(found[-1].start, span.end)
        else:
            found.append(Restart(span.start, span.end))
        previous = number
    return [r for r in found if len(words(text[: r.start])) >= MIN_BEFORE and len(words(text[r.end :])) >= MIN_AFTER]


class BayesRelevance:
    """Log-odds that a sentence was drawn from this prompt's answers rather than from anything else."""

    def __init__(self, responses: Mapping[str, Sequence[str]], contexts: Mapping[LatentKey, Sequence[str]]) -> None:
        self._contexts = contexts
        self._models = {p: _Words([p, *found]) for p, found in responses.items() if any(words(r) for r in found)}
        self._topics: dict[tuple[LatentKey | None, str | None], _Words | None] = {}

    def knows(self, prompt: str) -> bool:
        """Whether there are unsteered responses to this prompt."""
        return prompt in self._models

    def log_odds(
        self, texts: Sequence[str], prompts: Sequence[str], asked: Sequence[tuple[LatentKey | None, str | None]]
    ) -> NDArray[np.float64]:
        """Log likelihood ratio of each text, this prompt against the likeliest alternative, within +-CAP."""
        return np.array([self._one(*given) for given in zip(texts, prompts, asked, strict=True)])

    def _one(self, text: str, prompt: str, topic: tuple[LatentKey | None, str | None]) -> float:
        stems = [stem(w) for w in words(text)]
        rivals = [model.log_likelihood(stems) for p, model in self._models.items() if p != prompt]
        steered = self._topic(topic)
        if steered is not None:
            rivals.append(steered.log_likelihood(stems))
        rivals.append(-len(stems) * math.log(VOCABULARY / 10))  # unknown English, function words counted in
        return max(-CAP, min(CAP, self._models[prompt].log_likelihood(stems) - max(rivals)))

    def _topic(self, topic: tuple[LatentKey | None, str | None]) -> _Words | None:
        if topic not in self._topics:
            latent, label = topic
            texts = list(self._contexts.get(latent, ()) if latent is not None else ()) + ([label] if label else [])
            self._topics[topic] = _Words(texts) if texts else None
        return self._topics[topic]


class _Words:
    """A smoothed unigram model of stems."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = Counter(stem(w) for text in texts for w in words(text))
        total = sum(counts.values()) + SMOOTHING * VOCABULARY
        self._known = {w: math.log((n + SMOOTHING) / total) for w, n in counts.items()}
        self._other = math.log(SMOOTHING / total)

    def log_likelihood(self, stems: Sequence[str]) -> float:
        return sum(self._known.get(s, self._other) for s in stems)


def mean_share(lengths: Sequence[int], log_odds: Sequence[float]) -> float:
    """100 x the length-weighted mean probability of being on topic, each sentence by itself."""
    if not lengths:
        return 0.0
    shares = [0.0 if math.isinf(x) else 1.0 / (1.0 + math.exp(-x)) for x in log_odds]
    return round(100.0 * sum(s * n for s, n in zip(shares, lengths, strict=True)) / sum(lengths), 4)
