"""From a language model's reply to its verdict, and from the verdict of each rubric to a value.

Spans are found through the quoted words, tolerant of whitespace, quotes, dashes and case; whatever cannot be found in
the response is never scored. No input raises anything but `Unusable`, whose message is the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from steerback.judging.gating import gate
from steerback.records import Attempt
from steerback.store.facts import Boundaries, WholeScore

Verdict = Mapping[str, object]
MAX_ATTEMPTS = 50
MAX_BRACES = 1000  # that are tried before a nonce: more than a verdict of MAX_ATTEMPTS has
LONGEST_LABEL = 120
_SAME = {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "-", "—": "-", "−": "-"}
_IGNORED = "\"'*_"


class Unusable(Exception):
    """The reply is no usable verdict; the message is the reason."""


def parse_attempts(verdict: Verdict, response: str, drop_unscored: bool = False) -> tuple[Attempt, ...]:
    """The attempts that a verdict of the attempts rubric lists, gated; none for a clarifying question.

    `drop_unscored` leaves out those without a score (null or none at all), unless no attempt has one.
    """
    listed = _listed(verdict)
    dropped = [drop_unscored and entry.get("score") is None for entry in listed]
    if listed and all(dropped):
        raise Unusable("the judge gave no attempt a score")
    read = [entry | {"score": 0} if gone else entry for entry, gone in zip(listed, dropped, strict=True)]
    found = gate(response, _attempts(read, response))
    return tuple(attempt for attempt, gone in zip(found, dropped, strict=True) if not gone)


def parse_whole(verdict: Verdict) -> WholeScore:
    """The score that a verdict of the whole-response rubric gives."""
    score = _number(verdict.get("score"), 10)
    return WholeScore(score=score, on_topic_from_start=verdict.get("on_topic_from_start") is True)


def parse_boundaries(verdict: Verdict, response: str) -> Boundaries:
    """The boundaries that a verdict quotes; unusable where a quotation does not occur or the order is impossible."""
    text, after = Quotable(response), 0
    places: dict[str, int] = {}
    for name in ("off_topic", "correction", "on_topic"):
        quoted = verdict.get(name)
        if quoted is None:
            continue
        found = text.find(quoted, after) if isinstance(quoted, str) else None
        if found is None:
            raise Unusable(f"the quoted words for {name} do not occur in the response (or not in this order)")
        places[name] = after = found[0]
    return Boundaries(**places)


def parse_windows(verdict: Verdict, count: int) -> tuple[float, ...]:
    """The scores (0-100) of the windows 1 to `count` in a verdict of the windows rubric; unusable if one is missing."""
    scores = verdict.get("scores")
    if not isinstance(scores, dict):
        raise Unusable("the judge's verdict has no scores")
    missing = [n for n in range(1, count + 1) if str(n) not in scores]
    if missing:
        raise Unusable(f"the judge gave no score for part {missing[0]} of {count}")
    return tuple(_number(scores[str(n)], 100) for n in range(1, count + 1))


def parse_rating(verdict: Verdict, number: int) -> float:
    """The rating (0-100) of the label with this number in a verdict of the concreteness rubric."""
    ratings = verdict.get("ratings")
    return _number(ratings.get(str(number)) if isinstance(ratings, dict) else None, 100)


def parse_label(verdict: Verdict) -> str:
    """The label that a verdict of the label rubric gives, "" where the snippets have nothing in common."""
    label = verdict.get("label", 0)
    if label is None:
        return ""
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST_LABEL:
        raise Unusable(f"the judge's label is not a text of at most {LONGEST_LABEL} characters")
    return " ".join(label.split())


def parse_texts(verdict: Verdict, names: Sequence[str]) -> dict[str, str]:
    """The texts of these names in a verdict, single-spaced; unusable where one is missing."""
    texts = {}
    for name in names:
        value = verdict.get(name)
        if not isinstance(value, str) or not value.strip():
            raise Unusable(f"the reply has no {name}")
        texts[name] = " ".join(value.split())
    return texts


def find_verdict(reply: str, nonce: str) -> Verdict:
    """The one JSON object in `reply` that carries the nonce; objects quoted from a response cannot carry it.

    Raises Unusable where there is none, or where two differ.
    """
    if not reply.strip():
        raise Unusable("the reply is empty")
    found = list(_objects(reply, nonce))
    if not found:
        if "{" not in reply:
            raise Unusable("the reply holds no JSON")
        if nonce in reply:
            raise Unusable("the JSON of the reply is malformed or cut off")
        raise Unusable("the JSON of the reply does not carry its code")
    if any(v != found[0] for v in found[1:]):
        raise Unusable("the reply holds several verdicts that differ")
    return found[0]


def _objects(reply: str, nonce: str) -> Iterator[Verdict]:
    """Yield the outermost JSON objects whose verdict is the nonce: back from each nonce to the brace of its object."""
    decoder = json.JSONDecoder()
    ended = 0
    for carried in re.finditer(re.escape(f'"{nonce}"'), reply):
        start, tried = carried.start(), 0
        while start > ended and tried < MAX_BRACES and (start := reply.rfind("{", ended, start)) >= 0:
            tried += 1
            try:
                value, end = decoder.raw_decode(reply, start)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and value.get("verdict") == nonce:
                ended = end
                yield value
                break


def _listed(verdict: Verdict) -> list[dict[str, object]]:
    listed = verdict.get("attempts")
    if not isinstance(listed, list) or not all(isinstance(a, dict) for a in listed):
        raise Unusable("the judge's verdict has no list of attempts")
    if len(listed) > MAX_ATTEMPTS:
        raise Unusable(f"the judge lists {len(listed)} attempts, more than {MAX_ATTEMPTS}")
    return listed


def _attempts(listed: Sequence[Verdict], response: str) -> list[Attempt]:
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
            raise Unusable(f"attempt {number} quotes first words that do not occur in the response (or not there)")
        opened = text.find(phrase, after) if phrase.strip() else None
        if opened is not None and opened[0] < start[0] and not text.has_words(opened[1], start[0]):
            start = opened  # the judge quoted what comes after the phrase
        end = text.find(last, start[0])
        if end is None:
            raise Unusable(f"attempt {number} quotes last words that do not occur in the response (or not there)")
        places.append((start[0], end[1], score, phrase))
        after = start[1]
    return _tile(places, response)


def _tile(places: list[tuple[int, int, float, str]], response: str) -> list[Attempt]:
    """Attempts that cover the response without gaps; one that runs into the next is rejected."""
    attempts = []
    for i, (start, end, score, phrase) in enumerate(places):
        following = places[i + 1][0] if i + 1 < len(places) else len(response)
        if end > following:
            raise Unusable(f"attempt {i + 1} ends after attempt {i + 2} begins")
        attempts.append(Attempt(start if i else 0, following, score, phrase))
    return attempts


def _number(value: object, top: int) -> float:
    if isinstance(value, str):
        try:
            value = float(value.strip().removesuffix("/100").removesuffix("/10").removesuffix("%"))
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unusable("the judge gave a score that is no number")
    if not 0 <= value <= top:  # also false for nan
        raise Unusable(f"the judge gave a score outside 0-{top}")
    return float(value)


def _words(entry: Verdict, field: str, number: int) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"attempt {number} has no {field.replace('_', ' ')}")
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
        char = "\ufffd" if "\ud800" <= char <= "\udfff" else _SAME.get(char, char)  # as questions carry it
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
