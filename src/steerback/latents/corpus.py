"""Training texts of an SAE, written by the model itself: every kind of text about every topic, in random order.

Topics and kinds of text are data of the package (`data/corpus`). The SAE is trained on each text as the answer to its
prompt, and again on its pieces without a prompt, because labels, directions and the doctor use texts without a prompt.
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
"""First seed of the corpus; no stage of a study uses seeds in this range."""
PIECE = 320
"""Number of characters after which a piece ends at the next end of a sentence."""


@dataclass(frozen=True, slots=True)
class TrainingText:
    """A text as the answer to a prompt; the prompt may be empty."""

    prompt: str
    text: str


def corpus_requests(n: int, new_tokens: int, plain: bool) -> list[Request]:
    """Return the first `n` requests of the corpus; a `plain` model without a chat format gets headings to continue.

    A number always stands for the same request, so that interrupted writing can resume.
    """
    topics, kinds = _lines("topics"), _lines("kinds")
    pairs = [(topic, kind) for topic in topics for kind in kinds]
    random.Random(0).shuffle(pairs)
    sampling = Sampling(temperature=1.0, max_new_tokens=new_tokens)
    requests = []
    for i in range(n):
        topic, kind = pairs[i % len(pairs)]
        prompt = kind.replace("{topic}", topic)
        requests.append(Request(str(i), f"{prompt}\n\n" if plain else prompt, SEED + i, sampling))
    return requests


def read_corpus(path: Path) -> dict[str, TrainingText]:
    """Return the texts in a corpus file by key; an incomplete last line is removed from the file."""
    texts: dict[str, TrainingText] = {}
    if path.is_file():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):  # writing was interrupted
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        for _, row in read_json_lines(path, "corpus"):
            if isinstance(row, dict):
                texts[str(row.get("key"))] = TrainingText(str(row.get("prompt")), str(row.get("text")))
    return texts


def corpus_line(key: str, reading: TrainingText) -> str:
    """Return the line of a text in a corpus file."""
    return json.dumps({"key": key, "prompt": reading.prompt, "text": reading.text}, ensure_ascii=False) + "\n"


def readings(texts: Sequence[TrainingText]) -> list[TrainingText]:
    """Return each text with its prompt, and its pieces without a prompt; without a prompt, its pieces only."""
    parts = []
    for reading in texts:
        if reading.prompt:
            parts.append(reading)
        parts.extend(TrainingText("", piece) for piece in pieces(reading.text))
    return parts


def pieces(text: str) -> Iterator[str]:
    """Yield consecutive parts of a text, a few sentences each."""
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
