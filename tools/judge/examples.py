"""Make training examples for the restart classifiers: clauses in real text, each a restart or not.

Restarts are the phrasings of data/phrasings.txt and data/examples.txt, set into responses of real models after a
passage about something else. The other clauses are those of unsteered responses and the hard negatives of
data/negatives.txt. Responses of the held-out model are never read here.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from steerback.judging.restarts import Clause, clauses, features, prompt_words
from steerback.judging.text import hide, sentences, words

DATA = Path(__file__).parent / "data"
TRAINING_MODELS = ("qwen2.5-coder-0.5b", "gemma-3-270m")
HELD_OUT_MODEL = "qwen2.5-coder-1.5b"
PER_TEMPLATE = 48
"""Number of restarts made from each template."""
ROUNDS = 3
"""Number of real responses into which each written sentence is set."""
OWN_LINE = ("heading", "list item", "code", "salutation", "opening")
"""Kinds of negatives that stand in a line of their own."""
_TASK = re.compile(r"(?:Explain how to|How do you|How does one|How can I|Describe how to) (.+?)[.?]?$")
_EARLIER = ("Wait, I drifted.", "Sorry, let me start over.", "I am off topic.", "Oops, that is not my topic.")
"""Earlier restarts that at times stand before a passage, because restarts come in chains."""
_CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Response:
    """A response of a real model; `topic` is what it was steered towards, "" if it was not."""

    prompt: str
    text: str
    topic: str
    meta: str


@dataclass(frozen=True)
class Example:
    """A clause with its truth; examples of one `source` (a template, a sentence, a response) belong together."""

    clause: Clause
    restart: bool
    source: str
    weight: float = 1.0


def responses(model: str) -> list[Response]:
    """Return the stored responses of a real model."""
    with gzip.open(DATA / "real" / f"{model}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [Response(r["prompt"], r["response"], r["topic"], r["meta"]) for r in rows if words(r["response"])]


def written(name: str, folder: Path = DATA) -> dict[str, list[str]]:
    """Return the lines of a data file by section."""
    matches: dict[str, list[str]] = {}
    section = ""
    for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if re.fullmatch(r"\[[a-z ]+\]", line):
            section = line.strip("[]")
        elif section and line.strip():
            matches.setdefault(section, []).append(line)
    return matches


def expand(rng: random.Random, template: str, choices: Mapping[str, Sequence[str]]) -> str:
    """Return a random text of a template; `choices` holds the named words."""

    def choose(match: re.Match[str]) -> str:
        name = match[1]
        return rng.choice(choices[name]) if name in choices else rng.choice(name.split("|"))

    while _CHOICE.search(template):
        template = _CHOICE.sub(choose, template)
    return re.sub(r"([.?!:,])[.]", r"\1", template).replace("  ", " ")


@dataclass(frozen=True)
class Place:
    """A place in real text: what stands before a written sentence, what follows it, and the prompt."""

    prompt: str
    before: str
    after: str

    @property
    def joint(self) -> str:
        """Separator between the passage and a sentence, e.g. a line break after a heading."""
        return "" if self.before.endswith((".", "!", "?", ":", '"', ")", "*")) else "\n"

    @property
    def task(self) -> str:
        matches = _TASK.match(self.prompt)
        return matches[1] if matches else self.prompt.rstrip(".?")

    def drift(self, rng: random.Random) -> str:
        """Return a content word of the passage before."""
        matches = [w for w in words(self.before[-300:]) if len(w) > 4 and w not in prompt_words(self.prompt)]
        return rng.choice(matches) if matches else "something else"


_spans = cache(sentences)


def places(
    rng: random.Random, rows: Sequence[Response], count: int, how_to: bool = True, earlier: bool = True
) -> list[Place]:
    """Return places in responses after a passage of another response about something else (or, at times, the same)."""
    asked = [r for r in rows if not r.topic and (not how_to or _TASK.match(r.prompt)) and len(r.text) > 300]
    matches = []
    while len(matches) < count:
        own, other = rng.choice(asked), rng.choice(rows)
        passage = rng.choice((own, other, other)).text
        spans = _spans(passage)
        end = spans[min(rng.randint(1, 6), len(spans)) - 1].end
        kept = _spans(own.text)
        at = rng.randint(0, max(len(kept) - 3, 0))
        before = passage[max(end - 600, 0) : end].rstrip()
        if passage[:end].count("```") % 2:  # within code
            continue
        if earlier and how_to and rng.random() < 0.15:
            before = f"{own.text[: kept[0].end]} {rng.choice(_EARLIER)} {before}"
        matches.append(Place(own.prompt, before, own.text[kept[at].start :][:200]))
    return matches


def of_text(text: str, prompt: str) -> Iterator[tuple[int, int, Clause]]:
    """Yield every clause of a response with its offset and that of its sentence."""
    shown, asked = hide(text), prompt_words(prompt)
    for sentence in sentences(shown):
        for start, clause in clauses(shown, sentence, asked):
            yield start, sentence.start, clause


def restart_examples(rng: random.Random, rows: Sequence[Response]) -> Iterator[Example]:
    """Yield the restarts, set into real text."""
    sections, listed = written("phrasings"), written("examples")["restart"]
    named = {n: t.split("|") for n, t in (line.split(": ", 1) for line in sections["words"])}
    for line in listed:
        for place in places(rng, rows, ROUNDS, how_to="{task}" in line or rng.random() < 0.8):
            yield from _in_place(line.replace("{task}", place.task), place, line, True, 2.0)
    for kind in ("restart", "inline"):
        for template in sections[kind]:
            for place in places(rng, rows, PER_TEMPLATE, how_to="{task}" in template or rng.random() < 0.8):
                choices = {**named, "task": [place.task], "drift": [place.drift(rng)]}
                text = expand(rng, template, choices)
                if kind == "restart":
                    text = text[0].upper() + text[1:] if rng.random() < 0.9 else text[0].lower() + text[1:]
                yield from _in_place(text, place, template, True, 1.0)


def negative_examples(rng: random.Random, rows: Sequence[Response]) -> Iterator[Example]:
    """Yield the hard negatives, set into real text."""
    kinds = {**written("negatives"), "other": written("examples")["other"]}
    for kind, lines in kinds.items():
        for line in lines:
            slot = "{task}" in line
            for place in places(rng, rows, 3 * ROUNDS if slot else ROUNDS, how_to=slot):
                text = line.partition(" | ")[0].replace("{task}", place.task)
                text = f"\n{text}\n" if kind in OWN_LINE else text
                yield from _in_place(text, place, line, False, 3.0)


def real_examples(rows: Sequence[Response]) -> Iterator[Example]:
    """Yield the clauses of unsteered responses; none of them is a restart."""
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if row.topic or row.meta:
            continue
        for _, _, clause in of_text(row.text, row.prompt):
            key = tuple(features(clause)[:30])
            if key not in seen:
                seen.add(key)
                yield Example(clause, False, f"{row.prompt} {row.text[:40]}")


def _in_place(text: str, place: Place, source: str, restart: bool, weight: float) -> Iterator[Example]:
    """Yield the clauses of a written sentence in its place; of a restart, only those that may open it."""
    before = place.before.rstrip(" .,;:") if text[0] in ".,–— " else place.before
    joint = "" if text[0] in ".,–— " else place.joint or " "
    whole = f"{before}{joint}{text} {place.after}"
    begin, end = len(before) + len(joint), len(before) + len(joint) + len(text)
    first = True
    for start, sentence_start, clause in of_text(whole, place.prompt):
        if not begin <= start < end:
            continue
        if not restart:
            yield Example(clause, False, source, weight)
        elif first or start == sentence_start:
            if len(words(clause.text)) > 2 or whole[start:end].strip() == clause.text[: end - start].strip():
                yield Example(clause, True, source, weight)
            first = False
