"""Labels of latents: those that come with a target, label files of others, and the user's table.

A target's folder may hold
    labels.csv     index,label
    latents.csv    index,label,density,max_activation,kind
    contexts.json  {"index": ["top-activating snippet", ...]}

Label files of others
    .csv                 index (or Goodfire's index_in_sae), label, and columns that are not read
    .jsonl, .jsonl.gz    Neuronpedia's export: one explanation a line, {"index": "17", "description": ..., ...}
    .json                the same as one list, or {"17": "label"}
    a folder             all such files in it, in order of their names

The user's table of a target has the columns index,label,source: labels that were fetched, imported or made, each row
saying where it is from. A latent without a label has no row: a missing label is missing, never invented.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from steerback import readers
from steerback.errors import SteerbackError
from steerback.readers.tables import csv_cells, csv_rows, csv_text
from steerback.records import LatentKey
from steerback.store.files import make_folder, user_folder, write_atomic

SUFFIXES = (".csv", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
INDEX_COLUMNS = ("index", "index_in_sae")
TABLE = "labels.csv"
LONGEST = 2_000
"""Characters of a label. A longer one is no label, and a judge would have to read all of it for every response."""
COLUMNS = ("index", "label", "source")
"""Of the user's table."""
OURS = {"source", "density"}
"""Columns that mark the tables that steerback writes; files of others with labels have neither."""


def read_labels(folder: Path) -> dict[int, str]:
    """Return the label per latent from labels.csv (else latents.csv); latents without one are left out."""
    for name in ("labels.csv", "latents.csv"):
        if (folder / name).is_file():
            rows = _rows(folder / name, "label")
            return {index: label.strip() for index, label in rows if label.strip()}
    return {}


def read_dead(folder: Path) -> frozenset[int]:
    """Return the latents that never fired on the SAE's corpus (density 0 in latents.csv); empty if unknown."""
    path = folder / "latents.csv"
    dead = []
    for index, density in _rows(path, "density") if path.is_file() else ():
        try:
            if float(density or "nan") == 0:
                dead.append(index)
        except ValueError:
            raise SteerbackError(f"{path}: density {density!r} of latent {index} is not a number") from None
    return frozenset(dead)


def read_contexts(folder: Path) -> dict[LatentKey, tuple[str, ...]]:
    """Return top-activating snippets per latent from contexts.json; empty where there is no such file."""
    path = folder / "contexts.json"
    if not path.is_file():
        return {}
    loaded = readers.read_json_table(path, "contexts")
    try:
        return {int(index): tuple(map(str, _list(texts))) for index, texts in loaded.items()}
    except ValueError as error:
        raise SteerbackError(f'{path}: expected {{"index": ["snippet", ...]}} ({error})') from error


def _list(value: readers.Json) -> list[readers.Json]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:80]!r} is no list")
    return value


def _rows(path: Path, column: str) -> list[tuple[int, str]]:
    """Return (index, value of a column) of each row."""
    text = readers.read_text(path, "table of latents")
    where = f"table of latents {path}"
    rows = csv_rows(text, where, ("index", column), written_here=_is_ours(text, where))
    return [(_index(row["index"], where), row[column]) for where, row in rows]


def _index(text: object, where: str) -> int:
    """Return the index of a latent."""
    try:
        latent = int(str(text))
    except ValueError:
        raise SteerbackError(f"{where}: {str(text)[:80]!r} is not the index of a latent") from None
    if latent < 0:
        raise SteerbackError(f"{where}: index {latent} is negative")
    return latent


@dataclass
class LatentLabels:
    """Labels that were read: one per latent, and how many rows had none or came second for their latent."""

    labels: dict[int, str] = field(default_factory=dict)
    empty: int = 0
    repeated: int = 0
    origins: set[str] = field(default_factory=set)
    """Neuronpedia's model/source of the rows, and the model that wrote them ("by ...")."""

    def add(self, index: object, label: object, where: str) -> None:
        """Add a row; of several labels for one latent the first stays."""
        latent = _index(index, where)
        text = " ".join(label.split()) if isinstance(label, str) else ""
        if not text or re.fullmatch(rf"(?:feature|latent)[_ ]{latent}", text):  # a stand-in for a label is none
            self.empty += 1
        elif latent in self.labels:
            self.repeated += 1
        else:
            self.labels[latent] = _checked(latent, text, where)


def _checked(latent: int, text: str, where: str) -> str:
    if len(text) > LONGEST:
        raise SteerbackError(
            f"{where}: the label of latent {latent} has {len(text):,} characters; shorten it to {LONGEST:,} or fewer"
        )
    return text


