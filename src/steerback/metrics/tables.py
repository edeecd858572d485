"""Summaries and comparisons as tables: aligned text for the terminal, CSV with every number, LaTeX for papers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from steerback.metrics.paired import Comparison
from steerback.metrics.rates import METRICS, Estimate, Summary

SHOWN = ("multi_attempt_rate", "esr_rate", "improvement_rate", "msi", "mean_attempts", "mean_first")
_COUNTS = ("planned", "valid", "empty", "unscored", "invalid", "degraded")


class Row(NamedTuple):
    """One line of a table: a condition of a target."""

    target: str
    condition: str
    summary: Summary


def text(rows: Sequence[Row], metrics: Sequence[str] = SHOWN) -> str:
    """Aligned columns, one line per row; rates in per cent, every number with its 95 % interval."""
    head = ["target", "condition", "n", *(_heading(m) for m in metrics), "unscored", "invalid"]
    body = [
        [
            r.target,
            r.condition,
            f"{r.summary['msi'].n:,}",
            *(show(m, r.summary[m]) for m in metrics),
            str(r.summary.counts["unscored"]),
            str(r.summary.counts["invalid"]),
        ]
        for r in rows
    ]
    return align([head, *body])


def csv_text(rows: Sequence[Row], variants: Sequence[str] = ("headline", "with_degraded", "ungated")) -> str:
    """One line per row and variant: counts, then value, low, high, n and method of every metric, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = ("value", "low", "high", "n", "events", "clusters", "method")
    writer.writerow(["target", "condition", "variant", *_COUNTS, *(f"{m}_{f}" for m in METRICS for f in fields)])
    for r in rows:
        for variant in variants:
            estimates: dict[str, Estimate] = getattr(r.summary, variant)
            numbers = [getattr(estimates[m], f) for m in METRICS for f in fields]
            names = (_no_formula(r.target), _no_formula(r.condition), variant)
            writer.writerow([*names, *(r.summary.counts[c] for c in _COUNTS), *numbers])
    return out.getvalue()


def latex(rows: Sequence[Row], metrics: Sequence[str] = SHOWN, caption: str = "") -> str:
    """A booktabs table, names and caption escaped."""
    lines = [r"\begin{table}", r"\centering", r"\small"]
    if caption:
        lines.append(rf"\caption{{{escape(caption)}}}")
    lines += [
        rf"\begin{{tabular}}{{llr{'r' * len(metrics)}}}",
        r"\toprule",
        " & ".join(["target", "condition", "$n$", *(escape(_heading(m)) for m in metrics)]) + r" \\",
        r"\midrule",
    ]
    for r in rows:
        cells = [r.target, r.condition, f"{r.summary['msi'].n:,}", *(show(m, r.summary[m]) for m in metrics)]
        lines.append(" & ".join(escape(c) for c in cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def comparison_text(comparisons: dict[str, Comparison], metrics: Sequence[str] = SHOWN) -> str:
    """Aligned differences (b - a) with interval, p and effect size, one line per comparison and metric."""
    head = ["comparison", "pairs", "metric", "a", "b", "b - a", "p", "p (Holm)", "d", "odds ratio"]
    body = []
    for name, comparison in comparisons.items():
        for metric in metrics:
            t = comparison.tests.get(metric)
            if t is None:
                continue
            difference = Estimate(t.difference, t.low, t.high, 0, t.method)
            body.append(
                [
                    name,
                    f"{comparison.pairs:,}",
                    _heading(metric),
                    _number(metric, t.a),
                    _number(metric, t.b),
                    show(metric, difference, sign=True),
                    _p(t.p),
                    _p(t.p_holm),
                    "-" if t.cohens_d is None else f"{t.cohens_d:+.2f}",
                    "-" if t.odds_ratio is None else f"{t.odds_ratio:.2f}",
                ]
            )
    return align([head, *body])


def show(metric: str, estimate: Estimate, sign: bool = False) -> str:
    """`7.4 [5.1, 9.9]`, rates in per cent; `-` where there is no value, `?` for an open end."""
    if estimate.value is None:
        return "-"
    if estimate.low is None and estimate.high is None:
        return f"{_number(metric, estimate.value, sign)} [?]"
    ends = ", ".join("?" if e is None else _number(metric, e, sign) for e in (estimate.low, estimate.high))
    return f"{_number(metric, estimate.value, sign)} [{ends}]"


def align(table: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first two to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
} | {c: "\\" + c for c in "&%$#_{}"}


def escape(value: str) -> str:
    """Text as LaTeX, every special character escaped, line breaks to spaces."""
    return "".join(_SPECIAL.get(c, c) for c in " ".join(value.split()))


def _heading(metric: str) -> str:
    m = METRICS[metric]
    return f"{m.label} (%)" if m.rate else m.label


def _number(metric: str, value: float | None, sign: bool = False) -> str:
    if value is None:
        return "-"
    rate = METRICS[metric].rate
    shown = 100 * value if rate else value
    digits = 2 if metric in ("mean_attempts", "msi") or (rate and 0 < abs(shown) < 1) else 1
    shown = 0.0 if abs(shown) < 0.5 * 10**-digits else shown  # no "-0.0"
    return f"{shown:{'+' if sign else ''}.{digits}f}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _no_formula(name: str) -> str:
    """A name that a spreadsheet would run as a formula is quoted."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name
