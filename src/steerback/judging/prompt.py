"""Questions to a language model: a versioned rubric and the named texts that the question is about.

Untrusted text (a response, a label, a snippet) is enclosed in tags with a random nonce that the text does not contain,
and the verdict must repeat the nonce. The text can therefore neither close its tags nor imitate a verdict.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

_OUR_TAG = re.compile(r"<(?=\s*/?\s*(?:prompt|topic|subject|response|labels|snippets)\b)", re.IGNORECASE)
_PLACE = re.compile(r"\{(prompt|response|label)\}")
CLOSING = 'Reply with the JSON object for verdict "{nonce}" only.'


@dataclass(frozen=True, slots=True)
class Rubric:
    """A versioned instruction (rubrics/VERSION.txt); any change of its text needs a new version.

    `template` is the question of a user's rubric with placeholders {prompt}, {response} and {label}. If it is empty,
    the question lists the texts one after the other.
    """

    version: str
    system: str
    template: str = ""

    @property
    def text(self) -> str:
        """System message and template as one text."""
        return "\n\n".join(filter(None, (self.system, self.template)))


@cache
def rubric(version: str) -> Rubric:
    """Load the built-in rubric of a version."""
    file = resources.files("steerback.judging") / "rubrics" / f"{version}.txt"
    return Rubric(version, file.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Query:
    """System and user message of one call, and the nonce that the verdict must repeat."""

    system: str
    user: str
    nonce: str


def _draw() -> str:
    return secrets.token_hex(8)


def compose(
    asked: Rubric,
    places: Mapping[str, str],
    enclosed: str = "",
    closing: str = CLOSING,
    draw: Callable[[], str] = _draw,
) -> Query:
    """Compose the question of a rubric: each text of `places` between tags of its name; empty texts are left out.

    The text named `enclosed` is sent verbatim between tags with the nonce. In the other texts our tags are escaped.
    """
    texts = {name: encodable(text) for name, text in places.items() if text or name == enclosed}
    together = "\n".join(texts.values())
    while (nonce := draw()) in together:  # a text that contains the nonce could close its tags
        continue
    parts = {}
    for name, text in texts.items():
        tag = f"{name}-{nonce}" if name == enclosed else name
        parts[name] = f"<{tag}>\n{text if name == enclosed else _OUR_TAG.sub('&lt;', text)}\n</{tag}>"
    body = "\n\n".join(parts.values())
    if asked.template:
        shown = {**parts, "label": parts.get("topic", "(none)")}
        body = _PLACE.sub(lambda place: shown.get(place[1], "(none)"), asked.template)
    return Query(asked.system, "\n\n".join(filter(None, (body, closing.format(nonce=nonce)))), nonce)


def numbered(texts: Sequence[str]) -> str:
    """Return the texts as a numbered list, one line each."""
    return "\n".join(f"{n}. {' '.join(encodable(text).split())}" for n, text in enumerate(texts, 1))


def encodable(text: str) -> str:
    """Replace each lone surrogate by U+FFFD: UTF-8, and so every provider, rejects lone surrogates."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
