"""Split a response into sentences and clauses with character offsets, and hide quotations and code.

Every function takes linear time for any text. This module knows nothing about judges or prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_STOP = re.compile(r"[.!?…]+[\"'”’)\]*_]*|:|\n")
_PAUSE = re.compile(r"[-–—.…,;:!?]+")
_LABEL = re.compile(r"\d{1,3}|[IVXivx]{1,4}|[A-Za-z]")
_ABBREVIATIONS = frozenset(["e.g", "i.e", "etc", "dr", "mr", "mrs", "ms", "vs", "cf", "approx"])
_EDGE = " \t\r\n*_#>-–—•\"“'‘([{"
_HIDDEN = re.compile(
    r"```(?s:.*?)(?:```|\Z)|`[^`\n]{1,200}`|\"[^\"\n]{1,400}\"|“[^”\n]{1,400}”|«[^»\n]{1,400}»"
    r"|(?<!\w)[‘'](?=\w)(?:[^'’\n]|['’](?=\w)){1,200}['’](?!\w)"
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int


def sentences(text: str) -> list[Span]:
    """Return the sentences in order, without surrounding whitespace, list markers or opening quotes.

    A sentence ends at . ! ? … or : before whitespace, at a full stop between a word and a capital, and at a line break.
    """
    spans: list[Span] = []
    begin = 0
    for match in _STOP.finditer(text):
        if _ends_sentence(text, begin, match):
            _append(spans, text, begin, match.end())
            begin = match.end()
    _append(spans, text, begin, len(text))
    return spans


def clause_starts(text: str, span: Span) -> list[tuple[int, str]]:
    """Return the start of each clause and the pause before it: "^" (start of the sentence), "," or "-"."""
    starts = [(span.start, "^")]
    at = span.start
    for match in _PAUSE.finditer(text, span.start, span.end):
        if match.end() <= at:
            continue
        run, before, after = match.group(), text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        spaced = after.isspace() or not after
        if run == "-" and not (before.isspace() and spaced):
            continue
        long = (run != "." and any(c in "-–—…" for c in run)) or ".." in run
        if not long and not spaced:
            continue
        at = match.end()
        while at < span.end and text[at] in _EDGE:
            at += 1
        if starts[-1][0] < at < span.end:
            starts.append((at, "-" if long else ","))
    return starts


def hide(text: str) -> str:
    """Replace quotations and code by letters q of the same length, so that offsets stay valid.

    A quotation of nearly the whole text stays, because models sometimes put their answer in quotation marks.
    """
    limit = 0.8 * len(text.strip())

    def masked(match: re.Match[str]) -> str:
        inner = match.group()
        if len(inner) >= limit and not inner.startswith("```"):
            return inner
        return inner[0] + "q" * (len(inner) - 2) + inner[-1]

    return _HIDDEN.sub(masked, text)


@lru_cache(maxsize=8192)  # a judge asks several times for the words of a sentence
def words(text: str) -> Sequence[str]:
    """Return the words and numbers in lower case."""
    return tuple(_WORD.findall(text.lower().replace("’", "'")))


def _ends_sentence(text: str, begin: int, match: re.Match[str]) -> bool:
    stop, after = match.group(), text[match.end() : match.end() + 1]
    if stop == "\n":
        return True
    before = text[max(begin, match.start() - 8) : match.start()]
    if stop == ".":
        label = text[begin : match.start()].strip(_EDGE) if match.start() - begin < 16 else ""
        if _LABEL.fullmatch(label) or (before.split(None)[-1:] and before.split()[-1].lower() in _ABBREVIATIONS):
            return False
    if not after or after.isspace():
        return True
    return stop != ":" and after.isupper() and len(before) > 1 and before[-2:].isalpha()


def _append(spans: list[Span], text: str, begin: int, end: int) -> None:
    while begin < end and text[begin] in _EDGE:
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    if any(c.isalnum() for c in text[begin:end]):
        spans.append(Span(begin, end))
