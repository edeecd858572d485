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


def read_texts(path: Path) -> tuple[str, ...]:
    """One text a line; blank lines and lines that begin with `#` are left out."""
    try:
        return _lines(path.read_text(encoding="utf-8"), f"texts file {path}")
    except FileNotFoundError:
        raise SteerbackError(f"texts file {path} does not exist; write one text a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SteerbackError(f"texts file {path} cannot be read as UTF-8 text: {error}") from None


def usual_texts(target: str) -> tuple[str, ...]:
    """Plain English of this project's own; for an organism (by name, variants included) passages of its corpus."""
    if re.split("[@+]", target)[0] not in organism.NAMES:
        return _lines(
            resources.files("steerback.data").joinpath("plain_texts.txt").read_text("utf-8"), "plain_texts.txt"
        )
    from steerback.organism.corpus import howtos, passage, subjects

    rng = random.Random(0)
    topics = [t.key for t in (*howtos("evaluation"), *subjects())]
    return tuple(" ".join(passage(rng, key, 3)) for key in topics)


def _lines(text: str, where: str) -> tuple[str, ...]:
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SteerbackError(f"{where} holds no text; write one text a line")
    return tuple(dict.fromkeys(found))
