"""Two runs compared: one table of all metrics, and the same as text for a narrow terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from steerback.analysis.two_runs import TwoRuns
from steerback.figures.tables import HEADINGS, RATE, SHOWN, Table, degraded_reading, number, p_value, show
from steerback.metrics import METRICS, Comparison, Estimate, Summary, TwoSampleTest
from steerback.metrics.paired import PairedTest


def runs_table(found: TwoRuns, judge: str) -> Table:
    """Return one row for each compared condition and metric: rates of both runs, difference b - a, p, effect size."""
    cells, records = [], []
    for name, (a, b) in found.rates.items():
        for metric in SHOWN:
            test, rate = _tests(found, name).get(metric), METRICS[metric].rate
            cells.append((name, HEADINGS[metric], show(a[metric], rate), show(b[metric], rate), *_difference(test)))
            records.append(
                {"comparison": name, "judge": judge, "metric": metric, "paired": name in found.pairs}
                | _own("run_a", a[metric])
                | _own("run_b", b[metric])
                | _counts(found.pairs.get(name))
                | (_floors(found.floors[name]) if metric == RATE else {})
                | ({} if test is None else vars(test))
            )
    return Table(
        ("comparison", "metric", "a", "b", "b - a", "p (Holm)", "d"), cells, _caption(found, judge), records, left=2
    )


def runs_text(found: TwoRuns, judge: str, width: int = 80) -> str:
    """Return the comparison as two blocks for each condition: rates of both runs, then differences."""
    lines: list[str] = []
    for name, (a, b) in found.rates.items():
        lines += [Table((name, "a", "b"), [*_rates(a, b, found.floors[name])]).text(width)]
        pairs = found.pairs.get(name)
        title = f"{pairs.pairs:,} pairs" if pairs else "not paired"
        tests = [(HEADINGS[metric], *_difference(test)) for metric, test in _tests(found, name).items()]
        lines += [Table((title, "b - a", "p (Holm)", "d"), tests).text(width)]
    return "\n".join([*lines, *textwrap.wrap(_caption(found, judge), width), ""])


def _tests(found: TwoRuns, name: str) -> dict[str, PairedTest] | dict[str, TwoSampleTest]:
    return found.pairs[name].tests if name in found.pairs else found.samples[name]


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
    gap = show(Estimate(test.difference, test.low, test.high, 0, ""), METRICS[test.metric].rate, sign=True)
    d = test.cohens_d if isinstance(test, PairedTest) else None
    return gap, p_value(test.p_holm), "-" if d is None else number(d, sign=True, digits=2)


def _own(name: str, estimate: Estimate) -> dict[str, object]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high, f"{name}_n": estimate.n}


def _floors(floors: tuple[Summary | None, Summary | None]) -> dict[str, object]:
    named = zip(("floor_a", "floor_b"), floors, strict=True)
    return {key: value for name, floor in named if floor is not None for key, value in _own(name, floor[RATE]).items()}


def _counts(pairs: Comparison | None) -> dict[str, object]:
    if pairs is None:
        return {}
    return {"pairs": pairs.pairs, **{f"dropped_{reason}": n for reason, n in pairs.dropped.items()}}


def _caption(found: TwoRuns, judge: str) -> str:
    paired = "Paired by prompt, seed and latent: p from swaps within latents, d over latents." if found.pairs else ""
    apart = "Not paired: p from exchanging latents between the runs." if found.samples else ""
    floor = (
        "floor: restarts that the judge sees in unsteered responses." if any(map(any, found.floors.values())) else ""
    )
    reading = degraded_reading(s for both in found.rates.values() for s in both)
    return " ".join(
        part
        for part in (
            f"Gated, {reading}; 95 % intervals clustered by latent; rates over each run's own valid responses.",
            floor,
            paired,
            apart,
            f"p after Holm over the conditions. Judge: {judge}.",
        )
        if part
    )
