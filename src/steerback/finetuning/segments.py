"""Rows of text segments, trained or masked, and their tokens with labels, in axolotl's `input_output` format.

A row is the full text that the model reads, with the special tokens of the chat template written out. It is tokenised
as a whole, as in generation. A token is trained only if all its characters are trained, so a token across a boundary is
masked.
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
"""Label of a token without loss, as in torch and transformers."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment of text; `train` says whether its tokens have a loss."""

    text: str
    train: bool


Row = tuple[Segment, ...]


class SegmentRecord(Settings):
    """A segment in a data file; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    label: bool
    text: str


class RowRecord(Settings):
    """A row in a data file; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")
    segments: list[SegmentRecord]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row in the trainer's form; both tuples have one entry per token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token id if the token is trained, else -100."""

    @property
    def trained(self) -> int:
        """Number of tokens with a loss; the first token is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    def cut(self, length: int) -> Tokens:
        """Return the first `length` tokens."""
        return Tokens(self.input_ids[:length], self.labels[:length])


def text_of(row: Row) -> str:
    """Return the whole text of a row."""
    return "".join(segment.text for segment in row)


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, where: str = "row") -> Tokens:
    """Return token ids and labels of a row; no special tokens are added.

    Raises SteerbackError if the row has no text, no trained token, or characters unknown to the tokenizer.
    """
    text = text_of(row)
    if not text:
        raise SteerbackError(f"{where}: its segments have no text")
    if not any(segment.train and segment.text for segment in row):
        raise SteerbackError(f"{where}: no segment has label true, so there is nothing to train on")
    if not getattr(tokenizer, "is_fast", False):
        raise SteerbackError(f"{where}: this tokenizer has no character offsets; training needs a fast tokenizer")
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (UnicodeError, TypeError) as error:  # a lone surrogate
        raise SteerbackError(f"{where}: cannot be tokenised: {one_line(error)}") from None
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    if not ids:
        raise SteerbackError(f"{where}: the tokenizer returns no token for {text[:40]!r}")
    unknown = {
        text[start:end] for token, (start, end) in zip(ids, offsets, strict=True) if token == tokenizer.unk_token_id
    }
    if unknown := unknown - {tokenizer.unk_token}:  # some tokenizers use their end token as the unknown one
        raise SteerbackError(f"{where}: this model's tokenizer has no token for {min(unknown)!r}")
    masked = masked_before(row)
    labels, reached = [], 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        # Some tokenizers exclude leading spaces from a token's span, and byte tokens of one character share its span.
        begin = min(start, reached)
        reached = max(reached, end)
        trained = begin < end and masked[end] == masked[begin]
        labels.append(token if trained else IGNORED)
    tokens = Tokens(tuple(ids), tuple(labels))
    if not tokens.trained:
        raise SteerbackError(f"{where}: no token is entirely in a trained segment, so there is nothing to train on")
    return tokens


def masked_before(row: Row) -> list[int]:
    """Return the number of masked characters among the first n, for n from 0 to the length of the text."""
    counts = [0]
    for segment in row:
        start = counts[-1]
        counts += [start] * len(segment.text) if segment.train else range(start + 1, start + 1 + len(segment.text))
    return counts


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a JSONL file in axolotl's `input_output` format. SteerbackError names the file and the line."""
    if not path.exists():
        raise SteerbackError(f"{path} does not exist; make training data with: steerback finetune data")
    records = []
    for where, value in readers.read_json_lines(path, "training data"):
        if not isinstance(value, dict) or not value.get("segments"):
            raise SteerbackError(f'{where}: expected {{"segments": [{{"label": true, "text": "..."}}, ...]}}')
        records.append(parse(RowRecord, value, where))
    if not records:
        raise SteerbackError(f"{path} has no example, so there is nothing to train on")
    return [tuple(Segment(segment.text, segment.label) for segment in record.segments) for record in records]


def write_rows(path: Path, rows: Iterable[Row], notes: Sequence[Mapping[str, str]] | None = None) -> Path:
    """Write rows as JSONL, atomically; `notes` adds keys to each row, which `read_rows` ignores."""
    records: list[dict[str, object]] = [{"segments": [{"label": s.train, "text": s.text} for s in row]} for row in rows]
    if notes is not None:
        records = [{**record, **note} for record, note in zip(records, notes, strict=True)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return write_atomic(path, text.encode("utf-8"))
