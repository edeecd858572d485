"""What an experiment is, and what its analysis gives. It knows the ledger's rows, never an engine or a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from steerback.config import RunConfig
from steerback.ledger import Ledger, Row
from steerback.metrics import Outcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.report.tables import Table
    from steerback.study import Study


@dataclass(frozen=True, slots=True)
class Analysis:
    """What an analysis gives: `summary` goes to summary.json, tables and figures into files of their names.

    `lines` are printed at the end of a run, under the tables.
    """

    summary: Mapping[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    lines: Sequence[str] = ()


class Experiment(Protocol):
    """A plan and an analysis. `options` are the settings (with defaults) that only this experiment knows."""

    name: str
    title: str
    options: Mapping[str, Any]

    def conditions(self, config: RunConfig) -> int:
        """How many conditions it measures, for the estimate before a run."""
        ...

    async def run(self, study: Study) -> None:
        """Plans the trials of one target's conditions and completes them."""
        ...

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Everything the experiment reports, from the ledger alone."""
        ...


def outcomes_of(rows: Sequence[Row]) -> Outcomes:
    """The statistics' input: one entry per planned trial, whatever became of it."""
    return Outcomes.from_rows(
        (
            r.trial.latent,
            r.trial.index,
            r.valid_receipt,
            r.judgement,
            r.completion.text if r.completion else "",
        )
        for r in rows
    )
