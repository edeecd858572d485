"""Comparison of published numbers with finished runs: measured value, verdict, and different settings.

The sources are summaries and configs of finished runs and the table `data/published.toml`; no metric is recomputed. A
number from a model with planted behaviour, or from the offline judge, never gets a verdict about a real model.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError

from steerback.analysis.base import planted
from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.figures.tables import Table, number
from steerback.metrics import wilson
from steerback.store.facts import IMPORTED
from steerback.store.ledger import Ledger
from steerback.store.run import stored_config

SourceName = Literal["specification", "paper", "reader"]
Column = Literal["specification", "authors"]
SOURCES: dict[SourceName, Column] = {"specification": "specification", "paper": "authors", "reader": "authors"}
"""Column of settings that the numbers of each source were measured with."""
Value = float | tuple[float, float]
"""A number, or the ends of a range."""
SettingValue = int | float | str | tuple[int | float, int | float] | None
Verdict = Literal["agrees", "higher", "lower", "open", "no interval"]

LOCAL_JUDGES = ("offline", "scripted")
MAIN = "llama-3.3-70b"  # planted models are compared with the rows of this model
FINE_TUNED = "llama-3.1-8b"  # planted models after fine-tuning are compared with the rows of this model
ALL = "all"  # rows about no single model


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(_Entry):
    """One row of the table. `path` and `field` locate the measured number in the summary of a run."""

    quantity: str
    experiment: str
    target: Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]
    path: str
    field: str = "value"
    rate: bool = False
    interval: bool = True
    bound: Literal["at most"] | None = None
    n: dict[SourceName, int] = {}
    notes: tuple[str, ...] = ()
    specification: Value | None = None
    paper: Value | None = None
    reader: Value | None = None

    @property
    def published(self) -> dict[SourceName, Value]:
        """Published values by source."""
        values = {name: getattr(self, name) for name in get_args(SourceName)}
        return {name: value for name, value in values.items() if value is not None}


class Setting(_Entry):
    """A setting with its value, or the ends of its range, in the specification and in the authors' code."""

    topic: str
    key: str
    specification: SettingValue = None
    authors: SettingValue = None
    ours: SettingValue = None
    """Value of steerback that replaces the published one; `note` explains it."""
    note: str | None = None


class PublishedTable(_Entry):
    """The content of published.toml."""

    rows: tuple[Published, ...]
    settings: tuple[Setting, ...]


class RunSummary(BaseModel):
    """The part of summary.json that is compared."""

    experiment: str | None = None
    targets: dict[str, JsonValue] = {}


