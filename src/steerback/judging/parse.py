"""From a judge's reply to a judgement: exactly one of scored, empty, or unscored with its reason.

Spans are found through the quoted words, tolerant of whitespace, quotes, dashes and case; whatever cannot be found in
the response is never scored. Knows replies and responses; nothing of transport. No input makes it raise.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from steerback.judging.gating import gate
from steerback.records import Attempt, Judgement

MAX_ATTEMPTS = 50
_SAME = {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "-", "—": "-", "−": "-"}
_IGNORED = "\"'*_"


class _Rejected(Exception):
    """The reply is no usable verdict; the message is the reason."""


@dataclass(frozen=True, slots=True)
class WholeScore:
    """Verdict of the whole-response rubric: 0-10, or None with the reason."""

    score: float | None
    on_topic_from_start: bool = False
    reason: str = ""
    raw: str = ""


def parse_attempts(reply: str, response: str, nonce: str, judge: str, rubric: str) -> Judgement:
    """The judgement that a reply to the attempts rubric amounts to."""
    try:
        verdict = find_verdict(reply, nonce)
        attempts = _attempts(verdict, response)
    except _Rejected as rejected:
        return Judgement(judge, rubric, "unscored", reason=str(rejected), raw=reply)
    if not attempts:
        return Judgement(judge, rubric, "empty", reason="a clarifying question, says the judge", raw=reply)
    return Judgement(judge, rubric, "scored", gate(response, attempts), raw=reply)


def parse_whole(reply: str, nonce: str) -> WholeScore:
    """The score that a reply to the whole-response rubric amounts to."""
    try:
        verdict = find_verdict(reply, nonce)
        score = _number(verdict.get("score"), 10)
    except _Rejected as rejected:
        return WholeScore(None, reason=str(rejected), raw=reply)
    return WholeScore(score, verdict.get("on_topic_from_start") is True, raw=reply)


def parse_ratings(reply: str, nonce: str, count: int) -> dict[int, float]:
    """Usable ratings (0-100) by number 1..count of a reply to the concreteness rubric; the rest is left out."""
    verdict = parse_verdict(reply, nonce)
    listed = None if isinstance(verdict, str) else verdict.get("ratings")
    ratings: dict[int, float] = {}
    for key, value in listed.items() if isinstance(listed, dict) else ():
        if key.isdecimal() and len(key) < 6 and 1 <= int(key) <= count:
            with contextlib.suppress(_Rejected):
                ratings[int(key)] = _number(value, 100)
    return ratings


def parse_verdict(reply: str, nonce: str) -> dict[str, Any] | str:
    """The verdict of a reply, or the reason why there is none."""
    try:
        return find_verdict(reply, nonce)
    except _Rejected as rejected:
        return str(rejected)


def find_verdict(reply: str, nonce: str) -> dict[str, Any]:
    """The one JSON object in `reply` that carries the nonce; objects quoted from a response cannot carry it.

    Raises a rejection where there is none, or where two differ.
    """
    if not reply.strip():
        raise _Rejected("the judge's reply is empty")
    found = [v for v in _objects(reply) if v.get("verdict") == nonce]
    if not found:
        if "{" not in reply:
            raise _Rejected("the judge's reply holds no JSON")
        if nonce in reply:
            raise _Rejected("the judge's JSON is malformed or cut off")
        raise _Rejected("the judge's JSON does not carry the code of this response")
    if any(v != found[0] for v in found[1:]):
        raise _Rejected("the judge gave several verdicts that differ")
    return found[0]


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in a text, outermost first."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    tried = 0
    while at >= 0 and tried < 200:
        tried += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


def _attempts(verdict: dict[str, Any], response: str) -> list[Attempt]:
    listed = verdict.get("attempts")
    if not isinstance(listed, list) or not all(isinstance(a, dict) for a in listed):
        raise _Rejected("the judge's verdict has no list of attempts")
    if len(listed) > MAX_ATTEMPTS:
        raise _Rejected(f"the judge lists {len(listed)} attempts, more than {MAX_ATTEMPTS}")
    text = Quotable(response)
    places: list[tuple[int, int, float, str]] = []
    after = 0
    for number, entry in enumerate(listed, 1):
        score = _number(entry.get("score"), 100)
        first, last = _words(entry, "first_words", number), _words(entry, "last_words", number)
        phrase = entry.get("restart_phrase")
        phrase = phrase if isinstance(phrase, str) and number > 1 else ""
        start = text.find(first, after)
        if start is None:
            raise _Rejected(f"attempt {number} quotes first words that do not occur in the response (or not there)")
        opened = text.find(phrase, after) if phrase.strip() else None
        if opened is not None and opened[0] < start[0] and not text.has_words(opened[1], start[0]):
            start = opened  # the judge quoted what comes after the phrase
        end = text.find(last, start[0])
        if end is None:
            raise _Rejected(f"attempt {number} quotes last words that do not occur in the response (or not there)")
        places.append((start[0], end[1], score, phrase))
        after = start[1]
    return _tile(places, response)


def _tile(places: list[tuple[int, int, float, str]], response: str) -> list[Attempt]:
    """Attempts that cover the response without gaps; one that runs into the next is rejected."""
    attempts = []
    for i, (start, end, score, phrase) in enumerate(places):
        following = places[i + 1][0] if i + 1 < len(places) else len(response)
        if end > following:
            raise _Rejected(f"attempt {i + 1} ends after attempt {i + 2} begins")
        attempts.append(Attempt(start if i else 0, following, score, phrase))
    return attempts


def _number(value: Any, top: int) -> float:
    if isinstance(value, str):
        try:
            value = float(value.strip().removesuffix("/100").removesuffix("/10").removesuffix("%"))
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Rejected("the judge gave a score that is no number")
    if not 0 <= value <= top:  # also false for nan
        raise _Rejected(f"the judge gave a score outside 0-{top}")
    return float(value)


def _words(entry: dict[str, Any], field: str, number: int) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise _Rejected(f"attempt {number} has no {field.replace('_', ' ')}")
    return value


class Quotable:
    """A text in which quotations are found whatever their whitespace, quotation marks, dashes, emphasis and case."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._plain, self._place = _canonical(text)

    def find(self, quoted: str, after: int = 0) -> tuple[int, int] | None:
        """Characters [start, end) of the first occurrence that begins at or after `after`, or None."""
        wanted = _canonical(quoted)[0].strip(" .…")
        if not wanted:
            return None
        at = self._plain.find(wanted)
        while at >= 0:
            start, end = self._place[at], self._place[at + len(wanted) - 1] + 1
            if start >= after and self._whole(at, at + len(wanted)):
                return start, end
            at = self._plain.find(wanted, at + 1)
        return None

    def has_words(self, start: int, end: int) -> bool:
        """Whether there is a letter or digit in [start, end)."""
        return any(c.isalnum() for c in self._text[start:end])

    def _whole(self, start: int, end: int) -> bool:
        """Whether the occurrence does not cut a word in two."""
        text = self._plain
        left = start == 0 or not (text[start - 1].isalnum() and text[start].isalnum())
        right = end == len(text) or not (text[end - 1].isalnum() and text[end].isalnum())
        return left and right


def _canonical(text: str) -> tuple[str, list[int]]:
    """Canonical form and, for each of its characters, the offset it came from."""
    out: list[str] = []
    place: list[int] = []
    for i, char in enumerate(text):
        char = _SAME.get(char, char)
        if char in _IGNORED:
            continue
        if char.isspace():
            if out and out[-1] != " ":
                out.append(" ")
                place.append(i)
            continue
        for part in "..." if char == "…" else char.lower():
            out.append(part)
            place.append(i)
    return "".join(out), place
