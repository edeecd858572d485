"""The presentation of an analysis, and the parts that all experiments share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steerback.figures.tables import Table, comparison_table, summary_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.analysis.base import Measured, Results

PLANTED = "Built-in organisms restart because their training text does (planted): no evidence about other models."


@dataclass(frozen=True, slots=True)
class Presentation:
    """Tables and figures go into files of their names; `lines` are printed at the end of a run, under the tables."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    lines: Sequence[str] = ()


def planted_note(results: Results) -> str:
    """Sentence of a caption where the behaviour of one of the targets is planted."""
    return PLANTED if results.planted else ""


def measured_tables(measured: Measured) -> dict[str, Table]:
    """`table`: every condition; `comparisons`: every paired test, if there are any."""
    several = len({condition for _, condition in measured.summaries}) > 1
    summaries = measured.summaries if several else {target: s for (target, _), s in measured.summaries.items()}
    tables = {"table": summary_table(summaries, judge=measured.judge)}
    if measured.comparisons:
        pairs = {f"{t}: {c} − {measured.against[t, c]}": x for (t, c), x in measured.comparisons.items()}
        tables["comparisons"] = comparison_table(pairs, judge=measured.judge)
    return tables
