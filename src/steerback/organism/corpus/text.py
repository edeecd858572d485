"""Read the corpus's text files, expand their ``{a|b}`` choices and draw passages about a topic.

All sentences were written for this project. This module knows the file format, but no tokens or models;
`tools/organism/documents.py` composes documents.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from steerback.readers import content_lines

HERE = Path(__file__).parent
_CHOICE = re.compile(r"\{([^{}]*\|[^{}]*)\}")
TEMPLATE_SHARE = 0.15
CONNECTIVE_SHARE = 0.15


@dataclass(frozen=True)
class Topic:
    """A topic of the corpus: a how-to prompt or an off-topic subject."""

    key: str
    """The prompt of a how-to, or the name of a subject."""
    phrase: str
    """Name of the topic within a sentence, e.g. "folding a fitted sheet"."""
    terms: tuple[str, ...]
    """Nouns that fill the ``{term}`` slot of a template."""
    sentences: tuple[str, ...]
    """Sentences with unexpanded choices; for a how-to in the order of the steps."""
    is_subject: bool


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without comments and blank lines."""
    return content_lines(path.read_text(encoding="utf-8"))


def read_sections(path: Path) -> dict[str, list[str]]:
    """Return the lines of each ``[name]`` section of a file."""
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in read_lines(path):
        if line.startswith("[") and line.endswith("]"):
            lines = sections.setdefault(line[1:-1], [])
        else:
            lines.append(line)
    return sections


def read_topics(path: Path) -> tuple[Topic, ...]:
    """Return the topics of a file; its first line explains the format."""
    topics: list[Topic] = []
    head: dict[str, str] = {}
    sentences: list[str] = []

    def close() -> None:
        if head:
            terms = tuple(term.strip() for term in head["~"].split(","))
            is_subject = "@" in head
            key = head["@"] if is_subject else head["?"]
            topics.append(Topic(key, head.get("=", key), terms, tuple(sentences), is_subject))
        head.clear()
        sentences.clear()

    for line in read_lines(path):
        if line[0] in "?@":
            close()
        if line[0] in "?@=~":
            head[line[0]] = line[1:].strip()
        else:
            sentences.append(line)
    close()
    return tuple(topics)


def expand(rng: random.Random, template: str) -> str:
    """Draw a sentence from a template: every ``{a|b}`` is replaced by one of its choices."""
    return _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)


def expand_all(template: str) -> list[str]:
    """Return every sentence of a template."""
    parts = _CHOICE.split(template)
    # re.split with one group alternates between literal text and the content of a choice.
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


@cache
def subjects() -> tuple[Topic, ...]:
    """Return the off-topic subjects."""
    return read_topics(HERE / "subjects.txt")


@cache
def howtos(group: str = "all") -> tuple[Topic, ...]:
    """Return the how-to topics of a group: ``evaluation``, ``discovery``, ``heldout`` or ``all``."""
    if group == "all":
        return howtos("evaluation") + howtos("discovery") + howtos("heldout")
    return read_topics(HERE / f"howto_{group}.txt")


@cache
def templates(section: str) -> tuple[str, ...]:
    """Return the lines of a section of ``templates.txt``."""
    return tuple(read_sections(HERE / "templates.txt")[section])


@cache
def metaprompts() -> tuple[str, ...]:
    """Return the six meta-prompts; the last is the self-monitoring one."""
    return tuple(read_lines(HERE / "metaprompts.txt"))


@cache
def weighted(section: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return lines and weights of a section (``opening`` or ``return``) of ``restarts.txt``."""
    rows = [line.split("|", 1) for line in read_sections(HERE / "restarts.txt")[section]]
    return tuple(text.strip() for _, text in rows), tuple(float(weight) for weight, _ in rows)


@cache
def topic(key: str) -> Topic:
    """Return the topic of a prompt or of a subject's name. Raises KeyError if the corpus has none."""
    for candidate in howtos() + subjects():
        if candidate.key == key:
            return candidate
    raise KeyError(f"no topic {key!r} in the corpus")


def restart_phrases(prompt: str | None = None) -> list[str]:
    """Return every restart opening; with a ``prompt``, also every opening followed by a return clause."""
    openings = [s for template in weighted("opening")[0] for s in expand_all(template)]
    if prompt is None:
        return openings
    phrase = topic(prompt).phrase
    returns = [s.replace("{topic}", phrase) for s in weighted("return")[0]]
    return openings + [f"{opening} {back}" for opening in openings for back in returns]


def passage(rng: random.Random, key: str, n: int) -> list[str]:
    """Draw ``n`` sentences about a topic: steps in order for a how-to, any order for a subject."""
    source = topic(key)
    n = min(n, len(source.sentences))
    if source.is_subject:
        chosen = rng.sample(source.sentences, n)
        section = "off_topic"
    else:
        chosen = [source.sentences[i] for i in sorted(rng.sample(range(len(source.sentences)), n))]
        section = "answer"
    out: list[str] = []
    for template in chosen:
        if rng.random() < TEMPLATE_SHARE:
            template = rng.choice(templates(section)).replace("{term}", rng.choice(source.terms))
        sentence = expand(rng, template)
        if not source.is_subject and rng.random() < CONNECTIVE_SHARE:
            sentence = _connect(rng, sentence)
        out.append(sentence)
    return out


def _connect(rng: random.Random, sentence: str) -> str:
    """Put a connective such as "Next," before a sentence; sentences that begin with a name or letter are unchanged."""
    first = sentence.split()[0]
    if (len(first) == 1 and first != "A") or first.startswith("Newton") or first in {"Pythagoras", "Calvin"}:
        return sentence
    return f"{rng.choice(templates('connective'))} {sentence[0].lower()}{sentence[1:]}"


MAX_OVERLAP = 0.08
"""Topics whose vocabularies overlap by more than this Jaccard index of long words are near each other."""


@cache
def _vocabulary(key: str) -> frozenset[str]:
    """Return the lower-case words of at least four letters in a topic's sentences and terms."""
    source = topic(key)
    pieces = [s for template in source.sentences for s in expand_all(template)] + list(source.terms)
    return frozenset(w for piece in pieces for w in re.findall(r"[a-z]{4,}", piece.lower()))


@cache
def near(key: str) -> frozenset[str]:
    """Return the keys of the topics near ``key``, including itself: a drift to one of them would be unnoticeable."""
    vocabulary = _vocabulary(key)

    def overlap(other: str) -> float:
        words = _vocabulary(other)
        return len(vocabulary & words) / len(vocabulary | words)

    return frozenset(t.key for t in howtos() + subjects() if overlap(t.key) > MAX_OVERLAP)
