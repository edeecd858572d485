"""Default texts for reading residuals, and lists of texts from files.

Organisms get sentences of their training corpus, because they were never trained on ordinary English.
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
    """Return the texts of a file, one per line; blank lines and lines that begin with `#` are skipped."""
    lines = read_lines(path, "texts file")
    if not lines:
        raise SteerbackError(f"texts file {path} has no text; write one text per line")
    return tuple(dict.fromkeys(lines))


def usual_texts(target: Target) -> tuple[str, ...]:
    """Return the package's English texts; for a built-in organism, passages of its training corpus."""
    if not target.planted:
        return tuple(content_lines(resources.files("steerback.data").joinpath("plain_texts.txt").read_text("utf-8")))
    from steerback.organism.corpus import howtos, passage, subjects

    rng = random.Random(0)
    topics = [t.key for t in (*howtos("evaluation"), *subjects())]
    return tuple(" ".join(passage(rng, key, 3)) for key in topics)
