"""Backtracking latents: latents whose label mentions correcting or withdrawing an earlier statement.

Weighted keywords with exclusions select them, as the paper's appendix A.7 describes. Words and weights are this
package's choice (data/words/backtracking.txt). A label is only its author's interpretation; activations have to show
what the latent does.

    matches = find_backtracking(labels)                       # most points first
    [m.latent for m in matches], matches[0].matched           # ("self-correct", "mistake")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from steerback.data.prompts import word_lines

_ENTRIES = [line.split(" ", 1) for line in word_lines("backtracking")]
KEYWORDS: Mapping[str, float] = {text: float(points) for points, text in _ENTRIES if points != "-"}
"""Points by keyword. `*` within a word matches any letters, a separate `*` matches one to three words; case-blind."""
EXCLUSIONS = tuple(text for points, text in _ENTRIES if points == "-")
"""A label that contains one of these is left out."""


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """A latent with the keywords in its label and the sum of their points."""

    latent: int
    label: str
    points: float
    matched: tuple[str, ...]


def find_backtracking(
    labels: Mapping[int, str],
    keywords: Mapping[str, float] = KEYWORDS,
    exclusions: tuple[str, ...] = EXCLUSIONS,
    minimum: float = 2.0,
    limit: int | None = None,
) -> tuple[LabelMatch, ...]:
    """Return at most `limit` latents whose label has at least `minimum` points, most points first, then by index.

    Each keyword counts once. A keyword that is part of a longer matching keyword counts as well.
    """
    terms = [(word, points, _pattern(word)) for word, points in keywords.items()]
    barred = [_pattern(word) for word in exclusions]
    matches = []
    for latent, label in labels.items():
        if any(pattern.search(label) for pattern in barred):
            continue
        hits = [(word, points) for word, points, pattern in terms if pattern.search(label)]
        total = float(sum(points for _, points in hits))
        if hits and total >= minimum:
            matches.append(LabelMatch(latent, label, total, tuple(word for word, _ in hits)))
    matches.sort(key=lambda m: (-m.points, m.latent))
    return tuple(matches[:limit])


def _pattern(keyword: str) -> re.Pattern[str]:
    """Compile a keyword to a pattern between word boundaries; hyphens match spaces."""
    words = []
    for word in re.split(r"[\s-]+", keyword):
        words.append(r"\w+(?:[\s-]+\w+){0,2}" if word == "*" else re.escape(word).replace(r"\*", r"[\w']*"))
    return re.compile(r"(?<!\w)" + r"[\s-]+".join(words) + r"(?!\w)", re.IGNORECASE)
