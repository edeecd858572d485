"""Two runs compared: one table of all metrics, and the same as text for a narrow terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from steerback.analysis.two_runs import TwoRuns
from steerback.figures.tables import (
    HEADINGS,
    RATE,
    SHOWN,
    Table,
    degraded_reading,
    number,
    p_value,
    show,
    show_difference,
)
from steerback.metrics import METRICS, Estimate, Summary, TwoSampleTest
from steerback.metrics.paired import PairedTest


def runs_table(compared: TwoRuns, judge: str) -> Table:
    """Return one row per compared condition and metric: rates of both runs, difference b - a, p, effect size."""
    cells, records = [], []
    for name, (a, b) in compared.rates.items():
        pairs = compared.pairs.get(name)
        dropped = {} if pairs is None else {f"dropped_{reason}": n for reason, n in pairs.dropped.items()}
        counts = {} if pairs is None else {"pairs": pairs.pairs, **dropped}
        for metric in SHOWN:
            test, rate = _tests(compared, name).get(metric), METRICS[metric].rate
            cells.append((name, HEADINGS[metric], show(a[metric], rate), show(b[metric], rate), *_difference(test)))
            records.append(
                {"comparison": name, "judge": judge, "metric": metric, "paired": name in compared.pairs}
                | _run_numbers("run_a", a[metric])
                | _run_numbers("run_b", b[metric])
                | counts
                | (_floors(compared.floors[name]) if metric == RATE else {})
                | ({} if test is None else vars(test))
            )
    return Table(
        ("comparison", "metric", "a", "b", "b - a", "p (Holm)", "d"), cells, _caption(compared, judge), records, left=2
    )


def runs_text(compared: TwoRuns, judge: str, width: int = 80) -> str:
    """Return the comparison as two blocks per condition: rates of both runs, then differences."""
    lines: list[str] = []
    for name, (a, b) in compared.rates.items():
        lines += [Table((name, "a", "b"), [*_rates(a, b, compared.floors[name])]).text(width)]
        pairs = compared.pairs.get(name)
        title = f"{pairs.pairs:,} pairs" if pairs else "not paired"
        tests = [(HEADINGS[metric], *_difference(test)) for metric, test in _tests(compared, name).items()]
        lines += [Table((title, "b - a", "p (Holm)", "d"), tests).text(width)]
    return "\n".join([*lines, *textwrap.wrap(_caption(compared, judge), width), ""])


def _tests(compared: TwoRuns, name: str) -> dict[str, PairedTest] | dict[str, TwoSampleTest]:
    return compared.pairs[name].tests if name in compared.pairs else compared.samples[name]


def _rates(a: Summary, b: Summary, floors: tuple[Summary | None, Summary | None]) -> Iterator[tuple[str, str, str]]:
    for metric in SHOWN:
        rate = METRICS[metric].rate
        yield HEADINGS[metric], show(a[metric], rate), show(b[metric], rate)
        if metric == RATE and any(floors):
            first, second = ("-" if floor is None else show(floor[RATE], rate) for floor in floors)
            yield HEADINGS["floor"], first, second
    yield "n", f"{a['msi'].n:,}", f"{b['msi'].n:,}"
    for count in ("cut", "degraded", "unscored", "invalid", "empty"):
        if a.counts.get(count) or b.counts.get(count):
            yield count, str(a.counts.get(count, "?")), str(b.counts.get(count, "?"))


def _difference(test: PairedTest | TwoSampleTest | None) -> tuple[str, str, str]:
    """Return difference with interval, p after Holm, and Cohen's d as text."""
    if test is None:
        return "-", "-", "-"
    gap = show_difference(test, METRICS[test.metric].rate)
    d = test.cohens_d if isinstance(test, PairedTest) else None
    return gap, p_value(test.p_holm), "-" if d is None else number(d, sign=True, digits=2)


def _run_numbers(name: str, estimate: Estimate) -> dict[str, object]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high, f"{name}_n": estimate.n}


def _floors(floors: tuple[Summary | None, Summary | None]) -> dict[str, object]:
    named = zip(("floor_a", "floor_b"), floors, strict=True)
    return {
        key: value
        for name, floor in named
        if floor is not None
        for key, value in _run_numbers(name, floor[RATE]).items()
    }


def _caption(compared: TwoRuns, judge: str) -> str:
    paired = "Paired by prompt, seed and latent: p from swaps within latents, d over latents." if compared.pairs else ""
    apart = "Not paired: p from exchanging latents between the runs." if compared.samples else ""
    floor = (
        "floor: multi-attempt rate of the judge on unsteered responses."
        if any(map(any, compared.floors.values()))
        else ""
    )
    reading = degraded_reading(s for both in compared.rates.values() for s in both)
    return " ".join(
        part
        for part in (
            f"Gated, {reading}; 95 % intervals clustered by latent; rates over the valid responses of each run.",
            floor,
            paired,
            apart,
            f"p: Holm-corrected over the conditions. Judge: {judge}.",
        )
        if part
    )