def read_label_file(path: Path) -> LatentLabels:
    """Read one file or all files of a folder; SteerbackError naming file and line for what cannot be read."""
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name.endswith(SUFFIXES)), key=_natural)
    if not files or not all(p.is_file() for p in files):
        raise SteerbackError(f"{path}: no label file there; readable are {', '.join(SUFFIXES)}")
    read = LatentLabels()
    for file in files:
        _read_into(read, file)
    sources = sorted(o for o in read.origins if not o.startswith("by "))
    if len(sources) > 1:
        raise SteerbackError(f"{path}: labels of different SAEs in one place: {', '.join(sources)}; keep one")
    return read


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts batch-2 before batch-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _read_into(read: LatentLabels, path: Path) -> None:
    text = readers.read_text(path, "label file")
    if path.name.removesuffix(".gz").endswith(".csv"):
        _read_csv(read, text, path)
        return
    for where, row in _json_rows(text, path):
        if not isinstance(row, dict) or "index" not in row:
            raise SteerbackError(f'{where}: expected {{"index": ..., "description": ...}}')
        if row.get("modelId") or row.get("layer"):
            read.origins.add(f"{row.get('modelId')}/{row.get('layer')}")
        if row.get("explanationModelName"):
            read.origins.add(f"by {row['explanationModelName']}")
        read.add(row["index"], row.get("description", row.get("label")), where)


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, readers.Json]]:
    """Yield (place, row) of each row of JSON or JSON lines."""
    where = f"label file {path}"
    if not path.name.removesuffix(".gz").endswith(".json"):
        yield from readers.parse_json_lines(text, where)
        return
    loaded = readers.parse_json(text, where)
    if isinstance(loaded, dict):
        loaded = [{"index": k, "label": v} for k, v in loaded.items()]
    if not isinstance(loaded, list):
        raise SteerbackError(f"{where} must hold a list or an object of labels, not {str(loaded)[:80]!r}")
    yield from ((where, row) for row in loaded)


def _read_csv(read: LatentLabels, text: str, path: Path) -> None:
    """Read a table of others, or a user's table of another target, which names the `source` of each label."""
    where = f"label file {path}"
    header = _header(text, where)
    column = next((name for name in INDEX_COLUMNS if name in header), INDEX_COLUMNS[0])
    for place, row in csv_rows(text, where, (column, "label"), written_here=_is_ours(text, where)):
        read.add(row[column], row["label"], place)


def _header(text: str, where: str) -> set[str]:
    return {cell for _, cells in islice(csv_cells(text, where), 1) for cell in cells}


def _is_ours(text: str, where: str) -> bool:
    """Return whether we wrote a table; an apostrophe in front of a label of others belongs to the label."""
    return not OURS.isdisjoint(_header(text, where))


@dataclass(frozen=True, slots=True)
class UserLabel:
    """A label of the user's table and where it is from."""

    label: str
    source: str


@dataclass(frozen=True, slots=True)
class StoredLabels:
    """How many new labels were written, and how many left out because their latent has one already."""

    written: int
    kept: int
    path: Path


def user_labels_folder(target: str) -> Path:
    """Return the folder of the user's labels of a target and of the files they were fetched from."""
    return user_folder("labels", target)


def read_user_labels(target: str) -> dict[int, UserLabel]:
    """Return the user's labels of a target; empty where there are none."""
    path = user_labels_folder(target) / TABLE
    try:
        stat = path.stat()
    except OSError:
        return {}
    return dict(_user_table(path, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _user_table(path: Path, _changed: int, _size: int) -> Mapping[int, UserLabel]:
    """Read a table; kept as long as its file stays the same, because a run reads it once per latent."""
    rows = csv_rows(readers.read_text(path, "table of labels"), f"table of labels {path}", COLUMNS)
    return {_index(row["index"], where): UserLabel(row["label"], row["source"]) for where, row in rows}


def store_labels(
    target: str, labels: Mapping[int, str], source: str, taken: Iterable[int] = (), overwrite: bool = False
) -> StoredLabels:
    """Add labels to the user's table, whole or not at all.

    Latents that have a label, in the table or among `taken` (labels that come with the target), keep it unless
    `overwrite`.
    """
    known = read_user_labels(target)
    fixed = set() if overwrite else set(known) | set(taken)
    new = {k: UserLabel(_checked(k, text, source), source) for k, text in labels.items() if k not in fixed}
    path = user_labels_folder(target) / TABLE
    if new:
        make_folder(path.parent)
        rows = ((k, n.label, n.source) for k, n in sorted((known | new).items()))
        write_atomic(path, csv_text(COLUMNS, rows).encode("utf-8"))
    return StoredLabels(len(new), len(labels) - len(new), path)
