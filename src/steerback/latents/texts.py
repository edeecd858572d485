"""Texts to read residuals from where the user names none, and lists of texts from files.

It knows nothing of engines; an organism gets sentences of its own corpus, as it never saw plain English.
"""

from __future__ import annotations

import random
import re
from importlib import resources
from pathlib import Path

from steerback import organism
from steerback.errors import SteerbackError
from steerback.readers import content_lines, read_lines


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the texts of a file, one a line; blank lines and lines that begin with `#` are left out."""
    lines = read_lines(path, "texts file")
    if not lines:
        raise SteerbackError(f"texts file {path} holds no text; write one text a line")
    return tuple(dict.fromkeys(lines))


def usual_texts(target: str) -> tuple[str, ...]:
    """Plain English of this project's own; for an organism (by name, variants included) passages of its corpus."""
    if re.split("[@+]", target)[0] not in organism.NAMES:
        return tuple(content_lines(resources.files("steerback.data").joinpath("plain_texts.txt").read_text("utf-8")))
    from steerback.organism.corpus import howtos, passage, subjects

    rng = random.Random(0)
    topics = [t.key for t in (*howtos("evaluation"), *subjects())]
    return tuple(" ".join(passage(rng, key, 3)) for key in topics)
