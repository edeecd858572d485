"""Explicit restart language: where a response stops itself and begins again.

A small grammar rather than a list of sentences. A restart opens a sentence (or a clause after a dash, an ellipsis or
a comma) and consists of *openers* ("wait", "oops", "sorry", "no") and a *core*: an acknowledgement ("I drifted",
"that has nothing to do with your question"), a retraction ("scratch that"), an announcement ("let me start over",
"back to the question") or a reminder of the task ("you asked how to ...", "I should be talking about ..."). Each
is put together from word classes, so phrasings that nobody listed are found. Quotations are masked beforehand; cores
are anchored at the subject, so reported speech and instructions ("wait until it dries") do not match.

Knows English surface forms only: nothing of scores, prompts' meaning, or whether a correction was needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steerback.judging.discourse import is_about_the_response, prompt_words
from steerback.judging.phrases import (
    BARE_BACK,
    COMMAND,
    CORE,
    DOUBT,
    HEDGE,
    INSTRUCTION,
    LOOSE,
    OPENER,
    SEPARATOR,
    SPOKEN,
    TRIGGER,
)
from steerback.judging.text import Span, clause_starts, mask_quotes, normalise, sentences, words

MIN_BEFORE = 2
"""A restart needs something to restart from."""
MIN_AFTER = 2
"""A response cut off inside or right after a restart phrase has not begun another attempt."""
MAX_RESIDUE = 8
"""Words a restart sentence may hold after its phrase before it counts as content between two restarts."""
MAX_LEAD = 3
"""The same for words before a phrase that starts within a sentence."""


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart: its phrase is text[start:end], the attempt it opens begins at `start`."""

    start: int
    end: int


_PUNCTUATION = " ,.!?;:…–—-"


def find_restarts(text: str, prompt: str = "") -> list[Restart]:
    """Restarts of `text` in order; consecutive restart phrases with no content between them are one.

    `prompt` sharpens one construction: "back to X" counts when X names something the prompt asks about.
    """
    masked = mask_quotes(text)
    topic = prompt_words(prompt)
    found: list[Restart] = []
    last_content = -1  # end of the last sentence that held content
    lead: int | None = None  # start of "Hmm ..." or "Okay." right before this sentence: part of a restart, or nothing
    for sentence in sentences(masked):
        restart = _in_sentence(masked, sentence, topic)
        if restart is None:
            if _only_openers(masked[sentence.start : sentence.end]):
                lead = sentence.start if lead is None else lead
            else:
                lead, last_content = None, sentence.end
            continue
        if lead is not None and restart.start == sentence.start:
            restart = Restart(lead, restart.end)
        lead = None
        if restart.start > sentence.start and len(words(masked[sentence.start : restart.start])) > MAX_LEAD:
            last_content = restart.start
        if found and found[-1].end > last_content:
            found[-1] = Restart(found[-1].start, restart.end)
        else:
            found.append(restart)
        rest = masked[restart.end : sentence.end].lstrip(_PUNCTUATION)
        if len(words(rest)) > MAX_RESIDUE and not _is_restart(normalise(rest), topic, inline=False, pause=False):
            last_content = sentence.end
    return [r for r in found if _has_words(text[: r.start], MIN_BEFORE) and _has_words(text[r.end :], MIN_AFTER)]


def _only_openers(sentence: str) -> bool:
    """Whether a sentence is nothing but an interjection or a connective."""
    if len(sentence) > 40:
        return False
    openers, rest = _split_openers(normalise(sentence))
    return bool(openers) and not words(rest)


def _in_sentence(text: str, sentence: Span, topic: set[str]) -> Restart | None:
    """The restart that opens this sentence, or else one of its later clauses."""
    if not TRIGGER.search(text, sentence.start, sentence.end):
        return None
    starts = clause_starts(text, sentence)
    for number, start in enumerate(starts):
        inline = number > 0
        pause = bool(SEPARATOR.search(text, sentence.start, start)) if inline else False
        if _is_restart(normalise(text[start : sentence.end]), topic, inline, pause):
            return Restart(start, _phrase_end(text, start, sentence.end, starts[number + 1 :], topic, inline, pause))
    return None


def _phrase_end(text: str, start: int, end: int, cuts: list[int], topic: set[str], inline: bool, pause: bool) -> int:
    """End of the shortest run of clauses that holds the whole phrase: its core where there is one."""
    wants_core = _has_core(normalise(text[start:end]), topic)
    for cut in cuts:
        head = normalise(text[start:cut])
        if _has_core(head, topic) if wants_core else _is_restart(head, topic, inline, pause):
            return start + len(text[start:cut].rstrip())
    return end


def _is_restart(text: str, topic: set[str], inline: bool, pause: bool) -> bool:
    """Whether normalised `text` opens with a restart; clauses inside a sentence need an opener as well."""
    openers, rest = _split_openers(text)
    kinds = {kind for kind, _ in openers}
    marked = kinds & {"strong", "weak", "apology"}
    strong = ("strong", True) in openers
    if inline and not marked:
        return pause and _match_core(rest)
    if _has_core(text, topic):
        return True
    if inline and not pause:  # "breathe in, hold on, breathe out" is an instruction; ", no, wait, ..." is not
        return strong and sum(kind != "neutral" for kind, _ in openers) > 1
    following = words(rest)[:1]
    if not following:
        return strong or "apology" in kinds
    return strong and (bool(SPOKEN.match(rest)) or following[0] in topic) and not INSTRUCTION.match(rest)


def _has_core(text: str, topic: set[str]) -> bool:
    """Whether a core follows the openers of normalised `text`; looser ones need an opener that marks trouble."""
    openers, rest = _split_openers(text)
    if _match_core(rest) or is_about_the_response(rest, topic):
        return True
    if any(kind != "neutral" for kind, _ in openers) and LOOSE.match(rest):
        return True
    if openers and COMMAND.match(rest):
        return True
    back = BARE_BACK.match(rest)
    return back is not None and bool(topic & set(words(rest[back.end() :])[:6]))


def _match_core(text: str) -> bool:
    """A core at the start of `text`, or behind a hedge such as "I think that"."""
    if CORE.match(text) or DOUBT.match(text):
        return True
    hedge = HEDGE.match(text)
    return hedge is not None and CORE.match(text, hedge.end()) is not None


def _split_openers(text: str) -> tuple[list[tuple[str, bool]], str]:
    """Openers as (kind, followed by punctuation or nothing), and what comes after them."""
    openers: list[tuple[str, bool]] = []
    at = 0
    while match := OPENER.match(text, at):
        if CORE.match(text, at):
            break
        after = match["after"]
        openers.append((_kind(match), after.strip() != "" or after == ""))
        at = match.end()
    return openers, text[at:]


def _kind(match: re.Match[str]) -> str:
    return next(name for name in ("strong", "apology", "weak", "neutral") if match[name] is not None)


def _has_words(text: str, count: int) -> bool:
    return len(words(text)) >= count
