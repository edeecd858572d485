"""Text in segments, each to be trained on or not, and its tokens with labels: axolotl's `input_output` form.

A row is what the model reads, with special tokens written out as its template has them. It is tokenised as a whole, as
the model would meet it, and a token is trained exactly if every one of its characters is: a token that straddles a
boundary is masked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict

from steerback import readers
from steerback.config import Settings, parse
from steerback.errors import SteerbackError, one_line
from steerback.store.files import write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss, as torch and transformers have it."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and whether its tokens are trained."""

    text: str
    train: bool


Row = tuple[Segment, ...]


class SegmentRecord(Settings):
    """A segment as files have it; further keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    label: bool
    text: str


class RowRecord(Settings):
    """A row as files have it; further keys are ignored."""

    model_config = ConfigDict(extra="ignore")
    segments: list[SegmentRecord]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row as the trainer takes it; both tuples have one entry per token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token itself where it is trained, else -100."""

    @property
    def trained(self) -> int:
        """Number of tokens with a loss; nothing predicts the first token."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> Tokens:
        """Return the first `length` tokens."""
        return Tokens(self.input_ids[:length], self.labels[:length])


def text_of(row: Row) -> str:
    """Return the whole text of a row."""
    return "".join(segment.text for segment in row)


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, where: str = "row") -> Tokens:
    """Return token ids and labels of a row. Nothing is added to its text.

    Raises SteerbackError if the row has no text, nothing to train, or characters that the tokenizer does not know.
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
    except (UnicodeError, TypeError) as error:  # half of a surrogate pair
        raise SteerbackError(f"{where}: does not tokenise: {one_line(error)}") from None
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
    """Return how many of the first n characters are masked, for n from 0 to the length of the text."""
    counts = [0]
    for segment in row:
        start = counts[-1]
        counts += [start] * len(segment.text) if segment.train else range(start + 1, start + 1 + len(segment.text))
    return counts


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file in axolotl's `input_output` form; SteerbackError names the file and the line."""
    if not path.exists():
        raise SteerbackError(f"{path} does not exist; training data is made with: steerback finetune data")
    records = []
    for where, value in readers.read_json_lines(path, "training data"):
        if not isinstance(value, dict) or not value.get("segments"):
            raise SteerbackError(f'{where}: should be {{"segments": [{{"label": true, "text": "..."}}, ...]}}')
        records.append(parse(RowRecord, value, where))
    if not records:
        raise SteerbackError(f"{path} holds no example, so there is nothing to train on")
    return [tuple(Segment(segment.text, segment.label) for segment in record.segments) for record in records]


def write_rows(path: Path, rows: Iterable[Row], notes: Sequence[Mapping[str, str]] | None = None) -> Path:
    """Write rows as JSONL, whole or not at all; `notes` are further keys per row, which readers ignore."""
    records = [
        RowRecord(segments=[SegmentRecord(label=segment.train, text=segment.text) for segment in row]).model_dump()
        for row in rows
    ]
    if notes is not None:
        records = [{**record, **note} for record, note in zip(records, notes, strict=True)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return write_atomic(path, text.encode("utf-8"))
