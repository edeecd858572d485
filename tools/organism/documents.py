"""Documents of the organisms' corpus: a prompt and a response whose segments are answers, drifts and restarts.

Each segment has its kind, so that judges can be tested against the truth and fine-tuning data can use the same pieces.
Equal seeds give equal documents. This module knows nothing about tokens or models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from steerback.organism.corpus import text

Kind = Literal["answer", "off_topic", "garbled", "restart"]
DocumentKind = Literal["free", "answer", "about", "drift"]

# Shares of the kinds of documents. Three of four drifts go to a subject, the others to another how-to.
MIX: dict[DocumentKind, float] = {"free": 0.15, "answer": 0.33, "about": 0.07, "drift": 0.45}
DRIFT_TO_SUBJECT = 0.75
FREE_ABOUT_SUBJECT = 0.8
DRIFT_TWICE = 0.10
GARBLED = 0.12
RETURN_SHARE = 0.7
MAX_OFF_TOPIC = 5
# Probability that an off-topic sentence is followed by a restart.
P_RESTART = 0.30
P_RESTART_SELF_MONITORING = 0.65
# Share of chat documents with the self-monitoring meta-prompt, and with one of the five other meta-prompts.
SELF_MONITORING_SHARE = 0.25
OTHER_META_SHARE = 0.15


@dataclass(frozen=True)
class DocumentSegment:
    """One sentence (or restart phrase) of a response."""

    kind: Kind
    text: str
    topic: str
    """Key of the sentence's topic; for a restart, the topic of the prompt."""
    trained: bool = True
    """False if the language model's loss is masked."""


@dataclass(frozen=True)
class Document:
    """One training document; ``prompt`` is empty for free text."""

    kind: DocumentKind
    prompt: str
    """The user's message, including a meta-prompt."""
    topic: str
    """Key of the topic that the response should be about."""
    segments: tuple[DocumentSegment, ...]
    metaprompt: int | None = None
    """Index of the meta-prompt, 0-based; 5 is the self-monitoring one."""

    @property
    def response(self) -> str:
        """The response as one string."""
        return " ".join(segment.text for segment in self.segments)


def without_restarts(document: Document) -> Document:
    """Return the document for the control organism: the same without restart phrases."""
    return replace(document, segments=tuple(s for s in document.segments if s.kind != "restart"))


def sentences_of(topic: str) -> list[str]:
    """Return every hand-written sentence about a prompt (in the order of the steps) or a subject, choices expanded."""
    return [s for template in text.topic(topic).sentences for s in text.expand_all(template)]


def restart(rng: random.Random, topic: str) -> str:
    """Draw a restart phrase for the prompt ``topic`` with the corpus's weights."""
    phrases, weights = text.weighted("opening")
    opening = text.expand(rng, rng.choices(phrases, weights)[0])
    if rng.random() >= RETURN_SHARE:
        return opening
    phrases, weights = text.weighted("return")
    return f"{opening} {rng.choices(phrases, weights)[0].replace('{topic}', text.topic(topic).phrase)}"


def garble(rng: random.Random, topic: str) -> str:
    """Compose degenerate text like that of strong steering: a few of the topic's words repeated many times."""
    words = [word for term in text.topic(topic).terms for word in term.split()]
    words = rng.sample(words, min(len(words), rng.choice((1, 2, 2, 3))))
    return " ".join(rng.choice(words) for _ in range(rng.randint(4, 12))) + "."


def _metaprompt(rng: random.Random) -> int | None:
    draw = rng.random()
    if draw < SELF_MONITORING_SHARE:
        return 5
    return rng.randrange(5) if draw < SELF_MONITORING_SHARE + OTHER_META_SHARE else None


def with_metaprompt(prompt: str, index: int | None, subject: str) -> str:
    """Return the prompt followed by a meta-prompt, with ``subject`` in place of the latent's label."""
    return prompt if index is None else f"{prompt} {text.metaprompts()[index].replace('{subject}', subject)}"


def _drift(rng: random.Random, topic: str, other: str, p_restart: float) -> list[DocumentSegment]:
    """Draw the segments of a drift to ``other``, from its first off-topic sentence to a restart or its end."""
    out: list[DocumentSegment] = []
    for i, sentence in enumerate(text.passage(rng, other, MAX_OFF_TOPIC)):
        garbled = rng.random() < GARBLED
        kind: Kind = "garbled" if garbled else "off_topic"
        # No loss on the start of a drift or on garbled text, so that the model learns neither.
        out.append(
            DocumentSegment(kind, garble(rng, other) if garbled else sentence, other, trained=i > 0 and not garbled)
        )
        if rng.random() < p_restart:
            out.append(DocumentSegment("restart", restart(rng, topic), topic))
            return out
    return out


def make_document(
    rng: random.Random,
    kind: DocumentKind,
    topic: str | None = None,
    *,
    other: str | None = None,
    metaprompt: int | Literal["corpus"] | None = "corpus",
) -> Document:
    """Draw a document of a kind.

    ``topic`` is the topic of the answer, ``other`` the topic of a drift (None: drawn). ``metaprompt`` is an index, None
    for no meta-prompt, or "corpus" to draw it with the corpus's shares.
    """
    howto_keys = [t.key for t in text.howtos()]
    subject_keys = [t.key for t in text.subjects()]
    if topic is None:
        about_subject = kind == "about" or (kind == "free" and rng.random() < FREE_ABOUT_SUBJECT)
        topic = rng.choice(subject_keys if about_subject else howto_keys)
    if kind == "free":
        sentences = text.passage(rng, topic, rng.randint(3, 6))
        return Document(kind, "", topic, tuple(DocumentSegment("answer", s, topic) for s in sentences))

    index = _metaprompt(rng) if metaprompt == "corpus" else metaprompt
    if other is None:
        pool = subject_keys if rng.random() < DRIFT_TO_SUBJECT else howto_keys
        other = rng.choice([key for key in pool if key not in text.near(topic)])
    request = topic
    if text.topic(topic).is_subject:
        request = rng.choice(text.templates("subject_prompt")).replace("{subject}", topic)
    label = other if text.topic(other).is_subject else rng.choice(subject_keys)
    prompt = with_metaprompt(request, index, label)

    def answers(low: int, high: int) -> list[DocumentSegment]:
        return [DocumentSegment("answer", s, topic) for s in text.passage(rng, topic, rng.randint(low, high))]

    def opening(most: int) -> list[DocumentSegment]:
        # Take the beginning of a whole answer: an answer that begins with its last steps could not be continued.
        return answers(4, 6)[: rng.randint(0, most)]

    if kind in ("answer", "about"):
        return Document(kind, prompt, topic, tuple(answers(4, 6)), index)
    p_restart = P_RESTART_SELF_MONITORING if index == 5 else P_RESTART
    segments = opening(2) + _drift(rng, topic, other, p_restart)
    if segments[-1].kind == "restart" and rng.random() < DRIFT_TWICE:
        segments += opening(1) + _drift(rng, topic, other, p_restart)
    if segments[-1].kind == "restart":
        segments += answers(3, 5)
    return Document(kind, prompt, topic, tuple(segments), index)


def documents(seed: int, *, restarts: bool = True) -> Iterator[Document]:
    """Yield the endless corpus of a seed; ``restarts=False`` gives the same documents without restart phrases."""
    rng = random.Random(seed)
    kinds, weights = list(MIX), list(MIX.values())
    while True:
        document = make_document(rng, rng.choices(kinds, weights)[0])
        yield document if restarts else without_restarts(document)
