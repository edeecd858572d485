"""Labelling page and spreadsheet of a sample, and the readers of both.

Responses are untrusted. The page treats them as data that a script sets as text, and its policy allows no other script
and no network access. In the spreadsheet no cell can be taken for a formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from steerback.errors import SteerbackError, short, visible
from steerback.judging.human import FORMAT, RUBRIC, LabelFile, LabelItem, parse_labels, sentences, words
from steerback.readers import Json, decode, parse_json, read_bytes
from steerback.readers.tables import csv_cells, csv_text, plain_cell
from steerback.report import pages

COLUMNS = ("sample", "response", "position", "prompt", "topic", "sentence", "restart", "score")
MARKS, BLANKS = ("x", "1", "yes", "restart"), ("", "0", "no")
STATES = {"empty": "empty", "?": "unscored"}
"""Entries in place of a response's first score, with the status they stand for."""


def page(items: Sequence[LabelItem], run: str, sample: str) -> str:
    """Return the labelling page of a sample, a self-contained HTML file."""
    from markupsafe import Markup

    data = {
        "format": FORMAT,
        "run": run,
        "sample": sample,
        "rubric": RUBRIC,
        "items": [
            {
                "number": i.number,
                "prompt": i.prompt,
                "topic": i.topic,
                "response": i.response,
                "words": words(i.response),
                "sentences": sentences(i.response),
            }
            for i in items
        ],
    }
    values: dict[str, object] = {"run": run, "data": Markup(pages.json_in_html(data))}
    return pages.render("label.html", ["label.css"], ["text.js", "label.js"], values, images="'none'")


def spreadsheet(items: Sequence[LabelItem], sample: str) -> str:
    """Return the sample as CSV: one row per sentence, with empty columns `restart` and `score`.

    The score of the first attempt belongs in the first row of a response. The score of a later attempt belongs in the
    row whose `restart` is marked.
    """
    return csv_text(COLUMNS, _sentence_rows(items, sample))


def _sentence_rows(items: Sequence[LabelItem], sample: str) -> Iterator[list[object]]:
    for item in items:
        starts = sentences(item.response) or [0]
        for start, end in zip(starts, [*starts[1:], len(item.response)], strict=True):
            head = (item.prompt, item.topic or "") if start == starts[0] else ("", "")
            cells = (*head, item.response[start:end].strip())
            yield [sample, item.number, start, *map(visible, cells), "", ""]


def read_labels(path: Path) -> LabelFile:
    """Read labels from a file that the page saved, or from a completed spreadsheet."""
    where = f"label file {path}"
    text = decode(read_bytes(path, "label file"), where)
    if text.lstrip()[:1] == "{":
        return parse_labels(parse_json(text, where), where)
    return parse_labels(_from_spreadsheet(text, where), where)


def _from_spreadsheet(text: str, where: str) -> Json:
    """Return the JSON form of a completed spreadsheet; responses without any entry are left out."""
    rows: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for place, row in _rows(text, where):
        rows.setdefault(row["response"], []).append((place, row))
    labels: dict[str, Json] = {number: label for number, part in rows.items() if (label := _label(part)) is not None}
    samples = {row["sample"] for part in rows.values() for _, row in part}
    if len(samples) != 1:
        raise SteerbackError(f"{where} must contain the rows of one sample, not of {len(samples)}")
    return {"format": FORMAT, "sample": samples.pop(), "rubric": RUBRIC, "labels": labels}


def _rows(text: str, where: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place in the file, cells by column). The separator is a comma, a semicolon or a tab."""
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)
    read = csv_cells(text, where, separator)
    table = [[plain_cell(cell.strip()) for cell in cells] for _, cells in read if any(cells)]
    names = table[0] if table else []
    missing = [name for name in COLUMNS if name not in names and name not in ("prompt", "topic", "sentence")]
    if missing or len(set(names)) != len(names):
        raise SteerbackError(
            f"{where} is neither a file of the labelling page nor its spreadsheet: its columns must be "
            f"{', '.join(COLUMNS)}, each once"
        )
    seen: set[tuple[str, str]] = set()
    for line, cells in enumerate(table[1:], 2):
        place = f"{where}, row {line}"
        if len(cells) > len(names):
            raise SteerbackError(f"{place} has {len(cells)} cells; the header has {len(names)}")
        row = dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))
        key = (row["response"], row["position"])
        if key in seen:
            raise SteerbackError(f"{place}: response {short(key[0])}, position {short(key[1])} occurs twice")
        seen.add(key)
        yield place, row


def _label(rows: Sequence[tuple[str, dict[str, str]]]) -> Json:
    """Return the label from the rows of one response, or None if no row has an entry."""
    ordered = sorted(((_position(at, row), at, row) for at, row in rows), key=lambda entry: entry[0])
    if not any(row["restart"] or row["score"] for _, _, row in ordered):
        return None
    restarts: list[Json] = []
    scores: list[Json] = []
    for nth, (position, at, row) in enumerate(ordered):
        mark, score = row["restart"].lower(), row["score"].lower()
        if mark not in (*MARKS, *BLANKS):
            raise SteerbackError(
                f"{at}: restart is {short(mark)}; write x where a new attempt begins, and leave it empty elsewhere"
            )
        begins = mark in MARKS
        if nth == 0 and begins:
            raise SteerbackError(f"{at}: this is the first sentence, so it cannot be a restart")
        if nth == 0 and score in STATES:
            if any(row["restart"] or row["score"] for _, _, row in ordered[1:]):
                raise SteerbackError(f"{at}: a response that is {score!r} has no restarts and no further scores")
            return {"status": STATES[score]}
        if begins:
            restarts.append(position)
        if begins or nth == 0:
            scores.append(_score(score, at))
        elif score:
            raise SteerbackError(
                f"{at} has a score but starts no attempt; mark its restart with x, or remove the score"
            )
    return {"status": "scored", "restarts": restarts, "scores": scores}


def _position(at: str, row: dict[str, str]) -> int:
    if not (row["position"].isascii() and row["position"].isdigit() and len(row["position"]) < 10):
        raise SteerbackError(f"{at}: position {short(row['position'])} is not a number; restore that column as it was")
    return int(row["position"])


def _score(text: str, at: str) -> float:
    try:
        value = float(text.replace(",", "."))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise SteerbackError(f"{at}: score {short(text)} is not a number from 0 to 100; each attempt needs one")
    return value
