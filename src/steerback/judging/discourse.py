"""Sentences that talk about the response itself: the part of restart language that no construction lists.

"That last sentence doesn't belong here" or "You never asked about any of this" consist of function words and words
about speaking, asking and erring, and of nothing else. That is the test: a speaker or a demonstrative in subject
position, a closed vocabulary, and a sign of trouble or return. A single content word ("the dough", "your savings")
outside the prompt's own words breaks it. Works on normalised text; knows nothing of positions in a response.
"""

from __future__ import annotations

import re
from importlib import resources

from steerback.judging.text import words

MAX_WORDS = 18


def _vocabulary() -> dict[str, frozenset[str]]:
    text = (resources.files("steerback.judging") / "discourse.txt").read_text(encoding="utf-8")
    parts = re.split(r"^\[(\w+)\]$", text, flags=re.M)[1:]
    return {name: frozenset(body.split()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


_CLASS = _vocabulary()
_KNOWN = frozenset().union(*_CLASS.values())

_SUBJECT = re.compile(
    r"(?:i|my (?:\w+ )?(?:answer|response|mind|thoughts?|words|point|focus|last)"
    r"|let (?:me|us)|we|that|this|these|those|none of"
    r"|nothing (?:i|of|above|here|so far)|(?:the|that|this|all) (?:\w+ )?"
    r"(?:above|last|previous|earlier|first|sentences?|paragraphs?"
    r"|part|bit|words?|text|passage|answer|response)|what (?:i|was)|everything i"
    r"|you (?:did|do|have|had|were|are|never|only|asked|wanted|(?:\w+ly) (?:did|asked))|your (?:\w+ )?question"
    r"|something (?:went|got|is|was|happened)|so much for|how did (?:i|we|that|this)|how we got|why (?:did|am|was|is)"
    r"|where (?:am|was|did|is)|what (?:am|is|was|happened)|back to what"
    r"|cancel|undo|forget|ignore|scratch|delete|discard)\b"
)
_CONDITIONAL = re.compile(
    r"\b(?:if|unless|whether|until|whenever|when|you (?:can|could|should|must|may|might|will|need|want)"
    r"|enough|not only|not just"
    r"|to (?:ask|answer|say)\b.{0,20}\byou(?:rself)?)\b"
)
_TASK_TAIL = re.compile(r"\b(?:how|about|on) (?:to|you|one) .*$|\bhow (?:do|does|did) .*$")


def is_about_the_response(text: str, prompt_words: set[str]) -> bool:
    """Whether normalised `text` (openers removed) says that the response went wrong or goes back.

    `prompt_words` are words of the prompt, allowed in the sentence, as is a tail "how to ...".
    """
    if not _SUBJECT.match(text) or _CONDITIONAL.search(text):
        return False
    bare = _TASK_TAIL.sub("", text)
    found = words(bare)
    if not 2 <= len(found) <= MAX_WORDS or any(w not in _KNOWN and w not in prompt_words for w in found):
        return False
    here = set(found)
    if here & _CLASS["trouble"]:
        return True
    if here & _CLASS["return"]:
        return bool(here & {"i", "me", "us", "we", "back", "question", "asked"})
    return bool(here & _CLASS["negation"]) and (bare != text or bool(here & _CLASS["speech"]))
