"""CSV tables without spreadsheet formulas, which are read back unchanged.

Spreadsheets evaluate a field that starts with `=`, `+`, `-` or `@`, also after a tab or a line break. Such a text is
written with a leading apostrophe, which spreadsheets interpret as "text" and which reading removes. Plain numbers and
a single `-` are written unchanged.
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
"""Start of a text that a spreadsheet would evaluate, after any number of apostrophes, also in full-width forms."""
_OPENINGS = frozenset("'=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
LONGEST_CELL = 2**30
"""Length limit of a field in characters. Python's default of 131,072 is too small for long responses."""
_QUOTED = re.compile(r'[",\r\n]')


def safe_cell(value: object) -> str:
    """Return a value as a CSV field: never a formula, empty for a missing value (None, NaN).

    Quotes are those of `csv.writer`, which is several times slower for long texts.
    """
    if not isinstance(value, str):
        return "" if value is None or value != value else str(value)
    if value[:1] in _OPENINGS and COMPUTED.match(value):
        value = f"'{value}"
    return '"' + value.replace('"', '""') + '"' if _QUOTED.search(value) else value


def plain_cell(text: str) -> str:
    """Return the original text of a field that `safe_cell` wrote."""
    return text[1:] if text.startswith("'") and COMPUTED.match(text) else text


def csv_line(row: Iterable[object]) -> str:
    """Return a row of a CSV file with its line feed."""
    return (",".join(map(safe_cell, row)) or '""') + "\n"  # an empty line would not be read as a row


def csv_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return the text of a CSV file."""
    return "".join(map(csv_line, chain([header], rows)))


def csv_cells(text: str, where: str, separator: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yield (place, fields) for each non-empty row of a CSV text, including the header."""
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
    """Yield (place, fields by column) for each row. A missing field is empty.

    `written_here`: `csv_text` wrote the table, so its apostrophes are removed. In other tables an apostrophe is part
    of the text. Raises SteerbackError if a column of `needed` is missing.
    """
    table = csv_cells(text, where)
    plain = plain_cell if written_here else str
    names = [plain(name) for name in next(table, ("", []))[1]]
    if not set(needed) <= set(names):
        has = one_line(", ".join(names))[:200] or "none"
        raise SteerbackError(f"{where}: needs the columns {' and '.join(needed)}, has {has}")
    for place, cells in table:
        yield place, dict.fromkeys(names, "") | dict(zip(names, map(plain, cells), strict=False))
