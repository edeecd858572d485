"""Labels of latents: labels in a target's folder, label files in other formats, and the user's table.

A target's folder may contain
    labels.csv     index,label
    latents.csv    index,label,density,max_activation,kind
    contexts.json  {"index": ["top-activating snippet", ...]}

Label files in other formats
    .csv                 index (or Goodfire's index_in_sae), label; other columns are ignored
    .jsonl, .jsonl.gz    Neuronpedia's export: one explanation per line, {"index": "17", "description": ..., ...}
    .json                the same rows as a list, or {"17": "label"}
    a folder             all such files in it, ordered by name

The user's table of a target has the columns index,label,source. It contains labels that were fetched, imported or
generated, each with its source. A latent without a label has no row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from steerback import readers
from steerback.errors import SteerbackError
from steerback.readers.tables import csv_cells, csv_rows, csv_text
from steerback.records import LatentKey
from steerback.store.files import make_folder, until_changed, user_folder, write_atomic

SUFFIXES = (".csv", ".json", ".json.gz", ".jsonl", ".jsonl.gz")
INDEX_COLUMNS = ("index", "index_in_sae")
TABLE = "labels.csv"
LONGEST = 2_000
"""Largest number of characters of a label: a judge has to read the label with every response."""
COLUMNS = ("index", "label", "source")
"""Columns of the user's table."""
OURS = {"source", "density"}
"""Columns that only tables written by steerback have."""


def read_labels(folder: Path) -> dict[int, str]:
    """Return the labels by latent from labels.csv, or else latents.csv; latents without a label are left out."""
    for name in ("labels.csv", "latents.csv"):
        if (folder / name).is_file():
            return dict(_own_table(folder / name))
    return {}


@until_changed  # a run asks for each of its latents
def _own_table(path: Path) -> Mapping[int, str]:
    return {index: label.strip() for index, label in _rows(path, "label") if label.strip()}


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
    """Return top-activating snippets by latent from contexts.json; empty if there is no such file."""
    path = folder / "contexts.json"
    return dict(_contexts(path)) if path.is_file() else {}


@until_changed  # each run of a campaign asks for them
def _contexts(path: Path) -> Mapping[LatentKey, tuple[str, ...]]:
    loaded = readers.read_json_table(path, "contexts")
    try:
        return {int(index): tuple(map(str, _list(texts))) for index, texts in loaded.items()}
    except ValueError as error:
        raise SteerbackError(f'{path}: expected {{"index": ["snippet", ...]}} ({error})') from error


def _list(value: readers.Json) -> list[readers.Json]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:80]!r} is not a list")
    return value


def _rows(path: Path, column: str) -> list[tuple[int, str]]:
    """Return (index, value of `column`) of each row of a table of latents."""
    text = readers.read_text(path, "table of latents")
    where = f"table of latents {path}"
    rows = csv_rows(text, where, ("index", column), written_here=_is_ours(text, where))
    return [(_index(row["index"], where), row[column]) for where, row in rows]


def _index(text: object, where: str) -> int:
    """Parse the index of a latent; `where` names the row in the error message."""
    try:
        latent = int(str(text))
    except ValueError:
        raise SteerbackError(f"{where}: {str(text)[:80]!r} is not the index of a latent") from None
    if latent < 0:
        raise SteerbackError(f"{where}: index {latent} is negative")
    return latent


@dataclass
class LatentLabels:
    """Labels that were read, one per latent; `empty` and `repeated` count the skipped rows."""

    labels: dict[int, str] = field(default_factory=dict)
    empty: int = 0
    repeated: int = 0
    origins: set[str] = field(default_factory=set)
    """Neuronpedia's model/source of the rows, and "by MODEL" for the model that wrote the labels."""

    def add(self, index: object, label: object, where: str) -> None:
        """Add a row; of several labels for a latent, the first counts."""
        latent = _index(index, where)
        text = " ".join(label.split()) if isinstance(label, str) else ""
        if not text or re.fullmatch(rf"(?:feature|latent)[_ ]{latent}", text):  # "feature_17" is only a placeholder
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
    """Read a label file, or all label files of a folder. Raises SteerbackError that names the wrong file and line."""
    files = [path]
    if path.is_dir():
        files = sorted((p for p in path.iterdir() if p.name.endswith(SUFFIXES)), key=_natural)
    if not files or not all(p.is_file() for p in files):
        raise SteerbackError(f"{path}: no label file there; supported suffixes: {', '.join(SUFFIXES)}")
    read = LatentLabels()
    for file in files:
        _read_into(read, file)
    sources = sorted(o for o in read.origins if not o.startswith("by "))
    if len(sources) > 1:
        raise SteerbackError(f"{path}: has labels of different SAEs: {', '.join(sources)}; keep one")
    return read


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that puts batch-2 before batch-10."""
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
    """Yield (location, row) of each row of a JSON or JSON lines file."""
    where = f"label file {path}"
    if not path.name.removesuffix(".gz").endswith(".json"):
        yield from readers.parse_json_lines(text, where)
        return
    loaded = readers.parse_json(text, where)
    if isinstance(loaded, dict):
        loaded = [{"index": k, "label": v} for k, v in loaded.items()]
    if not isinstance(loaded, list):
        raise SteerbackError(f"{where} must be a list or an object of labels, not {str(loaded)[:80]!r}")
    yield from ((where, row) for row in loaded)


def _read_csv(read: LatentLabels, text: str, path: Path) -> None:
    """Read a CSV in another format, or the user's table of another target, which has a `source` column."""
    where = f"label file {path}"
    header = _header(text, where)
    column = next((name for name in INDEX_COLUMNS if name in header), INDEX_COLUMNS[0])
    for place, row in csv_rows(text, where, (column, "label"), written_here=_is_ours(text, where)):
        read.add(row[column], row["label"], place)


def _header(text: str, where: str) -> set[str]:
    return {cell for _, cells in islice(csv_cells(text, where), 1) for cell in cells}


def _is_ours(text: str, where: str) -> bool:
    """Return whether steerback wrote a table, so that apostrophes before labels are escapes and not text."""
    return not OURS.isdisjoint(_header(text, where))


@dataclass(frozen=True, slots=True)
class UserLabel:
    """A label of the user's table with its source."""

    label: str
    source: str


@dataclass(frozen=True, slots=True)
class StoredLabels:
    """Number of new labels `written`, and number skipped (`kept`) because their latent already has a label."""

    written: int
    kept: int
    path: Path


def user_labels_folder(target: str) -> Path:
    """Return the folder with the user's labels for a target and the files they were downloaded from."""
    return user_folder("labels", target)


def read_user_labels(target: str) -> dict[int, UserLabel]:
    """Return the user's labels for a target by latent; empty if there are none."""
    path = user_labels_folder(target) / TABLE
    try:
        path.stat()
    except OSError:
        return {}
    return dict(_user_table(path))


@until_changed
def _user_table(path: Path) -> Mapping[int, UserLabel]:
    rows = csv_rows(readers.read_text(path, "table of labels"), f"table of labels {path}", COLUMNS)
    return {_index(row["index"], where): UserLabel(row["label"], row["source"]) for where, row in rows}


def store_labels(
    target: str, labels: Mapping[int, str], source: str, taken: Iterable[int] = (), overwrite: bool = False
) -> StoredLabels:
    """Add labels to the user's table atomically.

    A latent that has a label in the table or is in `taken` (latents labelled by the target) keeps its label unless
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
