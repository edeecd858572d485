"""Cutting a response into sentences and clauses with character offsets, and normalising words for matching.

Knows nothing of judges, prompts or scores: it only says where things are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A sentence ends at . ! ? or an ellipsis before whitespace, at a line break, or at a colon before whitespace.
_SENTENCE_END = re.compile(r"[.!?…]+(?:[\"'”’)\]]*(?=\s|$)|(?<=[A-Za-z]{2}.)(?=[A-Z]))|:(?=\s|$)|\n\s*")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|Dr|Mr|Mrs|vs|cf|approx)|^\s*\d{1,3}|\n\s*\d{1,3})$")
_CLAUSE_END = re.compile(r"\s+[-–—]+\s*|[–—]\s*|--+\s*|\.{2,}\s*|…\s*|[,;:!?.]+(?:\s+|$)")
_QUOTED = re.compile(
    r"\"[^\"\n]{1,400}\"|“[^”\n]{1,400}”|«[^»\n]{1,400}»|(?<![\w])[‘'](?=\w)[^'‘’\n]{0,200}(?:['’]\w+[^'‘’\n]{0,200})*[’'](?!\w)"
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
_EDGE = " \t\r\n*_#>-–—•\"“'‘([{"

_CONTRACTIONS = (
    (re.compile(r"\b(can)'?t\b"), r"\1 not"),
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"\b(i)'m\b"), r"\1 am"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"'d\b"), " would"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(r"\b(that|this|it|what|where|here|there)'s\b"), r"\1 is"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int


def sentences(text: str) -> list[Span]:
    """Sentence spans without surrounding whitespace, list markers or opening quotes; they do not overlap."""
    spans: list[Span] = []
    begin = 0
    for match in _SENTENCE_END.finditer(text):
        if match.group() == "." and _ABBREVIATION.search(text, max(begin - 1, 0), match.start()):
            continue
        _append(spans, text, begin, match.end())
        begin = match.end()
    _append(spans, text, begin, len(text))
    return spans


def clause_starts(text: str, span: Span) -> list[int]:
    """Offsets at which clauses of the sentence `span` begin, the sentence's own start first."""
    starts = [span.start]
    for match in _CLAUSE_END.finditer(text, span.start, span.end):
        at = match.end()
        while at < span.end and text[at] in _EDGE:
            at += 1
        if starts[-1] < at < span.end:
            starts.append(at)
    return starts


def mask_quotes(text: str) -> str:
    """The text with everything inside quotation marks replaced by "q", same length, so that offsets stay valid.

    A quotation that is the whole text is not masked: models sometimes wrap their answer in quotation marks.
    """

    def hide(match: re.Match[str]) -> str:
        inner = match.group()
        if len(inner) >= 0.8 * len(text.strip()):
            return inner
        return inner[0] + "q" * (len(inner) - 2) + inner[-1]

    return _QUOTED.sub(hide, text)


def normalise(text: str) -> str:
    """Lower case, straight apostrophes, contractions written out, single spaces, punctuation kept."""
    plain = text.lower().replace("’", "'").replace("‘", "'")
    if "'" in plain or "cant" in plain:
        for pattern, replacement in _CONTRACTIONS:
            plain = pattern.sub(replacement, plain)
    return " ".join(plain.split())


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return _WORD.findall(text.lower().replace("’", "'"))


def _append(spans: list[Span], text: str, begin: int, end: int) -> None:
    while begin < end and text[begin] in _EDGE:
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    if any(c.isalnum() for c in text[begin:end]):
        spans.append(Span(begin, end))
