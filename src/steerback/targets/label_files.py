"""Label files of others, and the user's own labels of a target.

    .csv                 index (or Goodfire's index_in_sae), label, and columns that are not read
    .jsonl, .jsonl.gz    Neuronpedia's export: one explanation a line, {"index": "17", "description": ..., ...}
    .json                the same as one list, or {"17": "label"}
    a folder             all such files in it, in order of their names

The user's labels of a target are one table, index,label,source: what was fetched, imported or made, each row saying
where it is from. A latent without a label has no row. It knows nothing of networks, models or judges.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from steerback.errors import SteerbackError
from steerback.store.files import make_folder, user_folder, write_atomic

SUFFIXES = (".csv", ".json", ".jsonl", ".jsonl.gz")
INDEX_COLUMNS = ("index", "index_in_sae")
TABLE = "labels.csv"


@dataclass
class LabelFile:
    """What was read: one label per latent, and how many rows were without one or came second for their latent."""

    labels: dict[int, str] = field(default_factory=dict)
    empty: int = 0
    repeated: int = 0
    origins: set[str] = field(default_factory=set)
    """Neuronpedia's model/source of the rows, and the model that wrote them ("by ...")."""

    def add(self, index: Any, label: Any, where: str) -> None:
        """Takes a row; of several labels for one latent the first stays."""
        try:
            latent = int(str(index))
        except ValueError:
            raise SteerbackError(f"{where}: {index!r} is not the index of a latent") from None
        text = " ".join(label.split()) if isinstance(label, str) else ""
        if latent < 0:
            raise SteerbackError(f"{where}: index {latent} is negative")
        if not text or re.fullmatch(rf"(?:feature|latent)[_ ]{latent}", text):  # a stand-in for a label is none
            self.empty += 1
        elif latent in self.labels:
            self.repeated += 1
        else:
            self.labels[latent] = text


def read_label_file(path: Path) -> LabelFile:
    """Reads one file or all files of a folder; SteerbackError naming file and line for what cannot be read."""
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name.endswith(SUFFIXES)), key=_natural)
    if not files or not all(p.is_file() for p in files):
        raise SteerbackError(f"{path}: no label file there; readable are {', '.join(SUFFIXES)}")
    found = LabelFile()
    for file in files:
        _read_into(found, file)
    sources = sorted(o for o in found.origins if not o.startswith("by "))
    if len(sources) > 1:
        raise SteerbackError(f"{path}: labels of different SAEs in one place: {', '.join(sources)}; keep one")
    return found


def _natural(path: Path) -> list[Any]:
    """batch-2 before batch-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_into(found: LabelFile, path: Path) -> None:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SteerbackError(f"label file {path} cannot be read: {error}") from error
    if path.name.endswith(".csv"):
        _read_csv(found, text, path)
        return
    for where, row in _json_rows(text, path):
        if not isinstance(row, dict) or "index" not in row:
            raise SteerbackError(f'{where}: expected {{"index": ..., "description": ...}}')
        if row.get("modelId") or row.get("layer"):
            found.origins.add(f"{row.get('modelId')}/{row.get('layer')}")
        if row.get("explanationModelName"):
            found.origins.add(f"by {row['explanationModelName']}")
        found.add(row["index"], row.get("description", row.get("label")), where)


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    where = f"label file {path}"
    try:
        if path.name.endswith(".json"):
            loaded = json.loads(text)
            if isinstance(loaded, dict):
                loaded = [{"index": k, "label": v} for k, v in loaded.items()]
            yield from ((where, row) for row in loaded)
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"label file {path}, line {number}"
                yield where, json.loads(line)
    except (json.JSONDecodeError, TypeError) as error:
        raise SteerbackError(f"{where} is not valid JSON: {error}") from error


def _read_csv(found: LabelFile, text: str, path: Path) -> None:
    try:
        reader = csv.DictReader(io.StringIO(text), strict=True)
        names = reader.fieldnames or ()
        column = next((name for name in INDEX_COLUMNS if name in names), None)
        if column is None or "label" not in names:
            raise SteerbackError(
                f"label file {path}: needs the columns index and label, has {', '.join(names) or 'none'}"
            )
        for row in reader:
            found.add(row[column], row["label"], f"label file {path}, line {reader.line_num}")
    except csv.Error as error:
        raise SteerbackError(f"label file {path} is not a readable table: {error}") from error


@dataclass(frozen=True, slots=True)
class Named:
    """A label of the user's table and where it is from."""

    label: str
    source: str


def user_labels_folder(target: str) -> Path:
    """Where the user's labels of a target and what they were fetched from are kept."""
    return user_folder("labels", target)


def read_user_labels(target: str) -> dict[int, Named]:
    """The user's labels of a target; empty where there are none."""
    path = user_labels_folder(target) / TABLE
    try:
        stat = path.stat()
    except OSError:
        return {}
    return dict(_user_table(path, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _user_table(path: Path, _changed: int, _size: int) -> Mapping[int, Named]:
    """A table is asked for once per latent of a run, so it is kept as long as its file stays the same."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {int(row["index"]): Named(row["label"], row["source"]) for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, KeyError, TypeError) as error:
        raise SteerbackError(f"{path}: not a readable table of labels ({error}); delete it or mend it") from error


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of new labels: written, and left out because the latent has one already."""

    written: int
    kept: int
    path: Path


def store_labels(
    target: str, labels: Mapping[int, str], source: str, taken: Iterable[int] = (), overwrite: bool = False
) -> Stored:
    """Adds labels to the user's table, whole or not at all.

    Latents that have a label, in the table or among `taken` (labels that come with the target), keep it unless
    `overwrite`.
    """
    known = read_user_labels(target)
    fixed = set() if overwrite else set(known) | set(taken)
    new = {k: Named(label, source) for k, label in labels.items() if k not in fixed}
    path = user_labels_folder(target) / TABLE
    if new:
        make_folder(path.parent)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(("index", "label", "source"))
        writer.writerows((k, n.label, n.source) for k, n in sorted((known | new).items()))
        write_atomic(path, table.getvalue().encode("utf-8"))
    return Stored(len(new), len(labels) - len(new), path)
