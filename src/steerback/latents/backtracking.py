"""Backtracking latents: those whose label mentions going back on what was just said.

Weighted keywords select them, with exclusions, as the paper's appendix A.7 describes; words and weights are ours
(data/words/backtracking.txt). A label is its author's opinion; only activations show whether the latent does anything.

    found = find_backtracking(labels)                     # most points first
    [m.latent for m in found], found[0].matched           # ("self-correct", "mistake")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from steerback.data.prompts import word_lines

_ENTRIES = [line.split(" ", 1) for line in word_lines("backtracking")]
KEYWORDS: Mapping[str, float] = {text: float(points) for points, text in _ENTRIES if points != "-"}
"""Keyword -> points. `*` inside a word stands for any letters, a lone `*` for one to three words; case is ignored."""
EXCLUSIONS = tuple(text for points, text in _ENTRIES if points == "-")
"""A label that contains one of these is left out, whatever else it says."""


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """A latent with the points of the keywords that its label contains."""

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
    """Return latents whose label earns at least `minimum` points, most points first, then by index; at most `limit`.

    Each keyword counts once; a keyword found only inside a longer one that was found too counts as well.
    """
    terms = [(word, points, _pattern(word)) for word, points in keywords.items()]
    barred = [_pattern(word) for word in exclusions]
    found = []
    for latent, label in labels.items():
        if any(pattern.search(label) for pattern in barred):
            continue
        hits = [(word, points) for word, points, pattern in terms if pattern.search(label)]
        total = float(sum(points for _, points in hits))
        if hits and total >= minimum:
            found.append(LabelMatch(latent, label, total, tuple(word for word, _ in hits)))
    found.sort(key=lambda m: (-m.points, m.latent))
    return tuple(found[:limit])


def _pattern(keyword: str) -> re.Pattern[str]:
    """A keyword as a pattern between word boundaries; hyphen and space are the same."""
    words = []
    for word in re.split(r"[\s-]+", keyword):
        words.append(r"\w+(?:[\s-]+\w+){0,2}" if word == "*" else re.escape(word).replace(r"\*", r"[\w']*"))
    return re.compile(r"(?<!\w)" + r"[\s-]+".join(words) + r"(?!\w)", re.IGNORECASE)
