"""Relevance of a sentence to a prompt, by comparison of words with unsteered responses of the target.

`Relevance` (judge `offline`) compares each sentence by TF-IDF with the responses to its prompt, the responses to other
prompts, and the steering topic. Logistic regression on the references calibrates it; each reference is compared only
with references of other folds. `WordLikelihood` (judge `offline-bayes`) is naive Bayes over single words. This module
knows sentences, prompts and topics, but no attempts or restarts.
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
"""Latent and label that the response was steered towards."""
Bodies = Mapping[str, Sequence[Sequence[str]]]
"""Responses by prompt, each response as a list of sentences."""

FOLDS = 4
MAX_TRAINING = 4000
"""Number of training sentences per fold, enough for eight weights."""
FALLBACK = np.array([6.0, 4.0, 3.0, 2.0, 1.5, -4.0, 0.0, -3.6])
"""Weights of `Bank.features` and the constant, for a single prompt, where no training data exist."""
UNKNOWN_ENGLISH = 3_000
"""Number of equally likely words in the model of text about unknown subjects."""
CAP = 6.0
"""Largest log-odds of one sentence by word likelihood."""


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Remove the ending of a word: plural, -ing, -ed or -ly."""
    for ending in ("ingly", "edly", "ing", "ies", "ed", "ly", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def is_degenerate(sentence: str) -> bool:
    """Return whether a sentence has no words, few different words, or a word three times in a row."""
    tokens = words(sentence)
    few = len(tokens) >= 4 and len(set(tokens)) <= len(tokens) / 2
    return not tokens or few or any(a == b == c for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False))


def _stems(text: str) -> list[str]:
    return [stem(w) for w in words(text)]


def _pairs(stems: Sequence[str]) -> list[str]:
    return [f"{a} {b}" for a, b in pairwise(["^", *stems, "$"])]


_WORDS = HashingVectorizer(n_features=2**18, analyzer=list, norm=None, alternate_sign=False, binary=True)
_PAIRS = HashingVectorizer(n_features=2**18, analyzer=_pairs, norm=None, alternate_sign=False, binary=True)
_COUNTS = HashingVectorizer(n_features=2**15, analyzer=_stems, norm=None, alternate_sign=False)


def _sums(groups: Sequence[Sequence[str]], rows: sp.csr_matrix) -> sp.csr_matrix:
    """Return the sum of the rows of each group of texts."""
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    return sp.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), (len(groups), rows.shape[0])) @ rows


def _row_sums(matrix: sp.csr_matrix) -> Floats:
    return np.asarray(matrix.sum(axis=1)).ravel()


class Bank:
    """The reference sentences of every prompt; computes features of a sentence by comparison with them."""

    def __init__(self, bodies: Mapping[str, Sequence[str]]) -> None:
        """Build the bank from the sentences of each prompt; the prompt itself counts as one of them."""
        self.column = {p: i for i, p in enumerate(bodies)}
        groups = [[p, *reference] for p, reference in bodies.items()]
        texts = [t for group in groups for t in group]
        stemmed = [_stems(t) for t in texts]
        stems = _WORDS.transform(stemmed)
        self._seen = _sums(groups, stems).sign()
        self._seen_pairs = _sums(groups, _PAIRS.transform(stemmed)).sign()
        self._known_pairs = np.asarray(self._seen_pairs.max(axis=0).todense()).ravel()
        # A word in the responses to every prompt is uninformative; an unknown word has the largest weight.
        idf = np.log((len(groups) + 1) / (np.asarray(self._seen.sum(axis=0)).ravel() + 0.5)).clip(min=0.0)
        self._idf = sp.diags(idf, format="csr")
        self._centroids = normalize(_sums(groups, normalize(stems @ self._idf)))

    def directions(self, groups: Sequence[Sequence[str]]) -> sp.csr_matrix:
        """Return the mean direction of each group of texts as a unit row; an empty group gives zeros."""
        stemmed = [_stems(t) for g in groups for t in g]
        return normalize(_sums(groups, normalize(_WORDS.transform(stemmed or [[]]) @ self._idf)))

    def features(self, texts: Sequence[str], prompts: Sequence[str], topics: sp.csr_matrix) -> Floats:
        """Return features (n texts, 7); `topics` has the direction of each text's topic.

        Features: cosine to the prompt, margin over the other prompts, share of words seen for the prompt, share of word
        pairs seen for the prompt, share of word pairs seen for any prompt, cosine to the topic, whether the topic is
        known.
        """
        rows, column = np.arange(len(texts)), [self.column[p] for p in prompts]
        stemmed = [_stems(t) for t in texts]
        weighted, pairs = _WORDS.transform(stemmed) @ self._idf, _PAIRS.transform(stemmed)
        unit = normalize(weighted)
        others = (unit @ self._centroids.T).toarray()
        to_prompt = others[rows, column].copy()
        others[rows, column] = 0.0
        n_pairs = np.maximum(_row_sums(pairs), 1.0)
        return np.column_stack(
            [
                to_prompt,
                to_prompt - others.max(axis=1),
                _row_sums(weighted.multiply(self._seen[column])) / np.maximum(_row_sums(weighted), 1e-9),
                _row_sums(pairs.multiply(self._seen_pairs[column])) / n_pairs,
                pairs @ self._known_pairs / n_pairs,
                _row_sums(unit.multiply(topics)),
                np.diff(topics.indptr) > 0,
            ]
        )


