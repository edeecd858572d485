"""Backtracking latents: those whose label speaks of going back on what was just said.

Found by weighted keywords in labels with exclusions, as the paper's appendix A.7 describes; the words and weights are
ours. A label says what its author thought; whether the latents found do anything is for the activations to show.

    found = find_backtracking(labels)                     # most points first
    [m.latent for m in found], found[0].matched           # ("self-correct", "mistake")
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

KEYWORDS: Mapping[str, float] = {
    "self-correct*": 3,
    "backtrack*": 3,
    "retract*": 3,
    "chang* one's mind": 3,
    "chang* * mind": 3,
    "start* over": 3,
    "start* again": 3,
    "restart*": 2,
    "reconsider*": 3,
    "rethink*": 3,
    "second thought*": 3,
    "try again": 2,
    "interrupt* *self": 2,
    "correct* *self": 3,
    "correct* * mistake*": 3,
    "correct* * error*": 3,
    "correct* an earlier": 3,
    "correct* a previous": 3,
    "realiz* * mistake*": 3,
    "realis* * mistake*": 3,
    "admit* * mistake*": 2,
    "acknowledg* * mistake*": 2,
    "acknowledg* * error*": 2,
    "acknowledg* mistake*": 2,
    "acknowledg* error*": 2,
    "apologi* for * mistake*": 2,
    "apologi* for * error*": 2,
    "apologi* for * confusion": 2,
    "correction*": 1.5,
    "mistake*": 1,
    "revis*": 1,
    "oops": 2,
    "wait": 1,
    "actually": 1,
    "hold on": 1,
    "on reflection": 2,
    "back on track": 3,
    "return* to the * topic": 2,
    "return* to the * question": 2,
    "off-topic": 1.5,
    "digress*": 1.5,
    "clarif* * misunderstanding*": 1,
}
"""Keyword -> points. `*` inside a word stands for any letters, a lone `*` for one to three words; case is ignored."""

EXCLUSIONS: tuple[str, ...] = (
    "correctional",
    "autocorrect*",
    "auto-correct*",
    "color correction*",
    "colour correction*",
    "error correction code*",
    "error-correct*",
    "gamma correction*",
    "bonferroni correction*",
    "vision correction*",
    "political* correct*",
    "market correction*",
    "wait* list*",
    "wait* room*",
    "wait* time*",
    "waiter*",
    "restart* * computer*",
    "restart* * server*",
    "restart* * service*",
    "restart* * device*",
    "revision* history",
    "revision control",
    "retractable*",
    "journal retraction*",
    "code",
    "programming",
    "software",
    "exam* revision*",
)
"""A label that contains one of these is left out, whatever else it says."""


@dataclass(frozen=True, slots=True)
class LabelMatch:
    """One latent found: points of the keywords that its label contains."""

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
    """Latents whose label earns at least `minimum` points, most points first, then by index; at most `limit`.

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
