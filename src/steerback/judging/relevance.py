"""How much a sentence belongs to a prompt, by comparing words with the model's own unsteered responses.

`Relevance` (judge `offline`) compares each sentence by TF-IDF with the responses to this prompt, to the other prompts
and with the steering topic, and calibrates itself by logistic regression on the references, always compared with
references that do not hold them. `WordLikelihood` (judge `offline-bayes`) is naive Bayes over single words.
Both know sentences, prompts and topics; nothing of attempts or restarts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.preprocessing import normalize

from steerback.judging.base import References
from steerback.judging.text import sentences, words
from steerback.records import LatentKey

Floats = NDArray[np.float64]
Topic = tuple[LatentKey | None, str | None]
"""Latent and label that a response was steered towards."""
Bodies = Mapping[str, Sequence[Sequence[str]]]
"""Groups of sentences (responses) of each prompt."""

FOLDS = 4
MAX_TRAINING = 4000
"""Number of training sentences of a fold: enough for eight weights."""
FALLBACK = np.array([6.0, 4.0, 3.0, 2.0, 1.5, -4.0, 0.0, -3.6])
"""Weights of `Bank.features`, then the constant, where there is one prompt only and nothing to learn from."""
UNKNOWN_ENGLISH = 3_000
"""Number of equally likely words that text about something unknown is drawn from."""
CAP = 6.0
"""Largest log-odds of one sentence by word likelihood."""


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Return a word without its ending: plural, -ing, -ed or -ly."""
    for ending in ("ingly", "edly", "ing", "ies", "ed", "ly", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def is_degenerate(sentence: str) -> bool:
    """Return whether a sentence has no words, few different ones, or one word three times in a row."""
    found = words(sentence)
    few = len(found) >= 4 and len(set(found)) <= len(found) / 2
    return not found or few or any(a == b == c for a, b, c in zip(found, found[1:], found[2:], strict=False))


def _stems(text: str) -> list[str]:
    return [stem(w) for w in words(text)]


def _pairs(text: str) -> list[str]:
    return [f"{a} {b}" for a, b in pairwise(["^", *_stems(text), "$"])]


_WORDS = HashingVectorizer(n_features=2**18, analyzer=_stems, norm=None, alternate_sign=False, binary=True)
_PAIRS = HashingVectorizer(n_features=2**18, analyzer=_pairs, norm=None, alternate_sign=False, binary=True)
_COUNTS = HashingVectorizer(n_features=2**15, analyzer=_stems, norm=None, alternate_sign=False)


def _sums(groups: Sequence[Sequence[str]], rows: sp.csr_matrix) -> sp.csr_matrix:
    """Return the sum of the rows of each group of texts."""
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    return sp.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), (len(groups), rows.shape[0])) @ rows


def _row_sums(matrix: sp.csr_matrix) -> Floats:
    return np.asarray(matrix.sum(axis=1)).ravel()


class Bank:
    """The reference sentences of every prompt, and how much a sentence has in common with them."""

    def __init__(self, bodies: Mapping[str, Sequence[str]]) -> None:
        """Build from the sentences of each prompt; the prompt itself is added to them."""
        self.column = {p: i for i, p in enumerate(bodies)}
        groups = [[p, *found] for p, found in bodies.items()]
        texts = [t for group in groups for t in group]
        stems = _WORDS.transform(texts)
        self._seen = _sums(groups, stems).sign()
        self._seen_pairs = _sums(groups, _PAIRS.transform(texts)).sign()
        self._known_pairs = np.asarray(self._seen_pairs.max(axis=0).todense()).ravel()
        # A word in every prompt's responses says nothing, one that was never seen says most.
        idf = np.log((len(groups) + 1) / (np.asarray(self._seen.sum(axis=0)).ravel() + 0.5)).clip(min=0.0)
        self._idf = sp.diags(idf, format="csr")
        self._centroids = normalize(_sums(groups, normalize(stems @ self._idf)))

    def directions(self, groups: Sequence[Sequence[str]]) -> sp.csr_matrix:
        """Return the mean direction of each group of texts as unit rows; zero for an empty group."""
        return normalize(_sums(groups, normalize(_WORDS.transform([t for g in groups for t in g] or [""]) @ self._idf)))

    def features(self, texts: Sequence[str], prompts: Sequence[str], topics: sp.csr_matrix) -> Floats:
        """Return (n texts, 7) features; `topics` has the direction of each text's topic.

        Cosine to the prompt, margin over the other prompts, share of words seen for the prompt, shares of word pairs
        seen for the prompt and anywhere, cosine to the topic, whether the topic is known.
        """
        rows, own = np.arange(len(texts)), [self.column[p] for p in prompts]
        weighted, pairs = _WORDS.transform(texts) @ self._idf, _PAIRS.transform(texts)
        unit = normalize(weighted)
        others = (unit @ self._centroids.T).toarray()
        to_own = others[rows, own].copy()
        others[rows, own] = 0.0
        n_pairs = np.maximum(_row_sums(pairs), 1.0)
        return np.column_stack(
            [
                to_own,
                to_own - others.max(axis=1),
                _row_sums(weighted.multiply(self._seen[own])) / np.maximum(_row_sums(weighted), 1e-9),
                _row_sums(pairs.multiply(self._seen_pairs[own])) / n_pairs,
                pairs @ self._known_pairs / n_pairs,
                _row_sums(unit.multiply(topics)),
                np.diff(topics.indptr) > 0,
            ]
        )


class _Example(NamedTuple):
    """A training sentence: compared with `prompt` while steered towards `topic` (texts)."""

    text: str
    prompt: str
    topic: tuple[str, ...]
    on_topic: bool


