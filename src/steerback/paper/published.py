"""Published numbers against ours: what each run measured, whether it agrees, and which settings differ.

Reads summaries and configs of finished runs and the table `data/published.toml`; computes nothing from trials. A number
from a built-in organism, or from a judge that is no model, never gets a verdict about a real model.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.experiments.base import organisms
from steerback.figures.tables import Table, number
from steerback.metrics import wilson
from steerback.store.run import stored_config

SOURCES = {"specification": "specification", "paper": "authors", "reader": "authors"}  # whose settings they had
LOCAL_JUDGES = ("offline", "scripted")
MAIN = "llama-3.3-70b"  # the rows that a built-in organism's numbers are shown beside
FINE_TUNED = "llama-3.1-8b"  # the same for fine-tuning
ALL = "all"  # rows about no single model


@dataclass(frozen=True)
class Published:
    """One row of the table; `published` maps a source to a number or a range."""

    quantity: str
    experiment: str
    targets: tuple[str, ...]
    path: str
    published: Mapping[str, float | tuple[float, float]]
    field: str = "value"
    rate: bool = False
    interval: bool = True
    at_most: bool = False
    n: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ours:
    """Our value with its 95 % interval (None: not known) and the number of trials behind it."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder's name, config and summary."""

    name: str
    config: RunConfig
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a published number about `target`, and ours, measured on `measured`."""

    row: Published
    target: str
    measured: str
    source: str
    published: float | tuple[float, float]
    run: str
    ours: Ours | None
    verdict: str
    deviations: tuple[str, ...]


def table_of_numbers() -> tuple[list[Published], list[Mapping[str, Any]]]:
    """The published rows, and the settings in which the sources differ."""
    body = tomllib.loads(resources.files("steerback.data").joinpath("published.toml").read_text("utf-8"))
    return [_published(entry) for entry in body["rows"]], body["settings"]


def _published(entry: Mapping[str, Any]) -> Published:
    targets = entry["target"] if isinstance(entry["target"], list) else [entry["target"]]
    values = {s: tuple(v) if isinstance(v := entry[s], list) else float(v) for s in SOURCES if s in entry}
    return Published(
        quantity=entry["quantity"],
        experiment=entry["experiment"],
        targets=tuple(targets),
        path=entry["path"],
        published=values,
        field=entry.get("field", "value"),
        rate=entry.get("rate", False),
        interval=entry.get("interval", True),
        at_most=entry.get("bound") == "at most",
        n=entry.get("n"),
        notes=tuple(entry.get("notes", ())),
    )


def finished(folders: Sequence[Path]) -> list[Finished]:
    """The runs that have a summary; one without is an error that says how to get it."""
    found = []
    for folder in folders:
        config = stored_config(folder)
        try:
            summary = json.loads((folder / "summary.json").read_text("utf-8"))
        except FileNotFoundError:
            raise SteerbackError(f"run {folder} is not finished; go on with: steerback resume {folder.name}") from None
        except ValueError:
            raise SteerbackError(
                f"{folder / 'summary.json'} is damaged; make it again: steerback figures {folder}"
            ) from None
        found.append(Finished(folder.name, config, summary))
    return found


def compare_published(folders: Sequence[Path]) -> list[Line]:
    """Every published number, once per run that measured it; `not measured` where none did."""
    rows, settings = table_of_numbers()
    runs = finished(folders)
    return [line for row in rows for target in row.targets for line in _lines(row, target, runs, settings)]


def _lines(
    row: Published, target: str, runs: Sequence[Finished], settings: Sequence[Mapping[str, Any]]
) -> Iterator[Line]:
    own = [run for run in runs if run.summary.get("experiment") == row.experiment]
    for source, value in row.published.items():
        shown = False
        for run in own:
            for measured in run.summary["targets"]:
                main = FINE_TUNED if row.experiment == "finetuning" else MAIN
                stands_in = bool(organisms([measured])) and target == main
                if target not in (measured, measured.split("@")[0], ALL) and not stands_in:
                    continue
                ours = our_number(run.summary["targets"][measured], row)
                shown = True
                yield Line(
                    row,
                    target,
                    measured,
                    source,
                    value,
                    run.name,
                    ours,
                    _verdict(row, source, value, measured, run.config, ours),
                    (*deviations(run.config, SOURCES[source], settings), *row.notes),
                )
        if not shown:
            yield Line(row, target, "-", source, value, "-", None, "not measured", row.notes)


def our_number(summary: Mapping[str, Any], row: Published) -> Ours | None:
    """The row's value in a target's summary. `*` in the path: the mean over all that match, ends likewise."""
    found = [x for x in _follow(summary, row.path.split(".")) if x is not None]
    if row.field == "count":
        return Ours(len(found[0]), None, None, None) if found and isinstance(found[0], list) else None
    values = [_estimate(x, row) for x in found if isinstance(x, Mapping)]
    known = [x for x in values if x is not None]
    if not known:
        return None
    ends = [[getattr(x, side) for x in known] for side in ("low", "high")]
    low, high = (None if None in side else sum(side) / len(known) for side in ends)
    total = None if any(x.n is None for x in known) else sum(x.n or 0 for x in known)
    return Ours(sum(x.value for x in known) / len(known), low, high, total)


def _follow(body: Any, path: Sequence[str]) -> list[Any]:
    if not path:
        return [body]
    if not isinstance(body, Mapping):
        return []
    keys = [key for key in body if fnmatchcase(key, path[0])]
    return [leaf for key in keys for leaf in _follow(body[key], path[1:])]


def _estimate(found: Mapping[str, Any], row: Published) -> Ours | None:
    value = found.get(row.field)
    if not isinstance(value, int | float):
        return None
    low, high = (found.get(end) if row.interval else None for end in ("low", "high"))
    n = found.get("n")
    return Ours(float(value), low, high, n if isinstance(n, int) else None)


def _verdict(
    row: Published,
    source: str,
    value: float | tuple[float, float],
    target: str,
    config: RunConfig,
    ours: Ours | None,
) -> str:
    if ours is None:
        return "no value"
    if organisms([target]):
        return "none (built-in model)"
    if config.judge in LOCAL_JUDGES:
        return f"none (judge {config.judge})"
    return verdict(ours, interval_of(value, row.rate, (row.n or {}).get(source)), row.at_most)


def interval_of(value: float | tuple[float, float], rate: bool, n: int | None) -> tuple[float, float]:
    """A range as it is; a rate with known n with its Wilson interval; any other number as it stands."""
    if isinstance(value, tuple):
        return value
    return wilson(round(value * n), n) if rate and n else (value, value)


def verdict(ours: Ours, published: tuple[float, float], at_most: bool = False) -> str:
    """agrees (the intervals overlap), higher, lower; for an upper bound: agrees, open (could be above), higher."""
    if ours.low is None or ours.high is None:
        return "no interval"
    if at_most:
        return "agrees" if ours.high <= published[1] else "open" if ours.low <= published[1] else "higher"
    if ours.low > published[1]:
        return "higher"
    return "lower" if ours.high < published[0] else "agrees"


def deviations(config: RunConfig, column: str, settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Settings of a run that are not those of a column (specification or authors), in words."""
    flat = config.model_dump(mode="json")
    found = []
    for setting in settings:
        wanted, ours = setting.get(column), _at(flat, setting["key"])
        inside = isinstance(wanted, list) and isinstance(ours, int | float) and wanted[0] <= ours <= wanted[1]
        same = ours == wanted or (isinstance(ours, str) and ours.rsplit("/", 1)[-1] == wanted)  # provider/model
        if wanted is not None and not same and not inside:
            said = f"{wanted[0]} to {wanted[1]}" if isinstance(wanted, list) else wanted
            found.append(f"{setting['topic']} {ours}, not {said}")
        if "note" in setting and same:
            found.append(setting["note"])
    if config.limit is not None:
        found.append(f"at most {config.limit} trials a condition")
    if column == "authors":
        found.append("degraded responses left out; the authors' code includes them")
    return tuple(found)


