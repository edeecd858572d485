"""Parse a language model's reply into a verdict, and the verdict of each rubric into a value.

An attempt's span is located by the words that the judge quotes, ignoring whitespace, quotes, dashes and case. A
quotation that does not occur in the response is never scored. Bad input raises `Unusable`, and no other exception.
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
MAX_BRACES = 1000  # braces tried before each nonce; a verdict of MAX_ATTEMPTS has fewer
LONGEST_LABEL = 120
_SAME = {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "-", "—": "-", "−": "-"}
_IGNORED = "\"'*_"


class Unusable(Exception):
    """The reply is no usable verdict; the message gives the reason."""


def parse_attempts(verdict: Verdict, response: str, drop_unscored: bool = False) -> tuple[Attempt, ...]:
    """Parse the attempts of a verdict of the attempts rubric and gate them; empty for a clarifying question.

    `drop_unscored` leaves out attempts without a score (null or missing). Raises Unusable if no attempt has a score.
    """
    listed = _listed(verdict)
    dropped = [drop_unscored and entry.get("score") is None for entry in listed]
    if listed and all(dropped):
        raise Unusable("the judge gave no attempt a score")
    entries = [entry | {"score": 0} if gone else entry for entry, gone in zip(listed, dropped, strict=True)]
    attempts = gate(response, _attempts(entries, response))
    return tuple(attempt for attempt, gone in zip(attempts, dropped, strict=True) if not gone)


def parse_whole(verdict: Verdict) -> WholeScore:
    """Parse the score of a verdict of the whole-response rubric."""
    score = _number(verdict.get("score"), 10)
    return WholeScore(score=score, on_topic_from_start=verdict.get("on_topic_from_start") is True)


def parse_boundaries(verdict: Verdict, response: str) -> Boundaries:
    """Locate the boundaries that a verdict quotes. Raises Unusable if a quotation is missing or out of order."""
    text, after = Quotable(response), 0
    places: dict[str, int] = {}
    for name in ("off_topic", "correction", "on_topic"):
        quoted = verdict.get(name)
        if quoted is None:
            continue
        span = text.find(quoted, after) if isinstance(quoted, str) else None
        if span is None:
            raise Unusable(f"the quoted words for {name} do not occur in the response (or not in this order)")
        places[name] = after = span[0]
    return Boundaries(**places)


def parse_windows(verdict: Verdict, count: int) -> tuple[float, ...]:
    """Parse the scores (0-100) of windows 1 to `count` in a verdict of the windows rubric; Unusable if one lacks."""
    scores = verdict.get("scores")
    if not isinstance(scores, dict):
        raise Unusable("the judge's verdict has no scores")
    missing = [n for n in range(1, count + 1) if str(n) not in scores]
    if missing:
        raise Unusable(f"the judge gave no score for part {missing[0]} of {count}")
    return tuple(_number(scores[str(n)], 100) for n in range(1, count + 1))


def parse_rating(verdict: Verdict, number: int) -> float:
    """Parse the rating (0-100) of label `number` in a verdict of the concreteness rubric."""
    ratings = verdict.get("ratings")
    return _number(ratings.get(str(number)) if isinstance(ratings, dict) else None, 100)


def parse_label(verdict: Verdict) -> str:
    """Parse the label in a verdict of the label rubric; "" if the snippets have nothing in common."""
    label = verdict.get("label", 0)
    if label is None:
        return ""
    if not isinstance(label, str) or not label.strip() or len(label) > LONGEST_LABEL:
        raise Unusable(f"the judge's label is not a text of at most {LONGEST_LABEL} characters")
    return " ".join(label.split())


def parse_texts(verdict: Verdict, names: Sequence[str]) -> dict[str, str]:
    """Return the named texts of a verdict with single spaces. Raises Unusable if one is missing."""
    texts = {}
    for name in names:
        value = verdict.get(name)
        if not isinstance(value, str) or not value.strip():
            raise Unusable(f"the reply has no {name}")
        texts[name] = " ".join(value.split())
    return texts


def find_verdict(reply: str, nonce: str) -> Verdict:
    """Return the JSON object in `reply` that carries the nonce. An object quoted from a response cannot carry it.

    Raises Unusable if the reply has no such object, or several that differ.
    """
    if not reply.strip():
        raise Unusable("the reply is empty")
    verdicts = list(_objects(reply, nonce))
    if not verdicts:
        if "{" not in reply:
            raise Unusable("the reply holds no JSON")
        if nonce in reply:
            raise Unusable("the JSON of the reply is malformed or cut off")
        raise Unusable("the JSON of the reply does not carry its code")
    if any(v != verdicts[0] for v in verdicts[1:]):
        raise Unusable("the reply holds several verdicts that differ")
    return verdicts[0]


def _objects(reply: str, nonce: str) -> Iterator[Verdict]:
    """Yield the outermost JSON objects whose key `verdict` is the nonce.

    Searches backwards from each nonce to the opening brace of its object. Parsing from every brace instead would take
    quadratic time on hostile replies.
    """
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
            start = opened  # the judge's first words are those after the restart phrase
        end = text.find(last, start[0])
        if end is None:
            raise Unusable(f"attempt {number} quotes last words that do not occur in the response (or not there)")
        places.append((start[0], end[1], score, phrase))
        after = start[1]
    return _tile(places, response)


def _tile(places: list[tuple[int, int, float, str]], response: str) -> list[Attempt]:
    """Extend the attempts so that they cover the response without gaps. Raises Unusable if two overlap."""
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
    """A text that locates quotations, ignoring whitespace, quotation marks, dashes, emphasis and case."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._plain, self._place = _canonical(text)

    def find(self, quoted: str, after: int = 0) -> tuple[int, int] | None:
        """Return the character span [start, end) of the first occurrence at or after `after`, or None."""
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
        """Return whether characters [start, end) include a letter or digit."""
        return any(c.isalnum() for c in self._text[start:end])

    def _whole(self, start: int, end: int) -> bool:
        """Return whether an occurrence begins and ends at word boundaries."""
        text = self._plain
        left = start == 0 or not (text[start - 1].isalnum() and text[start].isalnum())
        right = end == len(text) or not (text[end - 1].isalnum() and text[end].isalnum())
        return left and right


def _canonical(text: str) -> tuple[str, list[int]]:
    """Return the canonical form of a text and, for each of its characters, the offset in the text."""
    out: list[str] = []
    place: list[int] = []
    for i, char in enumerate(text):
        # The question replaced lone surrogates (`prompt.encodable`), so the judge quotes the replacement.
        char = "\ufffd" if "\ud800" <= char <= "\udfff" else _SAME.get(char, char)
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