@dataclass(frozen=True)
class Ours:
    """Measured value with its 95 % confidence interval (None: unknown) and its number of trials."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Finished:
    """A finished run: name of the folder, config and summary.

    `planted` are the targets with planted behaviour. `unknown` are the settings that the files of an imported run do
    not contain.
    """

    name: str
    config: RunConfig
    summary: RunSummary
    planted: Sequence[str]
    unknown: Collection[str] = ()


@dataclass(frozen=True)
class Line:
    """One line of the comparison: a published number for `target`, and our number for the target `measured`."""

    row: Published
    target: str
    measured: str
    source: SourceName
    published: Value
    run: str
    ours: Ours | None
    verdict: str
    deviations: tuple[str, ...]

    @property
    def range(self) -> tuple[float, float]:
        """Published range, or the confidence interval of a published number if it can be computed."""
        return interval_of(self.published, self.row.rate, self.row.n.get(self.source))


def table_of_numbers() -> PublishedTable:
    """Return the published rows, and the settings that differ between the sources."""
    text = resources.files("steerback.data").joinpath("published.toml").read_text("utf-8")
    return PublishedTable.model_validate(tomllib.loads(text))


def finished(folders: Sequence[Path]) -> list[Finished]:
    """Return the runs with their summaries. Raises SteerbackError for an unfinished run or a damaged summary."""
    runs = []
    for folder in folders:
        config = stored_config(folder)
        try:
            summary = RunSummary.model_validate_json((folder / "summary.json").read_bytes())
        except FileNotFoundError:
            raise SteerbackError(f"run {folder} is not finished; resume it: steerback resume {folder.name}") from None
        except ValidationError:
            raise SteerbackError(
                f"{folder / 'summary.json'} is damaged; make it again: steerback figures {folder}"
            ) from None
        with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
            files = ledger.get("", IMPORTED)
            unknown = files.unknown if files is not None else ()
            runs.append(Finished(folder.name, config, summary, planted(ledger, summary.targets), unknown))
    return runs


def compare_published(folders: Sequence[Path]) -> list[Line]:
    """Return one line for each published number and run that measured it, or one line with `not measured`."""
    table, runs = table_of_numbers(), finished(folders)
    return [line for row in table.rows for target in row.target for line in _lines(row, target, runs, table.settings)]


def _lines(row: Published, target: str, runs: Sequence[Finished], settings: Sequence[Setting]) -> Iterator[Line]:
    main = FINE_TUNED if row.experiment == "finetuning" else MAIN
    measurements = [
        (run, measured)
        for run in runs
        if run.summary.experiment == row.experiment
        for measured in run.summary.targets
        if target in (measured, measured.split("@")[0], ALL) or (target == main and measured in run.planted)
    ]
    for source, value in row.published.items():
        if not measurements:
            yield Line(row, target, "-", source, value, "-", None, "not measured", row.notes)
        for run, measured in measurements:
            ours = our_number(run.summary.targets[measured], row)
            said = _verdict(row, source, value, ours, run, measured)
            notes = (*deviations(run.config.of(measured), SOURCES[source], settings, run.unknown), *row.notes)
            yield Line(row, target, measured, source, value, run.name, ours, said, notes)


def our_number(summary: JsonValue, row: Published) -> Ours | None:
    """Return the row's value in the summary of a target. `*` in the path: mean over all matches, also of the ends."""
    leaves = [x for x in _follow(summary, row.path.split(".")) if x is not None]
    if row.field == "count":
        return Ours(len(leaves[0]), None, None, None) if leaves and isinstance(leaves[0], list) else None
    values = [_estimate(x, row) for x in leaves if isinstance(x, dict)]
    known = [x for x in values if x is not None]
    if not known:
        return None
    low, high = _mean([x.low for x in known]), _mean([x.high for x in known])
    sizes = [x.n for x in known if x.n is not None]
    total = sum(sizes) if len(sizes) == len(known) else None
    return Ours(sum(x.value for x in known) / len(known), low, high, total)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _follow(body: JsonValue, path: Sequence[str]) -> list[JsonValue]:
    if not path:
        return [body]
    if not isinstance(body, dict):
        return []
    keys = [key for key in body if fnmatchcase(key, path[0])]
    return [leaf for key in keys for leaf in _follow(body[key], path[1:])]


def _estimate(leaf: Mapping[str, JsonValue], row: Published) -> Ours | None:
    value, low, high, n = (leaf.get(name) for name in (row.field, "low", "high", "n"))
    if not isinstance(value, int | float):
        return None
    low, high = (float(end) if row.interval and isinstance(end, int | float) else None for end in (low, high))
    return Ours(float(value), low, high, n if isinstance(n, int) else None)


def _verdict(row: Published, source: SourceName, value: Value, ours: Ours | None, run: Finished, measured: str) -> str:
    if ours is None:
        return "no value"
    if measured in run.planted:
        return "none (built-in model)"
    if run.config.judge in LOCAL_JUDGES:
        return f"none (judge {run.config.judge})"
    return verdict(ours, interval_of(value, row.rate, row.n.get(source)), row.bound is not None)


def interval_of(value: Value, rate: bool, n: int | None) -> tuple[float, float]:
    """Return a range unchanged, the Wilson interval of a rate with known n, or (value, value) for other numbers."""
    if isinstance(value, tuple):
        return value
    return wilson(round(value * n), n) if rate and n else (value, value)


