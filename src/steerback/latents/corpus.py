"""Texts for the training of an SAE, written by the model itself: every kind of text about every topic, in random order.

Topics and kinds are data of the package (`data/corpus`). A text is read as the answer to its prompt, and once more in
pieces that stand alone, because labels, directions and the doctor read texts that follow no prompt.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from steerback.readers import content_lines, read_json_lines
from steerback.records import Request, Sampling

SEED = 5_000_000
"""First seed of the corpus, far from those of all stages of a study."""
PIECE = 320
"""Characters after which a piece ends, at the end of a sentence."""


@dataclass(frozen=True, slots=True)
class TrainingText:
    """What the model is given to read: a prompt, maybe empty, and a text as its answer."""

    prompt: str
    text: str


def corpus_requests(n: int, new_tokens: int, plain: bool) -> list[Request]:
    """Return the first `n` requests of the corpus; a `plain` model without a chat format gets headings to go on from.

    The same number always means the same request, so that a stopped corpus goes on.
    """
    topics, kinds = _lines("topics"), _lines("kinds")
    pairs = [(topic, kind) for topic in topics for kind in kinds]
    random.Random(0).shuffle(pairs)
    sampling = Sampling(temperature=1.0, max_new_tokens=new_tokens)
    found = []
    for i in range(n):
        topic, kind = pairs[i % len(pairs)]
        prompt = kind.replace("{topic}", topic)
        found.append(Request(str(i), f"{prompt}\n\n" if plain else prompt, SEED + i, sampling))
    return found


def read_corpus(path: Path) -> dict[str, TrainingText]:
    """Return the texts that a file holds already by key; a last line that was cut off is left out."""
    found: dict[str, TrainingText] = {}
    if path.is_file():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):  # stopped while it was written
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for _, row in read_json_lines(path, "corpus"):
            if isinstance(row, dict):
                found[str(row.get("key"))] = TrainingText(str(row.get("prompt")), str(row.get("text")))
    return found


def corpus_line(key: str, reading: TrainingText) -> str:
    """Return the line of a corpus file for a text."""
    return json.dumps({"key": key, "prompt": reading.prompt, "text": reading.text}, ensure_ascii=False) + "\n"


def readings(texts: Sequence[TrainingText]) -> list[TrainingText]:
    """Return each text as the answer to its prompt, and its pieces alone; a text without a prompt in pieces only."""
    found = []
    for reading in texts:
        if reading.prompt:
            found.append(reading)
        found.extend(TrainingText("", piece) for piece in pieces(reading.text))
    return found


def pieces(text: str) -> Iterator[str]:
    """Yield parts of a text of a few sentences each."""
    part = ""
    for sentence in re.split(r"(?<=[.!?。])\s+|\n\n+", text):
        part = f"{part} {sentence}".strip()
        if len(part) >= PIECE:
            yield part
            part = ""
    if part:
        yield part


def _lines(name: str) -> list[str]:
    return content_lines(resources.files("steerback.data").joinpath("corpus", f"{name}.txt").read_text("utf-8"))
