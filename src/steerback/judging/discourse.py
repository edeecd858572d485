"""Sentences that talk about the response itself: the part of restart language that no construction lists.

"That last sentence doesn't belong here" or "Where was I going with this?" consist mostly of function words and words
about speaking, asking and erring. A small logistic regression over word n-grams and over the same n-grams with each
word replaced by its class (discourse.txt) tells them from ordinary sentences. It is trained from restart_examples.txt
and only asked about sentences that have a speaker, a listener or a
demonstrative in them and few content words. Works on normalised text; knows nothing of positions in a response.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

from steerback.judging.text import normalise, words

THRESHOLD = 0.5
"""With C, chosen by cross-validation on the examples."""
MAX_WORDS = 22
MAX_CONTENT = 0.4
"""Largest share of words outside every class: more is a sentence about the world."""
SAMPLE_TASKS = (("tie a tie", "How do you tie a tie?"), ("boil an egg", "Explain how to boil an egg."))

_MARKER = re.compile(
    r"\b(?:i|me|my|myself|we|us|our|you|your|this|that|these|those|it|wait|oops|sorry|apolog\w+|no|nope|wrong|question|topic"
    r"|subject|off|back|again|forget|ignore|stop|enough|undo|scrap|cancel|now|something|nothing|none|nobody)\b"
)
_CONDITIONAL = re.compile(
    r"^(?:if|unless|until|whenever|when|in case|should you|as long as)\b|\b(?:if|unless|whenever) "
)
_PAUSE = re.compile(r"\s[-–—]+\s|[–—]|--|\.{2,}|…")
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[?!:.]")


@dataclass(frozen=True)
class Classifier:
    """Log-odds = (sum of the weights of a sentence's features) / sqrt(their number) + constant."""

    weights: Mapping[str, float]
    constant: float

    def probability(self, features: Sequence[str]) -> float:
        total = sum(self.weights.get(f, 0.0) for f in features) / math.sqrt(max(len(features), 1))
        return 1.0 / (1.0 + math.exp(-max(min(total + self.constant, 30.0), -30.0)))


def is_about_the_response(text: str, prompt_words: set[str]) -> bool:
    """Whether normalised `text` says that the response went wrong or goes back.

    `prompt_words` are words of the prompt; they count as what was asked, not as content.
    """
    head = _PAUSE.split(text, maxsplit=1)[0]
    if not _MARKER.search(head) or _CONDITIONAL.search(head):
        return False
    if not _is_spare(words(head), prompt_words) or not _is_spare(words(head.split(",")[0]), prompt_words):
        return False
    return classifier().probability(features(head, prompt_words)) >= THRESHOLD


def _is_spare(found: Sequence[str], prompt_words: set[str]) -> bool:
    """Whether these words are few, and few of them content."""
    content = sum(not _classes(w) and w not in prompt_words for w in found)
    return 1 <= len(found) <= MAX_WORDS and content <= MAX_CONTENT * len(found)


def features(text: str, prompt_words: set[str]) -> list[str]:
    """Distinct word 1- to 3-grams and word-class 1- to 4-grams of normalised text, sentence ends included."""
    tokens = ["P" if t in prompt_words else t for t in _TOKEN.findall(text)]
    tokens = [t for i, t in enumerate(tokens) if t != "P" or i == 0 or tokens[i - 1] != "P"]
    kinds = [t if t in _KEPT else _kind(t) for t in tokens]
    found = dict.fromkeys(_grams("w", ["^", *tokens, "$"], 3))
    found.update(dict.fromkeys(_grams("c", ["^", *kinds, "$"], 4)))
    return list(found)


@cache
def classifier() -> Classifier:
    """The classifier as shipped in restart_weights.json, which `python -m steerback.judging.discourse` rewrites."""
    stored = json.loads((resources.files("steerback.judging") / "restart_weights.json").read_text(encoding="utf-8"))
    return Classifier(stored["weights"], stored["constant"])


def train() -> Classifier:
    """Trains the classifier on restart_examples.txt; weights below a tenth of a per cent of the largest are dropped."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    examples = _sections("restart_examples.txt", str.splitlines)
    rows, truth = [], []
    for name in ("restart", "other"):
        for line in examples[name]:
            for text, prompt in _filled(line):
                found = features(normalise(text), prompt_words(prompt))
                rows.append(dict.fromkeys(found, 1.0 / math.sqrt(len(found))))
                truth.append(name == "restart")
    vectorizer = DictVectorizer()
    table = vectorizer.fit_transform(rows)
    table.indices, table.indptr = table.indices.astype("int32"), table.indptr.astype("int32")  # liblinear wants these
    model = LogisticRegression(C=30.0, solver="liblinear", class_weight="balanced", random_state=0).fit(table, truth)
    floor = 1e-3 * float(abs(model.coef_).max())
    named = zip(vectorizer.feature_names_, map(float, model.coef_[0]), strict=True)
    return Classifier({n: round(w, 4) for n, w in named if abs(w) > floor}, round(float(model.intercept_[0]), 4))


def prompt_words(prompt: str) -> set[str]:
    """The words of a prompt that carry its topic."""
    return {w for w in words(prompt) if len(w) > 3 and w not in {"explain", "describe", "what", "does", "your"}}


def _filled(line: str) -> list[tuple[str, str]]:
    """(text, prompt) of an example line, its slot filled with each sample task."""
    text, _, prompt = line.partition(" | ")
    if "{task}" in text:
        return [(text.replace("{task}", task), asked) for task, asked in SAMPLE_TASKS]
    return [(text, prompt)]


def _grams(kind: str, tokens: Sequence[str], longest: int) -> list[str]:
    return [f"{kind}:{' '.join(tokens[i : i + n])}" for n in range(1, longest + 1) for i in range(len(tokens) - n + 1)]


def _sections(name: str, split: Callable[[str], list[str]]) -> dict[str, list[str]]:
    text = (resources.files("steerback.judging") / name).read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    parts = re.split(r"^\[(\w+)\]$", text, flags=re.M)[1:]
    return {n: [w for w in split(body) if w] for n, body in zip(parts[::2], parts[1::2], strict=True)}


_CLASSES = {
    name: re.compile("|".join(re.escape(w).replace(r"\*", r"[\w'-]*") for w in found))
    for name, found in _sections("discourse.txt", str.split).items()
    if name != "kept"
}
# Words that stay themselves among the classes.
_KEPT = frozenset(_sections("discourse.txt", str.split)["kept"]) | {"P", "?", "!", ":", "."}


@lru_cache(maxsize=16384)
def _classes(word: str) -> frozenset[str]:
    """Names of the classes that hold this word."""
    return frozenset(name for name, pattern in _CLASSES.items() if pattern.fullmatch(word))


def _kind(word: str) -> str:
    return "+".join(sorted(_classes(word))) or "content"


if __name__ == "__main__":
    from pathlib import Path

    trained = train()
    body = {"constant": trained.constant, "weights": dict(trained.weights)}
    Path(__file__).with_name("restart_weights.json").write_text(json.dumps(body, indent=0) + "\n", encoding="utf-8")
