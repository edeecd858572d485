"""Texts to read residuals from if the user names none, and lists of texts from files.

The organisms get sentences of their corpus, because they never saw plain English.
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.readers import content_lines, read_lines

if TYPE_CHECKING:
    from steerback.targets import Target


def read_texts(path: Path) -> tuple[str, ...]:
    """Return the texts of a file, one a line; blank lines and lines that begin with `#` are left out."""
    lines = read_lines(path, "texts file")
    if not lines:
        raise SteerbackError(f"texts file {path} holds no text; write one text a line")
    return tuple(dict.fromkeys(lines))


def usual_texts(target: Target) -> tuple[str, ...]:
    """Return plain English of the package; for a built-in organism passages of the corpus it was trained on."""
    if not target.planted:
        return tuple(content_lines(resources.files("steerback.data").joinpath("plain_texts.txt").read_text("utf-8")))
    from steerback.organism.corpus import howtos, passage, subjects

    rng = random.Random(0)
    topics = [t.key for t in (*howtos("evaluation"), *subjects())]
    return tuple(" ".join(passage(rng, key, 3)) for key in topics)
