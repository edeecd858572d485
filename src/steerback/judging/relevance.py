"""How much a sentence belongs to a prompt: TF-IDF against the model's own unsteered responses, self-calibrated.

Similarities per sentence (to this prompt's responses, to the other prompts', to the steering topic, and how much
of its words and word pairs was ever seen) go into a logistic regression. Its training data are the references
themselves, always judged by a bank that does not hold them: responses to a prompt are on topic for it; responses to
other prompts (with that prompt known, or taken out as an unseen subject), the latents' top contexts and shuffled
words are off topic. No truth or fixed threshold is needed, and every target gets its own calibration.

Knows sentences, prompts and topics; nothing of attempts, restarts or scores of whole responses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression

from steerback.judging.text import sentences, words
from steerback.records import LatentKey

Floats = NDArray[np.float64]
Responses = Mapping[str, Sequence[str]]

N_FEATURES = 2**18
FOLDS = 4
MAX_TRAINING = 2000  # sentences of each kind, enough for eight weights
FALLBACK = np.array([6.0, 4.0, 3.0, 2.0, 1.5, -4.0, 0.0, -3.6])
"""Weights (as FEATURES, then the constant) where the references hold a single prompt and no contexts to learn from."""
FEATURES = (
    "cosine to prompt",
    "margin over other prompts",
    "share of words seen for prompt",
    "share of pairs seen for prompt",
    "share of pairs seen anywhere",
    "cosine to topic",
    "topic known",
)


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A crude English stem: plural, -ing, -ed and -ly endings removed."""
    for ending in ("ingly", "edly", "ing", "ies", "ed", "ly", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def _singles(text: str) -> list[str]:
    return [stem(w) for w in words(text)]


def _pairs(text: str) -> list[str]:
    singles = ["^", *_singles(text), "$"]
    return [f"{a} {b}" for a, b in pairwise(singles)]


def _count(analyzer: Callable[[str], list[str]], texts: Sequence[str]) -> Any:
    """Sparse presence (n texts, N_FEATURES) of hashed features."""
    if not texts:
        return sp.csr_matrix((0, N_FEATURES), dtype=np.float32)
    vectorizer = HashingVectorizer(
        n_features=N_FEATURES, analyzer=analyzer, norm=None, alternate_sign=False, binary=True, dtype=np.float32
    )
    return vectorizer.transform(texts)


def is_degenerate(sentence: str) -> bool:
    """Jammed text: hardly any words, few different ones, or the same word over and over."""
    found = words(sentence)
    if not found:
        return True
    if len(found) >= 4 and len(set(found)) <= len(found) / 2:
        return True
    return any(a == b == c for a, b, c in zip(found, found[1:], found[2:], strict=False))


class Bank:
    """The reference sentences of every prompt as sparse matrices, and what a sentence has in common with them."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        """`references`: sentences per prompt; the prompt itself is added to its own."""
        self.prompts = tuple(references)
        self.column = {p: i for i, p in enumerate(self.prompts)}
        texts = [t for p in self.prompts for t in (p, *references[p])]
        owner = np.repeat(np.arange(len(self.prompts)), [1 + len(references[p]) for p in self.prompts])
        ones = np.ones(len(texts), np.float32)
        group = sp.csr_matrix((ones, (owner, np.arange(len(texts)))), shape=(len(self.prompts), len(texts)))
        singles, pairs = _count(_singles, texts), _count(_pairs, texts)
        self._words = _presence(group @ singles)  # (prompts, features)
        self._word_pairs = _presence(group @ pairs)
        self._known_pairs = np.asarray(self._word_pairs.sum(axis=0)).ravel() > 0
        spread = np.asarray(self._words.sum(axis=0)).ravel()
        # A word in every prompt's responses says nothing, one that was never seen says most.
        self._idf = np.log((len(self.prompts) + 1) / (spread + 0.5)).clip(min=0.0)
        self._centroids = _normalised(group @ self._unit(singles))

    def directions(self, groups: Sequence[Sequence[str]]) -> Any:
        """Sparse unit rows (n groups, N_FEATURES), each in the middle of a group of texts; zero for an empty group."""
        texts = [t for group in groups for t in group]
        owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        ones = np.ones(len(texts), np.float32)
        group = sp.csr_matrix((ones, (owner, np.arange(len(texts)))), shape=(len(groups), len(texts)))
        return _normalised(group @ self._unit(_count(_singles, texts)))

    def features(self, texts: Sequence[str], prompts: Sequence[str], topics: Any) -> Floats:
        """(n texts, 7), see FEATURES; `topics` has one row of `directions` for each text."""
        rows, own = np.arange(len(texts)), np.array([self.column[p] for p in prompts], dtype=np.intp)
        singles, pairs = _count(_singles, texts), _count(_pairs, texts)
        unit = self._unit(singles)
        to_all = (unit @ self._centroids.T).toarray()
        to_own = to_all[rows, own].copy()
        to_all[rows, own] = 0.0
        mass = self._weighted(singles)
        n_pairs = np.maximum(_row_sums(pairs), 1.0)
        return np.column_stack(
            [
                to_own,
                to_own - to_all.max(axis=1, initial=0.0),
                _row_sums(mass.multiply(self._words[own])) / np.maximum(_row_sums(mass), 1e-9),
                _row_sums(pairs.multiply(self._word_pairs[own])) / n_pairs,
                pairs @ self._known_pairs / n_pairs,
                _row_sums(unit.multiply(topics)),
                np.diff(topics.indptr) > 0,
            ]
        )

    def _weighted(self, counts: Any) -> Any:
        return sp.csr_matrix((counts.data * self._idf[counts.indices], counts.indices, counts.indptr), counts.shape)

    def _unit(self, counts: Any) -> Any:
        return _normalised(self._weighted(counts))


@dataclass(frozen=True)
class _Example:
    """A training sentence: judged for `prompt` while steered towards `topic` (texts)."""

    text: str
    prompt: str
    topic: tuple[str, ...]
    on_topic: bool


class Relevance:
    """Log-odds that sentences are on topic for a prompt; built once per target from its unsteered responses."""

    def __init__(self, responses: Responses, contexts: Mapping[LatentKey, Sequence[str]]) -> None:
        self._contexts = contexts
        self._cut = {p: [_cut(r) for r in responses[p] if words(r)] for p in responses}
        self._cut = {p: found for p, found in self._cut.items() if found}
        self.bank = Bank(_flat(self._cut))
        self.weights = self._learn()

    def knows(self, prompt: str) -> bool:
        """Whether there are unsteered responses to this prompt."""
        return prompt in self.bank.column

    def topics(self, asked: Sequence[tuple[LatentKey | None, str | None]]) -> Any:
        """Sparse rows of steering topics (latent, label): the label and the latent's top contexts, as known."""
        index = {key: i for i, key in enumerate(dict.fromkeys(asked))}
        contexts = [() if latent is None else tuple(self._contexts.get(latent, ())) for latent, _ in index]
        groups = [c + ((label,) if label else ()) for c, (_, label) in zip(contexts, index, strict=True)]
        return self.bank.directions(groups)[[index[key] for key in asked]]

    def log_odds(
        self, texts: Sequence[str], prompts: Sequence[str], asked: Sequence[tuple[LatentKey | None, str | None]]
    ) -> Floats:
        """Log likelihood ratio on : off topic of each text for its prompt, steered towards (latent, label)."""
        features = self.bank.features(texts, prompts, self.topics(asked))
        return np.asarray(features @ self.weights[:-1] + self.weights[-1])

    def _learn(self) -> Floats:
        """Weights of the features and the constant, at even prior odds."""
        features, truth = [], []
        for bank, examples in self._training():
            index = {topic: i for i, topic in enumerate({e.topic for e in examples})}
            topics = bank.directions(list(index))[[index[e.topic] for e in examples]]
            features.append(bank.features([e.text for e in examples], [e.prompt for e in examples], topics))
            truth += [e.on_topic for e in examples]
        if len(set(truth)) < 2:
            return FALLBACK
        model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=500)
        model.fit(np.concatenate(features), truth)
        return np.concatenate([model.coef_[0], model.intercept_])

    def _training(self) -> Iterator[tuple[Bank, list[_Example]]]:
        """Banks, each with examples that it does not hold."""
        rng = random.Random(0)
        prompts = list(self._cut)
        if len(prompts) < 2:
            return
        for fold in range(FOLDS):
            kept, held = _split_responses(self._cut, fold)
            examples = [e for p in prompts for text in held[p] for e in self._known(rng, p, text, prompts)]
            if examples:
                yield Bank(kept), _sample(rng, examples)
        for fold in range(min(FOLDS, len(prompts))):
            away = prompts[fold::FOLDS]
            rest = {p: self._cut[p] for p in prompts if p not in away}
            if rest:
                texts = [(p, t) for p in away for r in self._cut[p] for t in r]
                examples = [
                    _Example(t, rng.choice(list(rest)), (p,) if rng.random() < 0.5 else (), False) for p, t in texts
                ]
                examples += [
                    _Example(text, rng.choice(list(rest)), tuple(c for c in found if c != text), False)
                    for found in list(self._contexts.values())[fold::FOLDS]
                    for text in found
                ]
                yield Bank(_flat(rest)), _sample(rng, examples)

    def _known(self, rng: random.Random, prompt: str, text: str, prompts: list[str]) -> list[_Example]:
        """A sentence in its place, in the place of another prompt's answer, and with its words shuffled."""
        other = rng.choice([p for p in prompts if p != prompt])
        shuffled = words(text)
        rng.shuffle(shuffled)
        found = [
            _Example(text, prompt, self._some_topic(rng, other), True),
            _Example(text, other, (prompt,), False),
        ]
        return [*found, _Example(" ".join(shuffled), prompt, (other,), False)] if rng.random() < 0.25 else found

    def _some_topic(self, rng: random.Random, other: str) -> tuple[str, ...]:
        """What an on-topic sentence is steered towards: a latent's contexts where there are any, else a prompt."""
        known = [tuple(c) for c in self._contexts.values() if c]
        draw = rng.random()
        return (other,) if draw < 0.4 else () if draw < 0.6 or not known else rng.choice(known)


