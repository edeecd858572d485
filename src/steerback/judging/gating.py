"""Gating: a restart counts only if its quoted phrase really opens the attempt's span. All judges share it.

Small judge models invent restarts. A phrase that does not occur in the response, or occurs at another place, is no
evidence of a restart. This module knows a response and its attempts, but not how a judge determined them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from steerback.records import Attempt

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})
_LEADING = re.compile(r"^[\s\"'*_#>\-.,;:!?()\[\]]+")


def canonical(text: str) -> str:
    """Normalise a text: lower case, one kind of quote and dash, single spaces, no leading punctuation or markup."""
    plain = " ".join(text.translate(_QUOTES).lower().split())
    return _LEADING.sub("", plain)


def opens(phrase: str, text: str) -> bool:
    """Return whether `text` begins with `phrase`, ignoring whitespace, quotes, case and closing punctuation."""
    wanted = canonical(phrase).rstrip(" .,;:!?\"'-*_")
    if not wanted:
        return False
    plain = canonical(text)
    return plain.startswith(wanted) and not plain[len(wanted) : len(wanted) + 1].isalnum()


def gate(response: str, attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Set `gated` of each attempt: true for the first, else whether its phrase opens response[start:end]."""
    return tuple(replace(a, gated=i == 0 or opens(a.phrase, response[a.start : a.end])) for i, a in enumerate(attempts))
