"""Questions to a language model: a versioned rubric, and named places that hold the texts it is asked about.

Text that may hold anything (a response, a label, a snippet) is enclosed by tags with a random nonce that it cannot
contain, and the verdict must repeat that nonce: text inside can neither close the enclosure nor pass for a verdict.
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

    `template` is the question of a rubric of the user, with {prompt}, {response} and {label}; "": the places in turn.
    """

    version: str
    system: str
    template: str = ""

    @property
    def text(self) -> str:
        """All of its text."""
        return "\n\n".join(filter(None, (self.system, self.template)))


@cache
def rubric(version: str) -> Rubric:
    """Load the rubric of that version."""
    file = resources.files("steerback.judging") / "rubrics" / f"{version}.txt"
    return Rubric(version, file.read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Query:
    """The messages of one call and the nonce that the verdict must repeat."""

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
    """Return the question of a rubric with each text between tags named after its place; empty places are left out.

    The place named `enclosed` is sent verbatim between tags with the nonce. In all others our own tags are escaped.
    """
    texts = {name: encodable(text) for name, text in places.items() if text or name == enclosed}
    together = "\n".join(texts.values())
    while (nonce := draw()) in together:
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
    """List the texts, each on a line that begins with its number."""
    return "\n".join(f"{n}. {' '.join(encodable(text).split())}" for n, text in enumerate(texts, 1))


def encodable(text: str) -> str:
    """Replace lone surrogates, which no protocol can carry, one for one."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