def _at(body: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        body = body[part]
    return body


def comparison(lines: Sequence[Line]) -> tuple[Table, list[str]]:
    """The table, and the numbered deviations that its last column refers to."""
    notes: dict[str, int] = {}
    cells, records = [], []
    for line in lines:
        marks = [notes.setdefault(text, len(notes) + 1) for text in line.deviations]
        rate = line.row.rate
        ours = line.ours
        cells.append(
            (
                line.row.quantity + (" (%)" if rate else ""),
                line.target,
                line.source,
                _shown(line.published, rate, line.row.at_most),
                line.run,
                line.measured,
                "-" if ours is None else _ours(ours, rate),
                f"{ours.n:,}" if ours is not None and ours.n is not None else "-",
                line.verdict,
                " ".join(map(str, sorted(marks))),
            )
        )
        low, high = interval_of(line.published, rate, (line.row.n or {}).get(line.source))
        records.append(
            {
                "quantity": line.row.quantity,
                "experiment": line.row.experiment,
                "target": line.target,
                "source": line.source,
                "run": line.run,
                "measured_on": line.measured,
                "published": line.published if isinstance(line.published, float) else None,
                "published_low": low,
                "published_high": high,
                "upper_bound": line.row.at_most,
                "ours": ours and ours.value,
                "ours_low": ours and ours.low,
                "ours_high": ours and ours.high,
                "n": ours and ours.n,
                "verdict": line.verdict,
                "deviations": "; ".join(line.deviations),
            }
        )
    columns = (
        *("quantity", "model", "source", "published", "run", "measured on"),
        *("ours", "n", "verdict", "deviations"),
    )
    return Table(columns, cells, "", records, left=6), [f"[{i}] {text}" for text, i in notes.items()]


def _shown(value: float | tuple[float, float], rate: bool, at_most: bool) -> str:
    if isinstance(value, tuple):
        return " to ".join(number(v, rate, digits=1) for v in value)
    return ("<= " if at_most else "") + number(value, rate)


def _ours(ours: Ours, rate: bool) -> str:
    value = number(ours.value, rate)
    if ours.low is None or ours.high is None:
        return value
    return f"{value} [{number(ours.low, rate)}, {number(ours.high, rate)}]"
