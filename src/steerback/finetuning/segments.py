"""Text in segments, each to be trained on or not, and its tokens with labels: axolotl's `input_output` form.

A row is what the model reads, special tokens written out as its template has them. It is tokenised as a whole, as the
model would meet it, and a token is trained exactly if every one of its characters is: a token that straddles a boundary
is masked. Knows tokenizers; nothing of examples, mixes or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerback.errors import SteerbackError
from steerback.store.run import write_atomic

IGNORED = -100
"""The label of a token without loss, as torch and transformers have it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and whether its tokens are trained."""

    text: str
    train: bool


Row = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row as the trainer takes it; both tuples have one entry per token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where it is trained, else -100."""

    @property
    def trained(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])  # nothing predicts the first token

    def cut(self, length: int) -> Tokens:
        """The first `length` tokens."""
        return Tokens(self.input_ids[:length], self.labels[:length])


def text_of(row: Row) -> str:
    return "".join(segment.text for segment in row)


def encode(row: Row, tokenizer: Any, where: str = "row") -> Tokens:
    """Token ids and labels of a row. Nothing is added to its text.

    Raises SteerbackError where the row has no text, nothing to train, or characters that the tokenizer does not know.
    """
    text = text_of(row)
    if not text:
        raise SteerbackError(f"{where}: its segments hold no text")
    if not any(segment.train and segment.text for segment in row):
        raise SteerbackError(f"{where}: no segment has label true, so there is nothing to train on")
    if not getattr(tokenizer, "is_fast", False):
        raise SteerbackError(f"{where}: the tokenizer gives no character positions; a fast tokenizer is needed")
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (UnicodeError, TypeError) as error:  # half of a surrogate pair, which JSON can hold
        raise SteerbackError(f"{where}: does not tokenise: {' '.join(str(error).split())}") from None
    ids, offsets = found["input_ids"], found["offset_mapping"]
    if not ids:
        raise SteerbackError(f"{where}: the tokenizer makes no token of {text[:40]!r}")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        start, end = offsets[ids.index(tokenizer.unk_token_id)]
        raise SteerbackError(f"{where}: {text[start:end]!r} does not tokenise with this model's tokenizer")
    masked = masked_before(row)
    labels, reached = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Some tokenizers leave leading space out of a token's span, and the parts of one character share its span.
        begin = min(start, reached)
        reached = max(reached, end)
        trained = begin < end and masked[end] == masked[begin]
        labels.append(token if trained else IGNORED)
    tokens = Tokens(tuple(ids), tuple(labels))
    if not tokens.trained:
        raise SteerbackError(f"{where}: no token lies in its trained segments alone, so there is nothing to train on")
    return tokens


def masked_before(row: Row) -> list[int]:
    """How many of the first n characters are masked, for n from 0 to the length of the text."""
    counts = [0]
    for segment in row:
        start = counts[-1]
        counts += [start] * len(segment.text) if segment.train else range(start + 1, start + 1 + len(segment.text))
    return counts


def to_json(row: Row) -> dict[str, Any]:
    return {"segments": [{"label": segment.train, "text": segment.text} for segment in row]}


def from_json(value: Any, where: str) -> Row:
    """A row from `{"segments": [{"label": true, "text": "..."}, ...]}`; further keys are left alone."""
    segments = value.get("segments") if isinstance(value, Mapping) else None
    if not isinstance(segments, list) or not segments:
        raise SteerbackError(f'{where}: should be {{"segments": [{{"label": true, "text": "..."}}, ...]}}')
    row = []
    for n, segment in enumerate(segments, 1):
        if not isinstance(segment, Mapping) or not isinstance(segment.get("text"), str):
            raise SteerbackError(f"{where}: segment {n} has no text")
        if not isinstance(segment.get("label"), bool):
            raise SteerbackError(
                f"{where}: label of segment {n} is {segment.get('label')!r}; it has to be true (train) or false (mask)"
            )
        row.append(Segment(segment["text"], segment["label"]))
    return tuple(row)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file in axolotl's `input_output` form; SteerbackError names the file and the line."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except FileNotFoundError:
        raise SteerbackError(f"{path} does not exist; training data is made with: steerback finetune data") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SteerbackError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise SteerbackError(f"{path}:{number}: not valid JSON: {error.msg}") from None
            rows.append(from_json(value, f"{path}:{number}"))
    if not rows:
        raise SteerbackError(f"{path} holds no example, so there is nothing to train on")
    return rows


def write_rows(path: Path, rows: Iterable[Row], notes: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Writes rows as JSONL, whole or not at all; `notes` are further keys per row, which readers leave alone."""
    values = [to_json(row) for row in rows]
    if notes is not None:
        values = [value | dict(note) for value, note in zip(values, notes, strict=True)]
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    return write_atomic(path, text.encode("utf-8", "surrogatepass"))
