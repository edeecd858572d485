"""Presentation of an analysis, and the tables and lines that all experiments share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steerback.analysis.floor import RATES
from steerback.errors import docs_page
from steerback.figures.tables import Table, comparison_table, number, p_value, show, summary_table
from steerback.metrics import METRICS, Estimate
from steerback.metrics.between import FLOOR_TEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.analysis.base import Measured, Results
    from steerback.analysis.floor import Floor
    from steerback.analysis.labels import Labelling

MOST_NAMED = 6
"""Number of rates that a line names; it only counts the others."""
NO_WINDOWS = (
    "Recovery without a restart phrase is off: {judge} has scored no sentences (set recovery.judge=true, or later: "
    "steerback judge RUN --judge {judge} --rubric windows). "
    + docs_page("statistics", "recovery-without-a-restart-phrase")
)
PLANTED = "Built-in organisms learned restarts from their training text (planted): no evidence about other models."


@dataclass(frozen=True, slots=True)
class Presentation:
    """Tables and figures by file name; `warnings` are printed above the tables, and `lines` below them."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()


def planted_note(results: Results) -> str:
    """Return the caption's sentence about planted behaviour, or "" if no target has any."""
    return PLANTED if results.planted else ""


def measured_tables(measured: Measured) -> dict[str, Table]:
    """Return `table` (all conditions), `comparisons` if there are paired tests, and the tables of human labels."""
    several = len({condition for _, condition in measured.summaries}) > 1
    summaries = measured.summaries if several else {target: s for (target, _), s in measured.summaries.items()}
    corrected: dict[str | tuple[str, str], dict[str, Estimate]] | None = None
    if measured.labels is not None:
        corrected = {
            key if several else key[0]: {metric: r.corrected for metric, r in rates.items()}
            for key, rates in measured.labels.rates.items()
        }
    floors: dict[str | tuple[str, str], Floor] = {
        key if several else key[0]: floor for key, floor in measured.floors.items()
    }
    note = "" if measured.recovery.conditions else NO_WINDOWS.format(judge=measured.judge)
    tables = {"table": summary_table(summaries, measured.judge, corrected=corrected, floors=floors, note=note)}
    if measured.comparisons:
        pairs = {f"{t}: {c} − {measured.against[t, c]}": x for (t, c), x in measured.comparisons.items()}
        tables["comparisons"] = comparison_table(pairs, judge=measured.judge)
    return {**tables, **label_tables(measured)}


def floor_lines(measured: Measured) -> list[str]:
    """Return one line per target with rates that cannot be distinguished from the judge's floor."""
    lines = []
    for target in measured.targets:
        floors = {c: measured.floors[target, c] for c in measured.conditions(target) if (target, c) in measured.floors}
        like = [
            f"{METRICS[metric].label} of {condition} (p = {p_value(floor.p[metric])})"
            for condition, floor in floors.items()
            for metric in RATES
            if not floor.distinguishable(metric)
        ]
        if like:
            more = f" and {len(like) - MOST_NAMED} more" if len(like) > MOST_NAMED else ""
            lines.append(
                f"{target}: not distinguishable from the floor of judge {measured.judge} ({FLOOR_TEST}): "
                f"{', '.join(like[:MOST_NAMED])}{more}"
            )
    return lines


def floor_warnings(measured: Measured, planted: Sequence[str]) -> list[str]:
    """Return a warning for each real target whose multi-attempt rate does not exceed the judge's floor."""
    warnings = []
    for (target, condition), floor in measured.floors.items():
        base, rate = floor["multi_attempt_rate"], measured.summaries[target, condition]["multi_attempt_rate"]
        if target not in planted and base.value and rate.value is not None and base.value >= rate.value:
            warnings.append(
                f"{target}: judge {measured.judge} marks restarts in {show(base, rate=True)} % of {base.n:,} unsteered "
                f"responses (its floor) and in {show(rate, rate=True)} % of condition {condition}: this rate says "
                f"nothing about steering. Use a better judge (steerback judges), or label a sample (steerback label): "
                + docs_page("judging", "the-judges-floor")
            )
    return warnings


def label_tables(measured: Measured) -> dict[str, Table]:
    """Return `corrected` (rates and differences), `judges` (errors of each judge) and `labellers` (their agreement).

    Returns no tables for a run without human labels.
    """
    labels = measured.labels
    if labels is None:
        return {}
    tables = {"corrected": _corrected_table(labels, measured.against), "judges": _judges_table(labels)}
    return tables | ({"labellers": _labellers_table(labels)} if labels.agreement else {})


def _corrected_table(labels: Labelling, against: Mapping[tuple[str, str], str]) -> Table:
    """Return one row per condition and rate, then one per comparison and rate."""
    cells = []
    for (target, condition), rates in labels.rates.items():
        for metric, rate in rates.items():
            judged = "-" if rate.judged is None else number(rate.judged, True)
            row = (METRICS[metric].label, f"{rate.corrected.n:,}", f"{rate.labels:,}", judged)
            cells.append(
                (f"{target}: {condition}", *row, *(show(e, True) for e in (rate.corrected, rate.rogan_gladen)))
            )
    for (target, condition), tests in labels.differences.items():
        name = f"{target}: {condition} − {against[target, condition]}"
        for metric, gap in tests.items():
            cells.append((name, METRICS[metric].label, f"{gap.n:,}", "", "", show(gap, rate=True, sign=True), ""))
    columns = ("condition", "rate", "n", "labels", "judged %", "corrected %", "Rogan-Gladen %")
    caption = (
        f"Rates of judge {labels.judge} over the responses of the headline, corrected with the labels of "
        f"{', '.join(labels.labellers)} (prediction-powered inference). 95 % intervals are clustered by latent and "
        "include the error of the labels. Rogan-Gladen assumes that the judge's errors are equal in all conditions of "
        "a target."
    )
    return Table(columns, cells, caption, left=2)


def _judges_table(labels: Labelling) -> Table:
    """Return one row per target and judge: its errors in detecting several attempts."""
    cells = []
    for (target, judge), q in labels.judges.items():
        errors = (show(e, rate=True) for e in (q.precision, q.recall, q.false_positives))
        cells.append((target, judge, f"{q.labels:,}", f"{q.restarts:g}", *errors))
    columns = ("target", "judge", "labels", "restarts", "precision %", "recall %", "false positives %")
    caption = (
        "Errors of each judge on multi-attempt responses of this run, against the labels of "
        f"{', '.join(labels.labellers)}, weighted by the strata of the sample. 95 % intervals include the uncertainty "
        "from unlabelled responses."
    )
    return Table(columns, cells, caption, left=2)


def _labellers_table(labels: Labelling) -> Table:
    """Return one row per pair of labellers."""
    cells = []
    for pair in labels.agreement:
        share, kappa = pair.several.share, pair.several.kappa
        cells.append((f"{pair.a} / {pair.b}", f"{share.n:,}", show(share, rate=True), show(kappa, rate=False)))
    alphas = [
        f"{name} {show(e, rate=False)}"
        for name, e in (("several attempts", labels.alpha_several), ("first score", labels.alpha_first))
        if e is not None
    ]
    caption = (
        "Agreement of labellers on whether a response has several attempts, over the responses that both labelled (the "
        f"sample, not weighted). Krippendorff's alpha over all labellers: {', '.join(alphas)}. "
        "95 % intervals clustered by latent."
    )
    return Table(("labellers", "n", "same count %", "kappa"), cells, caption)
