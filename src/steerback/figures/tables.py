"""Tables as aligned text for the terminal, CSV with all numbers, Markdown, and LaTeX for papers.

Tables show estimates and comparisons, and do not depend on ledgers or experiments.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from steerback.errors import visible
from steerback.metrics import METRICS, VARIANTS, Comparison, Estimate, Summary
from steerback.metrics.between import TwoSampleTest
from steerback.metrics.paired import PairedTest
from steerback.metrics.regions import RegionTest
from steerback.readers.tables import csv_text

if TYPE_CHECKING:
    import pandas as pd

    from steerback.analysis.floor import Floor

T = TypeVar("T")
SHOWN = ("multi_attempt_rate", "esr_rate", "improvement_rate", "msi", "mean_attempts", "mean_first")
HEADINGS = {
    "multi_attempt_rate": "multi-attempt %",
    "esr_rate": "ESR %",
    "improvement_rate": "improved %",
    "msi": "MSI",
    "msi_multi": "MSI of multi",
    "mean_attempts": "attempts",
    "mean_first": "first score",
    "degraded_share": "degraded %",
    "floor": "floor %",
}
COUNTED = ("cut", "degraded", "unscored", "invalid", "empty")
"""Counts that are columns if one of them is not 0."""
RATE = "multi_attempt_rate"
"""Rate whose column the floor's column follows."""


