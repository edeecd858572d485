"""CSV tables: written so that a spreadsheet computes no cell, and read back unchanged.

Spreadsheets compute a cell that begins with `=`, `+`, `-` or `@`, also behind a tab or a line break. Such a text gets
an apostrophe in front, which spreadsheets take for "this is text"; reading removes it. Plain numbers and a single `-`
stay as they are.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain

from steerback.errors import SteerbackError, one_line

_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
COMPUTED = re.compile(rf"'*(?!(?:{_NUMBER}|-)\Z)[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""The beginning of a text that would be computed, behind any number of apostrophes; some forms are full-width."""
_OPENINGS = frozenset("'=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
LONGEST_CELL = 2**30
"""Characters of a cell; Python's limit is 131,072, and a response can be longer."""
_QUOTED = re.compile(r'[",\r\n]')


def safe_cell(value: object) -> str:
    """Return a value as it stands in a CSV file: never a formula, empty where it is missing (None, NaN).

    It is quoted as `csv.writer` quotes, which takes several times as long for a long text.
    """
    if not isinstance(value, str):
        return "" if value is None or value != value else str(value)
    if value[:1] in _OPENINGS and COMPUTED.match(value):
        value = f"'{value}"
    return '"' + value.replace('"', '""') + '"' if _QUOTED.search(value) else value


def plain_cell(text: str) -> str:
    """Return the text that `safe_cell` was given."""
    return text[1:] if text.startswith("'") and COMPUTED.match(text) else text


def csv_lines(header: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield the lines of a CSV file, header first, each with its line feed."""
    for row in chain([header], rows):
        yield (",".join(map(safe_cell, row)) or '""') + "\n"  # an empty line would be no row


def csv_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a whole CSV file."""
    return "".join(csv_lines(header, rows))


def csv_cells(text: str, where: str, separator: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yield (place, cells) of each row of a CSV text that is not empty, the header included."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        rows = [(f"{where}, line {reader.line_num}", cells) for cells in reader if cells]
    except csv.Error as error:
        raise SteerbackError(f"{where} is not a readable table: {error}") from None
    finally:
        csv.field_size_limit(before)
    yield from rows


def csv_rows(
    text: str, where: str, needed: Collection[str] = (), written_here: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, cells by column) of each row; a cell that is missing is empty.

    `written_here`: the table was written by `csv_lines`, whose apostrophes are removed. Those in tables of others
    belong to the text.
    """
    table = csv_cells(text, where)
    plain = plain_cell if written_here else str
    names = [plain(name) for name in next(table, ("", []))[1]]
    if not set(needed) <= set(names):
        has = one_line(", ".join(names))[:200] or "none"
        raise SteerbackError(f"{where}: needs the columns {' and '.join(needed)}, has {has}")
    for place, cells in table:
        yield place, dict.fromkeys(names, "") | dict(zip(names, map(plain, cells), strict=False))