def _cut(text: str) -> list[str]:
    return [text[s.start : s.end] for s in sentences(text)]


def _flat(cut: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, list[str]]:
    return {p: [t for r in responses for t in r] for p, responses in cut.items()}


def _split_responses(
    cut: Mapping[str, Sequence[Sequence[str]]], fold: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(kept, held out) sentences per prompt; whole responses are held out where a prompt has several."""
    kept: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for prompt, responses in cut.items():
        units = responses if len(responses) > 1 else [[t] for r in responses for t in r]
        held[prompt] = [t for i, unit in enumerate(units) if i % FOLDS == fold for t in unit]
        kept[prompt] = [t for i, unit in enumerate(units) if i % FOLDS != fold for t in unit]
    return kept, held


def _sample(rng: random.Random, examples: list[_Example]) -> list[_Example]:
    return examples if len(examples) <= MAX_TRAINING else rng.sample(examples, MAX_TRAINING)


def _presence(counts: Any) -> Any:
    return (counts > 0).astype(np.float32).tocsr()


def _row_sums(matrix: Any) -> Floats:
    return np.asarray(matrix.sum(axis=1)).ravel()


def _normalised(matrix: Any) -> Any:
    """Rows scaled to length 1; zero rows stay zero."""
    rows = sp.csr_matrix(matrix)
    lengths = np.sqrt(_row_sums(rows.multiply(rows)))
    return sp.diags(1.0 / np.where(lengths > 0, lengths, 1.0), format="csr") @ rows