class Table:
    """Table in two forms: `shown` with the text for people, `numbers` with the unrounded values of the CSV.

    Both are DataFrames of objects, made on demand, because importing pandas takes half of a short command. The first
    `left` columns of `shown` are names, aligned to the left; the others are numbers, aligned to the right. Without
    `records`, the CSV contains the text. If the text would be too wide, `minor` columns are left out, the last one
    first.
    """

    def __init__(
        self,
        columns: Sequence[str],
        cells: Sequence[Sequence[str]],
        caption: str = "",
        records: Sequence[Mapping[str, object]] = (),
        left: int = 1,
        minor: Sequence[str] = (),
    ) -> None:
        self.columns, self.cells, self.records = [*columns], [[*row] for row in cells], [*records]
        self.caption, self.left, self.minor = caption, left, tuple(minor)

    @functools.cached_property
    def shown(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.cells, columns=self.columns, dtype=object)

    @functools.cached_property
    def numbers(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(self.records, dtype=object) if self.records else self.shown

    def text(self, width: int = 110) -> str:
        """Return aligned columns with the caption below, in the first form that fits into `width` characters.

        Forms: one line per row; transposed; grouped by name, without minor columns; cells on several lines; transposed
        in parts.
        """
        lines, dropped = next(form for form in self._forms(width) if _wide(form[0]) <= width or form[0] == [])
        if not lines:
            lines = _turned(self._rows(), width)
        note = f"Not shown here: {'; '.join(dropped)}." if dropped else ""
        return "\n".join([*lines, *textwrap.wrap(" ".join(filter(None, (visible(self.caption), note))), width)]) + "\n"

    def _rows(self, without: Sequence[str] = ()) -> list[list[str]]:
        kept = [i for i, column in enumerate(self.columns) if column not in without]
        return [[row[i] for i in kept] for row in (self.columns, *self.cells)]

    def _forms(self, width: int) -> Iterator[tuple[list[str], tuple[str, ...]]]:
        """Yield (lines, omitted columns); the last entry has no lines and means that the table must be transposed in
        parts.
        """
        rows = self._rows()
        yield _align(rows, self.left), ()
        if len(rows) > 1 and not self.minor:
            yield _align([*zip(*rows, strict=True)], 1), ()
        repeats = self.left > 1 and len({row[0] for row in rows[1:]}) <= len(rows[1:]) // 2
        if repeats:
            yield _grouped(rows, self.left), ()
        for kept in range(len(self.minor) - 1, -1, -1):
            dropped = self.minor[kept:]
            less = self._rows(dropped)
            yield _align(less, self.left), dropped
            if repeats:
                yield _grouped(less, self.left), dropped
        if len(rows) > 1 and self.minor:
            yield _align([*zip(*rows, strict=True)], 1), ()
        if len(rows) > FEW or len(rows[0]) <= 3:
            yield _align(_narrowed(self._rows(self.minor), width), self.left), self.minor
        yield [], ()

    def csv(self) -> str:
        """Return comma-separated values with a header line; missing values are empty."""
        return csv_text([*self.numbers.columns], self.numbers.to_numpy().tolist())

    def json(self) -> str:
        """Return a JSON list with one object per row and the columns of the CSV; missing values are null."""
        records = json.loads(self.numbers.to_json(orient="records", double_precision=15))
        return json.dumps(records, indent=1, ensure_ascii=False) + "\n"

    def markdown(self) -> str:
        """Return a pipe table with the caption below."""
        rows = [self.columns, ["---"] * self.left + ["--:"] * (len(self.columns) - self.left), *self.cells]
        lines = ["| " + " | ".join(" ".join(c.split()).replace("|", r"\|") for c in row) + " |" for row in rows]
        return "\n".join([*lines, *(["", self.caption] if self.caption else [])]) + "\n"

    def __repr__(self) -> str:
        return f"<table of {len(self.cells)} rows: {', '.join(self.columns)}>"

    def _repr_html_(self) -> str:
        """Return HTML for notebooks; names, cells and caption are escaped."""
        return f"{self.shown.to_html(index=False)}<p><small>{html.escape(self.caption)}</small></p>"

    def latex(self) -> str:
        """Return a booktabs table; names, cells and caption are escaped."""
        escaped = self.shown.map(escape).rename(columns=escape)
        written = escaped.style.hide(axis="index").to_latex(
            hrules=True,
            column_format="l" * self.left + "r" * (len(self.columns) - self.left),
            caption=escape(self.caption) or None,
            position_float="centering",
        )
        return str(written).replace(r"\centering", r"\centering\small", 1)


def summary_table(
    summaries: Mapping[str, Summary] | Mapping[tuple[str, str], Summary],
    judge: str,
    corrected: Mapping[str | tuple[str, str], Mapping[str, Estimate]] | None = None,
    floors: Mapping[str | tuple[str, str], Floor] | None = None,
    note: str = "",
) -> Table:
    """Return one row per target, or per (target, condition): headline metrics as text, all variants in the CSV.

    `corrected` contains rates corrected with human labels, and `floors` the judge's floor, both with the keys of
    `summaries`. Empty `floors` mean that the floor was not measured, which the caption says. `note` ends the caption.
    """
    named, true, below = _by_names(summaries), _by_names(corrected), _by_names(floors)
    left = max(map(len, named), default=1)
    names = ("target", "condition")[:left]
    counted = [c for c in COUNTED if any(s.counts.get(c) for s in named.values())]
    known = list(dict.fromkeys(m for rates in true.values() for m in rates))
    columns = [column for m in SHOWN for column in ((m, "floor") if below and m == RATE else (m,))]
    cells: list[tuple[str, ...]] = []
    for key, s in named.items():
        rates = s.headline | ({"floor": below[key][RATE]} if key in below else {})
        counts = (f"{s.counts[c]:,}" if c in s.counts else "?" for c in counted)
        cells.append((*key, f"{s['msi'].n:,}", *_shown(rates, columns), *_shown(true.get(key, {}), known), *counts))
        if s.counts["degraded"]:
            head = (*[""] * (left - 1), f"  {'without' if s.include_degraded else 'with'} degraded")
            rest = [""] * len([*known, *counted])
            cells.append((*head, f"{s.other['msi'].n:,}", *_shown(s.other, columns, missing=""), *rest))
    records = [
        dict(zip(names, key, strict=True)) | {"judge": judge} | numbers
        for key, s in named.items()
        for numbers in _numbers(s, true.get(key, {}), below.get(key), bool(below))
    ]
    caption = (
        f"Gated, {degraded_reading(named.values())}; 95 % intervals clustered by latent. Judge: {judge}. "
        "MSI: mean gain in points of the last attempt over the first, 0 for single attempts."
        + _notes("cut" in counted, bool(known), None if floors is None else below, note)
    )
    headings = (*names, "n", *(HEADINGS[m] for m in columns), *(f"corrected {HEADINGS[m]}" for m in known), *counted)
    return Table(headings, cells, caption, records, left)


def degraded_reading(summaries: Iterable[Summary]) -> str:
    """Return `with degraded responses` or `without degraded responses`, as the summaries' headline counts them."""
    included = {s.include_degraded for s in summaries}
    return "without degraded responses" if included == {False} else "with degraded responses"


def _by_names(values: Mapping[Any, T] | None) -> dict[tuple[str, ...], T]:
    """Return values by (target,) or (target, condition)."""
    return {(key,) if isinstance(key, str) else tuple(key): value for key, value in (values or {}).items()}


def _shown(estimates: Mapping[str, Estimate], columns: Sequence[str], missing: str = "-") -> list[str]:
    """Return the estimates of some metrics, or of the floor (a rate), as text."""
    rates = [metric not in METRICS or METRICS[metric].rate for metric in columns]
    return [show(estimates[m], rate) if m in estimates else missing for m, rate in zip(columns, rates, strict=True)]


def _numbers(
    summary: Summary, corrected: Mapping[str, Estimate], floor: Floor | None, measured: bool
) -> Iterator[dict[str, object]]:
    """Yield the numbers of each variant; corrected rates and the floor, if any was measured, belong to the headline."""
    ends = ("value", "low", "high", "n", "events")
    for variant in VARIANTS:
        estimates: Mapping[str, Estimate] = getattr(summary, variant)
        row = {"variant": variant, **summary.counts}
        row |= {f"{m}_{f}": getattr(estimates[m], f) for m in METRICS for f in (*ends, "clusters", "method")}
        first = variant == "headline"
        row |= {f"corrected_{m}_{f}": getattr(e, f) if first else None for m, e in corrected.items() for f in ends[:3]}
        below, rates = floor if first else None, (RATE, "esr_rate") if measured else ()
        row |= {f"floor_{m}_{f}": None if below is None else getattr(below[m], f) for m in rates for f in ends}
        yield row | {f"{m}_above_floor_p": None if below is None else below.p[m] for m in rates}


def _notes(cut: bool, corrected: bool, floors: Mapping[tuple[str, ...], Floor] | None, note: str) -> str:
    before = " cut: stopped by the length limit, so the last attempt may be incomplete." * cut
    before += " Corrected: for the judge's errors, with human labels." * corrected
    note = f" {note}" if note else ""
    if floors is None:
        return before + note
    if not floors:
        return f"{before} The judge's floor was not measured (floor_responses is 0, or nothing was generated).{note}"
    sizes = sorted({floor[RATE].n for floor in floors.values()})
    counted = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    return (
        f"{before} floor: share of multi-attempt verdicts of this judge among {counted} unsteered responses of the "
        f"same target, interval clustered by prompt.{note}"
    )


def comparison_table(comparisons: Mapping[str, Comparison], judge: str, metrics: Sequence[str] = SHOWN) -> Table:
    """Return one row per comparison and metric: both values, difference b - a with interval, p values, effect sizes."""
    cells, records = [], []
    for name, comparison in comparisons.items():
        for metric in (m for m in metrics if m in comparison.tests):
            t, rate = comparison.tests[metric], METRICS[metric].rate
            values = (number(t.a, rate), number(t.b, rate), show_difference(t, rate), p_value(t.p), p_value(t.p_holm))
            d = "-" if t.cohens_d is None else f"{t.cohens_d:+.2f}"
            odds = "-" if t.odds_ratio is None else f"{t.odds_ratio:.2f}"
            cells.append((name, HEADINGS[metric], f"{comparison.pairs:,}", *values, d, odds))
            dropped = {f"dropped_{reason}": n for reason, n in comparison.dropped.items()}
            records.append({"comparison": name, "judge": judge, "pairs": comparison.pairs, **dropped, **vars(t)})
    columns = ("comparison", "metric", "pairs", "a", "b", "b - a", "p", "p (Holm)", "d", "odds ratio")
    caption = (
        "Paired by prompt, seed and latent. 95 % intervals clustered by latent. p from swaps within latents; "
        f"d over latents. Judge: {judge}."
    )
    return Table(columns, cells, caption, records, left=2, minor=("p", "a", "b", "pairs", "d", "odds ratio"))


def show(estimate: Estimate, rate: bool, sign: bool = False) -> str:
    """Return an estimate as `7.4 [5.1, 9.9]`, rates in per cent; `-` without a value, `?` for an unknown end."""
    if estimate.value is None:
        return "-"
    digits = _digits(estimate.value, rate)
    value, low, high = (number(x, rate, sign, digits) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [?]" if low == high == "?" else f"{value} [{low}, {high}]"


def show_difference(test: PairedTest | TwoSampleTest | RegionTest, rate: bool) -> str:
    """Return the difference of a test with its interval and a sign."""
    return show(Estimate(test.difference, test.low, test.high, 0, ""), rate, sign=True)


def number(value: float | None, rate: bool = False, sign: bool = False, digits: int | None = None) -> str:
    """Return a number as text, rates in per cent; `?` for None."""
    if value is None:
        return "?"
    digits = _digits(value, rate) if digits is None else digits
    shown = round(100 * value if rate else value, digits) + 0.0  # no "-0.0"
    return f"{shown:{'+' if sign else ''}.{digits}f}"


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def terminal_width() -> int:
    """Return the width of the terminal for printed tables, between 60 and 120; 80 if there is no terminal."""
    return min(max(shutil.get_terminal_size().columns, 60), 120)


FEW = 7
"""Number of lines above which a table is narrowed by breaking its cells before it is transposed in parts."""


def _wide(lines: Sequence[str]) -> int:
    return max(map(len, lines), default=0)


def _align(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return aligned lines with a rule below the first; all but the first `left` columns are right-aligned.

    A cell with line breaks takes several lines.
    """
    rows = [[visible(cell).split("\n") for cell in row] for row in table]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]
    blocks = []
    for row in rows:
        block = []
        for parts in itertools.zip_longest(*row, fillvalue=""):
            cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(parts, widths, strict=True))]
            block.append("  ".join(cells).rstrip())
        blocks.append(block)
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return [*blocks[0], rule, *(line for block in blocks[1:] for line in block)]


def _grouped(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return the lines of a table with the first column as headings above the rows that share it."""
    head, rule, *body = _align([row[1:] for row in rows], left - 1)
    lines, before = [f"  {head}", f"--{rule}"], None
    for row, line in zip(rows[1:], body, strict=True):
        if row[0] != before:
            before = row[0]
            lines.append(visible(before))
        lines.append(f"  {line}")
    return lines


def _narrowed(rows: Sequence[Sequence[str]], width: int) -> list[list[str]]:
    """Return the rows with line breaks in the cells of the widest columns, so that the table fits into `width`."""
    widths = [max(len(visible(cell)) for cell in column) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return [[_broken(cell, most) for cell, most in zip(row, widths, strict=True)] for row in rows]


NARROWEST = 10
"""Fewest characters to which a column is narrowed."""
INTERVAL = re.compile(r" (?=\[)|(?<=,) (?=[^\[]*\])")
"""Spaces inside `7.4 [5.1, 9.9]`."""


def _broken(cell: str, width: int) -> str:
    """Return a cell as lines of at most `width` characters; an interval stays on one line if it fits."""
    joined = INTERVAL.sub("\N{NO-BREAK SPACE}", visible(cell))
    text = joined if max(map(len, joined.split(" ")), default=0) <= width else visible(cell)
    # textwrap breaks only at ASCII white space, so a no-break space keeps an interval together
    return "\n".join(textwrap.wrap(text, width) or [""]).replace("\N{NO-BREAK SPACE}", " ")


def _turned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the lines of a transposed table in parts that fit into `width`, each with the column names."""
    head, *body = rows
    lines: list[str] = []
    while body:
        count = len(body)
        while count > 1 and _wide(_align([*zip(head, *body[:count], strict=True)], 1)) > width:
            count -= 1
        part = [*zip(head, *body[:count], strict=True)]
        if _wide(_align(part, 1)) > width:
            part = [tuple(row) for row in _narrowed(part, width)]
        lines += [*([""] if lines else []), *_align(part, 1)]
        body = body[count:]
    return lines


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {c: "\\" + c for c in "&%$#_{}"}


def escape(value: str) -> str:
    """Return text as LaTeX: special characters are escaped and line breaks become spaces."""
    return "".join(_SPECIAL.get(c, c) for c in " ".join(value.split()))


def _digits(value: float, rate: bool) -> int:
    return 1 if (rate and abs(value) >= 0.01) or abs(value) >= 10 else 2
