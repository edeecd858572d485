"""Tables: unrounded numbers equal the estimates, untrusted names are escaped, lines fit the width."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.figures.tables import Table, comparison_table, escape, number, show, summary_table
from steerback.metrics import METRICS, VARIANTS, Estimate, compare, correct
from test_figures import CASES, outcomes

SUMMARIES = {name: found[1] for name, found in CASES["usual"].items()}


def test_csv_holds_every_number_unrounded() -> None:
    rows = list(csv.DictReader(io.StringIO(summary_table(SUMMARIES, judge="offline").csv())))
    assert [(r["target"], r["variant"]) for r in rows] == [(t, v) for t in SUMMARIES for v in VARIANTS]
    for row in rows:
        estimates = getattr(SUMMARIES[row["target"]], row["variant"])
        assert row["judge"] == "offline"
        for m in METRICS:
            for field in ("value", "low", "high"):
                expected = getattr(estimates[m], field)
                text = row[f"{m}_{field}"]
                assert text == "" if expected is None else float(text) == expected


def test_text_fits_or_is_turned_on_its_side_and_keeps_every_cell() -> None:
    table = summary_table(SUMMARIES, judge="offline")
    for width in (60, 110, 400):
        text = table.text(width)
        assert max(map(len, text.splitlines())) <= max(width, 60)
        assert all(cell in text for row in table.shown.to_numpy() for cell in row)
    assert table.text(400).splitlines()[0].startswith("target")


WORD = st.text("abcdefghij", min_size=1, max_size=10)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_text_never_exceeds_the_width_and_loses_only_minor_columns(data: st.DataObject) -> None:
    columns = data.draw(st.lists(WORD, min_size=2, max_size=9, unique=True))
    cell = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
    rows = data.draw(st.lists(st.tuples(*[cell] * len(columns)), min_size=1, max_size=12))
    minor = data.draw(st.lists(st.sampled_from(columns[1:]), max_size=3, unique=True))
    width = data.draw(st.integers(40, 120))
    text = Table(columns, rows, "A caption.", left=data.draw(st.integers(1, 2)), minor=minor).text(width)
    assert max(map(len, text.splitlines())) <= width
    dropped = text.replace("\n", " ").partition("Not shown here: ")[2].removesuffix(". ").split("; ")
    assert set(dropped) - {""} <= set(minor)
    letters = "".join(text.split())
    for row in rows:
        for name, value in zip(columns, row, strict=True):
            assert name in dropped or all(word in letters for word in value.split())


def test_what_does_not_fit_is_grouped_then_loses_minor_columns() -> None:
    rows = [("the first comparison", m, "1.00 [0.50, 1.50]", "0.5") for m in ("rate", "gain")] * 3
    table = Table(("comparison", "metric", "difference", "d"), rows, left=2, minor=("d",))
    assert table.text(60).splitlines()[0].split() == ["comparison", "metric", "difference", "d"]
    assert table.text(34).splitlines()[2:4] == ["the first comparison", "  rate    1.00 [0.50, 1.50]  0.5"]
    assert table.text(30).splitlines()[3] == "  rate    1.00 [0.50, 1.50]"
    assert "Not shown here: d." in table.text(30)


def test_an_interval_stays_on_one_line_when_cells_are_broken() -> None:
    table = Table(("quantity", "value"), [("a rate with a very long name of its own", "36.7 [13.6, 65.4]")])
    assert "36.7 [13.6, 65.4]" in table.text(40)


def test_conditions_get_a_column_of_their_own() -> None:
    table = summary_table({(t, "base_line"): s for t, s in SUMMARIES.items()}, judge="x")
    assert list(table.shown.columns[:3]) == ["target", "condition", "n"]
    assert table.left == 2
    assert "base\\_line" in table.latex()


def test_the_other_reading_of_degraded_responses_has_no_corrected_rate() -> None:
    summary = replace(SUMMARIES["organism"], counts={**SUMMARIES["organism"].counts, "degraded": 3})
    table = summary_table({"a": summary}, "x", corrected={"a": {"esr_rate": Estimate(0.1, 0.05, 0.2, 9, "")}})
    headline, other = table.shown[["corrected ESR %", "degraded"]].to_numpy().tolist()
    assert (headline, other) == (["10.0 [5.0, 20.0]", "3"], ["", ""])


def test_empty_tables() -> None:
    for table in (summary_table({}, judge="x"), comparison_table({}, judge="x"), Table(("a", "b"), ())):
        assert table.text().splitlines()[0].split()[0] in ("target", "comparison", "a")
        assert table.csv().count("\n") == 1
        assert r"\end{tabular}" in table.latex()


def test_csv_keeps_whole_numbers_and_leaves_missing_values_empty() -> None:
    records = [{"name": "a, b", "n": 3, "value": 0.1 + 0.2}, {"name": "c", "n": None, "more": True}]
    table = Table(("name", "n"), [("a, b", "3"), ("c", "-")], records=records)
    assert table.csv() == 'name,n,value,more\n"a, b",3,0.30000000000000004,\nc,,,True\n'
    assert Table(("name", "n"), [("a", "3")]).csv() == "name,n\na,3\n"


def test_latex_and_markdown_as_papers_use_them() -> None:
    table = Table(("name", "n"), [("a_b", "3"), ("c|d", "1")], "100 % of it")
    assert table.latex() == (
        "\\begin{table}\n\\centering\\small\n\\caption{100 \\% of it}\n\\begin{tabular}{lr}\n\\toprule\n"
        "name & n \\\\\n\\midrule\na\\_b & 3 \\\\\nc|d & 1 \\\\\n\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )
    assert table.markdown() == "| name | n |\n| --- | --: |\n| a_b | 3 |\n| c\\|d | 1 |\n\n100 % of it\n"


def test_latex_and_spreadsheets_cannot_be_broken_by_names() -> None:
    nasty = "50% of_{x} & \\input{y} #1 ~^ <b>\n$"
    assert escape(nasty) == (
        r"50\% of\_\{x\} \& \textbackslash{}input\{y\} \#1 \textasciitilde{}\textasciicircum{} "
        r"\textless{}b\textgreater{} \$"
    )
    table = summary_table({"=cmd()": SUMMARIES["organism"]}, judge="x")
    assert "\n'=cmd()," in table.csv()


@pytest.mark.parametrize(
    ("estimate", "rate", "expected"),
    [
        (Estimate(0.0741, 0.051, 0.0994, 9, ""), True, "7.4 [5.1, 9.9]"),
        (Estimate(0.0, 0.0, 0.0097, 9, ""), True, "0.00 [0.00, 0.97]"),
        (Estimate(0.002, 0.0004, 0.01, 9, ""), True, "0.20 [0.04, 1.00]"),
        (Estimate(None, None, None, 0, ""), True, "-"),
        (Estimate(12.34, None, None, 9, ""), False, "12.3 [?]"),
        (Estimate(1.234, 1.0, None, 9, ""), False, "1.23 [1.00, ?]"),
        (Estimate(-0.001, -1, 1, 9, ""), False, "0.00 [-1.00, 1.00]"),
    ],
)
def test_show(estimate, rate, expected) -> None:
    assert show(estimate, rate) == expected


def test_signs_are_shown_in_differences() -> None:
    assert number(0.05, rate=True, sign=True) == "+5.0"
    assert number(-3.0, sign=True) == "-3.00"


def test_comparisons() -> None:
    a, b = outcomes(200, 10, 0.1)[0], outcomes(200, 10, 0.5, seed=1)[0]
    found = correct({"b against a": compare(a, b, draws=200), "a against a": compare(a, a)})
    table = comparison_table(found, judge="offline")
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert len(rows) == len(table.shown) == 12
    assert float(rows[0]["difference"]) == found["b against a"]["multi_attempt_rate"].difference
    assert float(rows[0]["p_holm"]) == found["b against a"]["multi_attempt_rate"].p_holm
    assert "b against a" in table.text()
