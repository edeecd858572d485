"""List of runs for the terminal: experiment, targets, date, state and headline rate of each run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.readers import read_json_table
from steerback.store.run import Run

if TYPE_CHECKING:
    from steerback.figures.tables import Table

COLUMNS = ("run", "experiment", "targets", "date", "state", "multi-attempt %", "of")
DATE = COLUMNS.index("date")
USUAL = ("baseline", "steered")
"""Conditions at threshold without another change."""


def run_table(root: Path) -> Table:
    """Return one row per run under `root`, newest first. Raises SteerbackError if there is none."""
    from steerback.figures.tables import Table

    rows = [_row(path.parent) for path in sorted(root.glob("*/ledger.sqlite"))]
    if not rows:
        raise SteerbackError(f"no runs in {root}; start one with steerback run, or set their folder with --runs")
    rows.sort(key=lambda row: row[DATE], reverse=True)
    note = "Details: steerback show RUN, steerback view RUN."
    return Table(COLUMNS, rows, note, left=5, minor=("targets", "date", "of"))


def _row(folder: Path) -> tuple[str, ...]:
    date = "?"
    try:
        date = str(_read(folder / "manifest.json").get("written", "?"))[:16].replace("T", " ")
        with Run.read(folder) as opened:
            config, (planned, done) = opened.config, opened.ledger.progress()
        summary = _read(folder / "summary.json")
    except SteerbackError:  # `steerback show` prints the reason
        return (folder.name, "?", "?", date, "unreadable", "-", "-")
    state = f"stopped, {done:,} of {planned:,}" if not summary else "finished"
    rate, condition = next(_rates(summary), ("-", "-"))
    return (folder.name, config.experiment, ", ".join(config.targets), date, state, rate, condition)


def _rates(summary: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (multi-attempt rate with interval, target and condition) for the usual conditions of a summary."""
    from steerback.figures.tables import show
    from steerback.metrics import Estimate

    for name, target in _table(summary.get("targets")).items():
        conditions = _table(_table(target).get("conditions"))
        for condition in filter(conditions.__contains__, USUAL):
            rate = _table(_table(_table(conditions[condition]).get("headline")).get("multi_attempt_rate"))
            ends = [x if isinstance(x := rate.get(end), float | int) else None for end in ("value", "low", "high")]
            yield show(Estimate(ends[0], ends[1], ends[2], 0, ""), rate=True), f"{name}, {condition}"


def _read(file: Path) -> Mapping[str, object]:
    """Return the content of a JSON file, or an empty mapping if it is missing."""
    return _table(read_json_table(file, file.name)) if file.is_file() else {}


def _table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