def verdict(ours: Ours, published: tuple[float, float], at_most: bool = False) -> Verdict:
    """Return `agrees` (the intervals overlap), `higher`, `lower`, or `no interval` if ours is unknown.

    For a published upper bound (`at_most`): `agrees`, `open` (the interval contains the bound) or `higher`.
    """
    if ours.low is None or ours.high is None:
        return "no interval"
    if at_most:
        return "agrees" if ours.high <= published[1] else "open" if ours.low <= published[1] else "higher"
    if ours.low > published[1]:
        return "higher"
    return "lower" if ours.high < published[0] else "agrees"


def deviations(
    config: RunConfig, column: Column, settings: Sequence[Setting], unknown: Collection[str] = ()
) -> tuple[str, ...]:
    """Return texts about the settings of a run that differ from a column (specification or authors).

    Unknown settings are listed but not compared.
    """
    differing = []
    if missing := [setting.topic for setting in settings if setting.key in unknown]:
        differing.append(f"not in the imported files: {', '.join(missing)}")
    for setting in settings:
        if setting.key in unknown:
            continue
        wanted, ours = (
            setting.authors if column == "authors" else setting.specification,
            attrgetter(setting.key)(config),
        )
        if isinstance(wanted, tuple):
            low, high = wanted
            same, text = isinstance(ours, int | float) and low <= ours <= high, f"{low} to {high}"
        else:  # judges may be named provider/model
            same, text = ours == wanted or (isinstance(ours, str) and ours.rsplit("/", 1)[-1] == wanted), f"{wanted}"
        if setting.note is not None and ours == setting.ours:
            differing.append(setting.note)
        elif wanted is not None and not same:
            differing.append(f"{setting.topic} {ours}, not {text}")
    if config.limit is not None:
        differing.append(f"at most {config.limit} trials a condition")
    if config.degraded == "exclude":
        differing.append("degraded responses left out")
    return tuple(differing)


COLUMNS = ("quantity", "model", "source", "published", "run", "measured on", "ours", "n", "verdict", "deviations")


def comparison(lines: Sequence[Line]) -> tuple[Table, list[str]]:
    """Return the table, and the numbered deviations that its last column refers to."""
    notes: dict[str, int] = {}
    cells = []
    for line in lines:
        row, ours = line.row, line.ours
        marks = [notes.setdefault(text, len(notes) + 1) for text in line.deviations]
        quantity = row.quantity + (" (%)" if row.rate else "")
        place = (line.target, line.source, _published(line), line.run, line.measured)
        cells.append((quantity, *place, *_ours(ours, row.rate), line.verdict, " ".join(map(str, sorted(marks)))))
    minor = ("measured on", "source", "run", "n", "deviations")
    table = Table(COLUMNS, cells, "", [_record(line) for line in lines], left=6, minor=minor)
    return table, [f"[{i}] {text}" for text, i in notes.items()]


def _record(line: Line) -> dict[str, object]:
    ours = line.ours
    return {
        "quantity": line.row.quantity,
        "experiment": line.row.experiment,
        "target": line.target,
        "source": line.source,
        "run": line.run,
        "measured_on": line.measured,
        "published": line.published if isinstance(line.published, float) else None,
        "published_low": line.range[0],
        "published_high": line.range[1],
        "upper_bound": line.row.bound is not None,
        "ours": ours and ours.value,
        "ours_low": ours and ours.low,
        "ours_high": ours and ours.high,
        "n": ours and ours.n,
        "verdict": line.verdict,
        "deviations": "; ".join(line.deviations),
    }


def _published(line: Line) -> str:
    if isinstance(line.published, tuple):
        return " to ".join(number(v, line.row.rate, digits=1) for v in line.published)
    return ("<= " if line.row.bound else "") + number(line.published, line.row.rate)


def _ours(ours: Ours | None, rate: bool) -> tuple[str, str]:
    """Return the measured value with its interval, and its number of trials."""
    if ours is None:
        return "-", "-"
    ends = "" if None in (ours.low, ours.high) else f" [{number(ours.low, rate)}, {number(ours.high, rate)}]"
    return number(ours.value, rate) + ends, "-" if ours.n is None else f"{ours.n:,}"