class _Example(NamedTuple):
    """A training sentence, compared with `prompt` as if steered towards `topic` (texts)."""

    text: str
    prompt: str
    topic: tuple[str, ...]
    on_topic: bool


class Relevance:
    """Computes log-odds that sentences are on topic; built once per target from its unsteered responses."""

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
        """Yield for each fold a bank without a quarter of the prompts and responses, and examples from that quarter.

        A left-out response is on topic for its prompt, and off topic for another prompt or with shuffled words.
        Sentences of left-out prompts and contexts of latents are off topic for every prompt.
        """
        rng, prompts, contexts = random.Random(0), list(self._bodies), list(self._contexts.values())
        topics = [tuple(c) for c in contexts if c]
        for fold in range(min(FOLDS, len(prompts))):
            asked = [p for i, p in enumerate(prompts) if i % FOLDS != fold or len(prompts) == 1]
            if len(asked) < 2:
                return
            examples: list[_Example] = []
            for prompt, text in ((p, t) for p in asked for t in _part(self._bodies[p], fold, held=True)):
                other, shuffled, draw = rng.choice([p for p in asked if p != prompt]), [*words(text)], rng.random()
                rng.shuffle(shuffled)
                topic = (other,) if draw < 0.4 else () if draw < 0.6 or not topics else rng.choice(topics)
                examples += [_Example(text, prompt, topic, True), _Example(text, other, (prompt,), False)]
                if rng.random() < 0.25:
                    examples.append(_Example(" ".join(shuffled), prompt, (other,), False))
            for prompt, text in ((p, t) for p in prompts[fold::FOLDS] for t in _flat(self._bodies)[p]):
                examples.append(_Example(text, rng.choice(asked), (prompt,) if rng.random() < 0.5 else (), False))
            for group in contexts[fold::FOLDS]:
                examples += [_Example(t, rng.choice(asked), tuple(c for c in group if c != t), False) for t in group]
            bank = Bank({p: _part(self._bodies[p], fold, held=False) for p in asked})
            yield bank, rng.sample(examples, min(len(examples), MAX_TRAINING))


class WordLikelihood:
    """Computes log-odds that a sentence is from the answers to its prompt, and not to another or unknown English."""

    def __init__(self, references: References) -> None:
        bodies = _flat(_cut(references))
        texts = [(i, t) for i, (p, reference) in enumerate(bodies.items()) for t in (p, *reference)]
        self._column = {p: i for i, p in enumerate(bodies)}
        self._model = MultinomialNB(alpha=0.1, fit_prior=False)
        self._model.fit(_COUNTS.transform([t for _, t in texts]), [i for i, _ in texts])

    def knows(self, prompt: str) -> bool:
        """Return whether there are unsteered responses to this prompt."""
        return prompt in self._column

    def log_odds(self, texts: Sequence[str], prompts: Sequence[str], topics: Sequence[Topic]) -> Floats:
        """Return the log likelihood ratio of each text, limited to +-CAP; topics are ignored."""
        counts, rows, column = _COUNTS.transform(texts), np.arange(len(texts)), [self._column[p] for p in prompts]
        rivals = counts @ self._model.feature_log_prob_.T
        likelihood = rivals[rows, column].copy()
        rivals[rows, column] = -_row_sums(counts) * np.log(UNKNOWN_ENGLISH)
        return np.asarray(np.clip(likelihood - rivals.max(axis=1), -CAP, CAP))


def _cut(references: References) -> Bodies:
    """Split the responses into sentences, by prompt; responses without words are left out."""
    cut = {
        p: [[r[s.start : s.end] for s in sentences(r)] for r in responses if words(r)]
        for p, responses in references.responses.items()
    }
    return {p: responses for p, responses in cut.items() if responses}


def _flat(bodies: Bodies) -> dict[str, list[str]]:
    return {p: [t for r in responses for t in r] for p, responses in bodies.items()}


def _part(responses: Sequence[Sequence[str]], fold: int, *, held: bool) -> list[str]:
    """Return the sentences of the responses in a fold (`held`) or of all others; a single response is split itself."""
    units = responses if len(responses) > 1 else [[t] for r in responses for t in r]
    return [t for i, unit in enumerate(units) if (i % FOLDS == fold) == held for t in unit]