class Relevance:
    """Log-odds that sentences are on topic for a prompt; built once for each target from its unsteered responses."""

    def __init__(self, references: References) -> None:
        self._contexts = references.contexts
        self._bodies = _cut(references)
        self._bank = Bank(_flat(self._bodies))
        self._weights = self._learn()

    def knows(self, prompt: str) -> bool:
        """Return whether there are unsteered responses to this prompt."""
        return prompt in self._bank.column

    def log_odds(self, texts: Sequence[str], prompts: Sequence[str], topics: Sequence[Topic]) -> Floats:
        """Return the log likelihood ratio on : off topic of each text for its prompt, steered towards its topic."""
        index = {topic: i for i, topic in enumerate(dict.fromkeys(topics))}
        groups = [[*self._contexts.get(latent, ()), *([label] if label else [])] if latent else [label] if label else []
                  for latent, label in index]  # fmt: skip
        features = self._bank.features(texts, prompts, self._bank.directions(groups)[[index[t] for t in topics]])
        return np.asarray(features @ self._weights[:-1] + self._weights[-1])

    def _learn(self) -> Floats:
        features, truth = [], []
        for bank, examples in self._training():
            index = {topic: i for i, topic in enumerate(dict.fromkeys(e.topic for e in examples))}
            topics = bank.directions(list(index))[[index[e.topic] for e in examples]]
            features.append(bank.features([e.text for e in examples], [e.prompt for e in examples], topics))
            truth += [e.on_topic for e in examples]
        if len(set(truth)) < 2:
            return FALLBACK
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=500)
        model.fit(np.concatenate(features), truth)
        return np.concatenate([model.coef_[0], model.intercept_])

    def _training(self) -> Iterator[tuple[Bank, list[_Example]]]:
        """Yield banks that lack a quarter of the prompts and of each prompt's responses, with examples from those.

        Left-out responses are on topic in their place and off topic in another prompt's, or with their words shuffled.
        Sentences of left-out prompts and the latents' contexts are off topic everywhere.
        """
        rng, prompts, contexts = random.Random(0), list(self._bodies), list(self._contexts.values())
        topics = [tuple(c) for c in contexts if c]
        for fold in range(min(FOLDS, len(prompts))):
            asked = [p for i, p in enumerate(prompts) if i % FOLDS != fold or len(prompts) == 1]
            if len(asked) < 2:
                return
            found: list[_Example] = []
            for prompt, text in ((p, t) for p in asked for t in _part(self._bodies[p], fold, held=True)):
                other, shuffled, draw = rng.choice([p for p in asked if p != prompt]), words(text), rng.random()
                rng.shuffle(shuffled)
                topic = (other,) if draw < 0.4 else () if draw < 0.6 or not topics else rng.choice(topics)
                found += [_Example(text, prompt, topic, True), _Example(text, other, (prompt,), False)]
                if rng.random() < 0.25:
                    found.append(_Example(" ".join(shuffled), prompt, (other,), False))
            for prompt, text in ((p, t) for p in prompts[fold::FOLDS] for t in _flat(self._bodies)[p]):
                found.append(_Example(text, rng.choice(asked), (prompt,) if rng.random() < 0.5 else (), False))
            for group in contexts[fold::FOLDS]:
                found += [_Example(t, rng.choice(asked), tuple(c for c in group if c != t), False) for t in group]
            bank = Bank({p: _part(self._bodies[p], fold, held=False) for p in asked})
            yield bank, rng.sample(found, min(len(found), MAX_TRAINING))


class WordLikelihood:
    """Log-odds that a sentence was drawn from this prompt's answers rather than another's or from unknown English."""

    def __init__(self, references: References) -> None:
        bodies = _flat(_cut(references))
        texts = [(i, t) for i, (p, found) in enumerate(bodies.items()) for t in (p, *found)]
        self._column = {p: i for i, p in enumerate(bodies)}
        self._model = MultinomialNB(alpha=0.1, fit_prior=False)
        self._model.fit(_COUNTS.transform([t for _, t in texts]), [i for i, _ in texts])

    def knows(self, prompt: str) -> bool:
        """Return whether there are unsteered responses to this prompt."""
        return prompt in self._column

    def log_odds(self, texts: Sequence[str], prompts: Sequence[str], topics: Sequence[Topic]) -> Floats:
        """Return the log likelihood ratio of each text, within +-CAP; topics are not used."""
        counts, rows, own = _COUNTS.transform(texts), np.arange(len(texts)), [self._column[p] for p in prompts]
        rivals = counts @ self._model.feature_log_prob_.T
        mine = rivals[rows, own].copy()
        rivals[rows, own] = -_row_sums(counts) * np.log(UNKNOWN_ENGLISH)
        return np.asarray(np.clip(mine - rivals.max(axis=1), -CAP, CAP))


def _cut(references: References) -> Bodies:
    """Return the sentences of each response that has any words, by prompt."""
    cut = {
        p: [[r[s.start : s.end] for s in sentences(r)] for r in found if words(r)]
        for p, found in references.responses.items()
    }
    return {p: found for p, found in cut.items() if found}


def _flat(bodies: Bodies) -> dict[str, list[str]]:
    return {p: [t for r in responses for t in r] for p, responses in bodies.items()}


def _part(responses: Sequence[Sequence[str]], fold: int, *, held: bool) -> list[str]:
    """Return the sentences of the responses in a fold, or of the others; a single response is split by sentences."""
    units = responses if len(responses) > 1 else [[t] for r in responses for t in r]
    return [t for i, unit in enumerate(units) if (i % FOLDS == fold) == held for t in unit]
