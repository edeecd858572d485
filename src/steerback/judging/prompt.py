"""What an LLM judge is told: versioned rubrics, and how untrusted responses are enclosed.

A response is enclosed by tags with a random nonce that it cannot contain, and the verdict must repeat that
nonce: text inside a response can neither close the enclosure nor pass for a verdict. Knows nothing of models or
parsing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from steerback.judging.base import JudgeItem

ATTEMPTS = "attempts-1"
WHOLE = "whole-1"
CONCRETENESS = "concreteness-1"
BOUNDARIES = "boundaries-1"
LABEL = "label-1"


@dataclass(frozen=True, slots=True)
class Rubric:
    """A versioned instruction (rubrics/VERSION.txt); any change of its text needs a new version."""

    version: str
    system: str


@cache
def rubric(version: str) -> Rubric:
    """The rubric of that version."""
    file = resources.files("steerback.judging") / "rubrics" / f"{version}.txt"
    return Rubric(version, file.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to a judge: the messages and the nonce that its verdict must repeat."""

    system: str
    user: str
    nonce: str


def ask(asked: Rubric, item: JudgeItem, draw: Callable[[], str] = lambda: secrets.token_hex(8)) -> Asked:
    """The messages for one response. Prompt and topic are the user's own and trusted; the response is enclosed."""
    context = f"<prompt>\n{encodable(item.prompt)}\n</prompt>\n\n"
    if item.label:
        context += f"<topic>\n{encodable(item.label)}\n</topic>\n\n"
    return enclose(asked, "response", encodable(item.response), context, draw)


def enclose(
    asked: Rubric, what: str, untrusted: str, context: str = "", draw: Callable[[], str] = lambda: secrets.token_hex(8)
) -> Asked:
    """The messages for untrusted text, enclosed by <what-NONCE> tags and preceded by trusted `context`."""
    nonce = fresh_nonce(untrusted + context, draw)
    user = (
        f"{context}<{what}-{nonce}>\n{untrusted}\n</{what}-{nonce}>\n\n"
        f'Reply with the JSON object for verdict "{nonce}" only.'
    )
    return Asked(asked.system, user, nonce)


def fresh_nonce(text: str, draw: Callable[[], str] = lambda: secrets.token_hex(8)) -> str:
    """A random nonce that does not occur in `text`."""
    while (nonce := draw()) in text:
        continue
    return nonce


def encodable(text: str) -> str:
    """The text with lone surrogates, which no protocol can carry, replaced one for one; all else stays as it is."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
