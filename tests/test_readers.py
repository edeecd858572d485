"""Readers of users' files: each defect gives one line that names the file, without hanging or long output."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from steerback import readers
from steerback.config import build_config
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.judging.models import check_address
from steerback.latents.texts import read_texts
from steerback.readers.tables import csv_rows, csv_text

DEEP, LONG = 100_000, 5_000
READERS: dict[str, Callable[[Path, str], object]] = {
    "json": readers.read_json,
    "jsonl": lambda path, what: list(readers.read_json_lines(path, what)),
    "toml": readers.read_toml,
    "yaml": readers.read_yaml,
    "safetensors": readers.read_safetensors_header,
}


def refusal(kind: str, path: Path) -> str:
    with pytest.raises(SteerbackError) as caught:
        READERS[kind](path, "some file")
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    assert str(path) in said
    return said


def header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("json", b"{", "not valid JSON"),
        ("json", b"[" * DEEP, "nested too deeply"),
        ("json", b"[" * 80 + b"]" * 80, "more than 64 levels"),
        ("json", b"[" + b"1" * LONG + b"]", "too many digits"),
        ("json", b"[" + b"1" * 400 + b"]", "more than 1000 bits"),
        ("json", b'{"a": "\\ud800"}', "surrogate"),
        ("json", b'{"\\ud800": 1}', "surrogate"),
        ("json", b'{"a": "\\u0000"}', "NUL"),
        ("json", b'{"a": 1, "a": 2}', "'a' occurs twice"),
        ("json", b"\xff\xfe", "UTF-8"),
        ("json", b"{}\x00", "NUL"),
        ("jsonl", b'{"a": 1}\n\n{"a":', ", line 3 is not valid JSON"),
        ("jsonl", b"1\n" + b"[" * DEEP, ", line 2 is not valid JSON: it is nested too deeply"),
        ("toml", b"a = ", "not valid TOML"),
        ("toml", b"a = " + b"[" * DEEP, "nested too deeply"),
        ("toml", b"a = " + b"1" * LONG, "too many digits"),
        ("toml", b"a = 1\na = 2", "not valid TOML"),
        ("toml", b".".join([b"a"] * DEEP) + b" = 1", "nested too deeply"),
        ("toml", b"a = {b = 1, " + b" . ".join([b'"a"'] * DEEP) + b" = 1}", "nested too deeply"),
        ("toml", b"a = 2020-01-01", "contains a date"),
        ("yaml", b"a: [1", "not valid YAML"),
        ("yaml", b"a: " + b"[" * DEEP, "nested too deeply"),
        ("yaml", b"a: " + b"1" * LONG, "too many digits"),
        ("yaml", b"a: 1\na: 2", "'a' occurs twice"),
        ("yaml", b"a: {b: 1, b: 2}", "'b' occurs twice"),
        ("yaml", b"a: &x [*x]", "levels"),
        ("yaml", b"a: !!binary aGVsbG8=", "tags are not supported"),
        ("yaml", b"a: !" + b"!" * DEEP, "tags are not supported"),
        ("yaml", b"a: *" + b"x" * DEEP, "not valid YAML"),
        ("yaml", b"a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("yaml", b'"a": "\\ud800"', "surrogate"),
        ("yaml", b"- 1", "must contain"),
        ("safetensors", b"", "not valid JSON"),
        ("safetensors", header(b"{}", 3), "is missing"),
        ("safetensors", header(b"{}", 2**60), "is missing"),
        ("safetensors", header(b"[]"), "must contain an object"),
        ("safetensors", header(b"[" * DEEP), "nested too deeply"),
        ("safetensors", header(b'{"a": "\xff"}'), "UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_defect_is_one_line(tmp_path: Path, kind: str, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert words in refusal(kind, path)


@pytest.mark.parametrize(
    ("kind", "lines", "words"),
    [
        ("yaml", ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]" for n in range(1, 12))], "100,000 values"),
        ("yaml", ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{f'*a{n - 1},' * 9}]}}" for n in range(1, 12))], "values"),
        ("yaml", ["- " + "1:" * 2**18 + "1"], "must contain"),
        ("yaml", [f"k{n}: 1" for n in range(20_000)] + ["k0: 1"], "'k0' occurs twice"),
        ("json", ["{", *(f'"k{n}": 1,' for n in range(50_000)), '"k49999": 1}'], "'k49999' occurs twice"),
    ],
    ids=["aliases", "merges", "times", "keys", "JSON keys"],
)
def test_what_multiplies_is_refused_at_once(tmp_path: Path, kind: str, lines: list[str], words: str) -> None:
    path = tmp_path / "file"
    path.write_text("\n".join(lines))
    began = time.process_time()
    assert words in refusal(kind, path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("kind", READERS)
def test_a_place_that_is_no_file_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x").write_text("")
    for place in ("none", "x/below", "n" * 300, "."):
        refusal(kind, tmp_path / place)
    with pytest.raises(SteerbackError, match=r"some file .*[Nn](UL|ull)"):
        READERS[kind](Path("a\0b"), "some file")


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(SteerbackError, match="larger than the limit of 1,000 bytes"):
        readers.read_text(Path("/dev/zero"), "some file", 1000)


def test_a_pipe_is_read_and_one_that_nobody_writes_to_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text("n_latents: 7\n"))
    writer.start()
    assert build_config("esr", ("t",), file=fifo).n_latents == 7
    writer.join()
    monkeypatch.setattr(readers, "PATIENCE", 0.2)
    with pytest.raises(SteerbackError, match=r"is a pipe without data for 0.2 seconds"):
        build_config("esr", ("t",), file=fifo)


def test_a_byte_order_mark_belongs_to_no_prompt_key_or_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("# ours\nHow do kites fly?\n", encoding="utf-8-sig")
    assert load_prompts(str(path)) == ("How do kites fly?",)
    assert read_texts(path) == ("How do kites fly?",)
    for kind, text, value in (("json", '{"a": 1}', {"a": 1}), ("toml", "a = 1", {"a": 1}), ("yaml", "a: 1", {"a": 1})):
        path.write_text(text, encoding="utf-8-sig")
        assert READERS[kind](path, "some file") == value


def test_long_prompt_lists_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("".join(f"Explain how number {n} is written.\n" for n in range(50_000)))
    began = time.monotonic()
    assert len(load_prompts(str(path))) == 50_000
    assert time.monotonic() - began < 3


def test_numbers_and_words_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(
        "a: 1e-4\nb: no\nc: 2020-01-01\nd: .inf\ne: 1_0\nf: true\ng: -.5\nh: 3\ni: 1.2.3\nj: e5\nk: .\nl: 12:30\n"
    )
    assert readers.read_yaml(path, "x") == {
        "a": 1e-4,
        "b": "no",
        "c": "2020-01-01",
        "d": float("inf"),
        "e": 10,
        "f": True,
        "g": -0.5,
        "h": 3,
        "i": "1.2.3",
        "j": "e5",
        "k": ".",
        "l": "12:30",
    }


# PyYAML writes the text 1E5 without quotes, as YAML 1.1 reads it; read as YAML 1.2 it is a number.
def no_number(longest: int | None = None) -> st.SearchStrategy[str]:
    number = re.compile(r"\s*[-+]?[0-9._]*[eE][-+]?[0-9]+\s*")
    return st.text(max_size=longest).filter(lambda text: number.fullmatch(text) is None)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | no_number().map(str.strip),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(no_number(5), inner, max_size=4),
    max_leaves=20,
).filter(lambda value: "\\u0000" not in json.dumps(value))


@given(plain)
def test_what_is_written_is_read_again(value: readers.Json) -> None:
    assert readers.parse_json(json.dumps(value), "x") == value
    assert readers.parse_json(json.dumps(value, ensure_ascii=False), "x") == value
    assert readers.parse_yaml(yaml.safe_dump(value, allow_unicode=False), "x") == value


@given(st.text(alphabet="{}[]\",:&*!|>-#\n \t01ea\\u.'", max_size=60))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for parse in (readers.parse_json, readers.parse_yaml):
        said = ""
        try:
            parse(text, "x")
        except SteerbackError as refused:
            said = str(refused)
        assert "\n" not in said


cells = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
cells |= st.builds(
    "{}{}".format, st.sampled_from(["=", "+", "-", "@", "\t", "\r", "\n", "'", "''=", "'-", "\uff1d"]), cells
)


@given(st.lists(st.lists(cells, min_size=3, max_size=3), max_size=5))
def test_cells_of_a_table_are_no_formulas_and_are_read_back_unchanged(rows: list[list[str]]) -> None:
    names = ["=name", "b", "'c"]
    text = csv_text(names, rows)
    assert [list(row.values()) for _, row in csv_rows(text, "x", names)] == rows
    for row in csv.reader(io.StringIO(text, newline="")):  # as a spreadsheet reads it
        for cell in row:
            assert not cell.startswith(("=", "@", "\t", "\r", "\n", "\uff1d"))
            assert cell[:1] not in ("+", "-") or cell == "-" or float(cell) is not None


@given(st.lists(st.one_of(cells, st.integers(), st.floats(), st.booleans(), st.none()), min_size=1, max_size=4))
def test_cells_are_quoted_as_by_the_csv_module(row: list[object]) -> None:
    plain = csv_text(["x"], [row]).removeprefix("x\n")
    (read,) = csv.reader(io.StringIO(plain, newline=""))
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\r\n").writerow(read)
    assert plain == out.getvalue().removesuffix("\r\n") + "\n"


def test_numbers_and_missing_values_of_a_table() -> None:
    text = csv_text(["a", "b"], [[-1.5, float("nan")], [None, "-2"], ["+3e5", True], ["--1", "-inf"]])
    assert text == "a,b\n-1.5,\n,-2\n+3e5,True\n'--1,'-inf\n"
    with pytest.raises(SteerbackError, match="table t: needs the columns a and c, has a, b"):
        list(csv_rows(text, "table t", ("a", "c")))
    with pytest.raises(SteerbackError, match="table t is not a readable table"):
        list(csv_rows('a\n"x', "table t"))
    long = "x" * 300_000
    assert [row for _, row in csv_rows(csv_text(["a"], [[long]]), "t")] == [{"a": long}]


@pytest.mark.parametrize("text", ["http://[::1/", "http://", "ftp://x/y", "http://a:99999/", "http://a b/", "x", ""])
def test_a_malformed_address_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteerbackError, match=r"some place: .* is not an address") as caught:
        readers.read_address(text, "some place")
    assert "\n" not in str(caught.value)
    if text:
        monkeypatch.setenv("OPENROUTER_BASE_URL", text)
        with pytest.raises(SteerbackError, match=r"judge openrouter/a/b, OPENROUTER_BASE_URL: .* is not an address"):
            check_address("openrouter/a/b", None)
    assert readers.read_address("http://[::1]:8000/v1", "x").hostname == "::1"


def test_readers_load_nothing_heavy() -> None:
    code = "import sys, steerback.readers\nassert not {'numpy', 'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
