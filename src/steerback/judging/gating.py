"""Gating: a restart counts only where its quoted phrase really opens the attempt's span. Shared by all judges.

Small judges invent restarts; a phrase that does not stand in the response, or stands elsewhere, is no evidence of
one. Knows a response and its attempts; nothing of how they were found.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from steerback.records import Attempt

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_LEADING = re.compile(r"^[\s\"'*_#>\-.,;:!?()\[\]]+")


def canonical(text: str) -> str:
    """Lower case, one kind of quote and dash, single spaces, no leading punctuation or markup."""
    plain = " ".join(text.translate(_QUOTES).lower().split())
    return _LEADING.sub("", plain)


def opens(phrase: str, text: str) -> bool:
    """Whether `text` begins with `phrase`, whatever the whitespace, quotes, case and closing punctuation."""
    wanted = canonical(phrase).rstrip(" .,;:!?\"'-*_")
    if not wanted:
        return False
    found = canonical(text)
    return found.startswith(wanted) and not found[len(wanted) : len(wanted) + 1].isalnum()


def gate(response: str, attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """The attempts with `gated` set: true for the first, else whether the phrase opens response[start:end]."""
    return tuple(replace(a, gated=i == 0 or opens(a.phrase, response[a.start : a.end])) for i, a in enumerate(attempts))
