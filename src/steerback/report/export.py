"""Export of one row per trial for spreadsheets and data frames: CSV, or parquet if pyarrow is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError, unknown
from steerback.metrics import VALID, outcome_of
from steerback.readers.tables import csv_line
from steerback.records import Intervention
from steerback.store.files import whole_file
from steerback.store.ledger import BATCH, MANY, Ledger
from steerback.store.processes import collector_paused, write_by_two
from steerback.store.rows import Outline, plain

if TYPE_CHECKING:
    import pandas as pd

FLAT = ("csv", "parquet")
FORMATS = (*FLAT, "authors", "inspect", "hf")

TRIAL = ("key", "target", "stage", "condition", "index", "latent", "label", "boost", "prompt", "meta_prompt")
SCORES = ("attempts", "first", "last", "ungated_attempts", "ungated_first", "ungated_last")
COLUMNS = (
    *TRIAL,
    *("prefill", "seed", "interventions", "response", "finish", "tokens", "valid_receipt", "judge", "status"),
    *(*SCORES, "degraded", "spans"),
)
WHOLE = ("index", "seed", "tokens", "attempts", "ungated_attempts")
REAL = ("boost", "first", "last", "ungated_first", "ungated_last")
TRUTH = ("valid_receipt", "degraded")
UNKNOWN = (None,) * len(SCORES)
as_json = json.JSONEncoder(ensure_ascii=False).encode
ROWS_PER_GROUP = 5_000
"""Number of rows of a parquet file in memory at a time."""


@collector_paused()
def export_flat(ledger: Ledger, path: Path, judge: str, form: str) -> Path:
    """Write all trials of a ledger with `judge`'s verdicts into one file, `form` csv or parquet.

    Attempts, first and last are gated. A missing number is empty, never 0. `spans` and `interventions` are JSON.
    Spreadsheets take no cell of the CSV for a formula; `readers.tables.csv_rows` restores the texts.
    """
    if form not in FLAT:
        raise unknown("export format", form, FLAT)
    if form == "parquet":
        return write_parquet(path, ledger.responses(ledger.outlines(judge=judge)), judge)
    keys = [key for key, *_ in ledger.plan()]

    def lines(batches: Sequence[Sequence[str]]) -> Iterator[bytes]:
        with Ledger(ledger.path, read_only=True) as own:
            for some in batches:
                records = _records(own.responses(own.outlines(judge=judge, keys=some)), judge)
                yield "".join(map(csv_line, records)).encode("utf-8")

    with whole_file(path) as file:
        file.write(csv_line(COLUMNS).encode("utf-8"))
        batches = [keys[n : n + BATCH] for n in range(0, len(keys), BATCH)]
        write_by_two(file, path.parent, lines, batches, len(keys) >= MANY)
    return path


def trial_table(ledger: Ledger, judge: str, stage: str | None = None) -> pd.DataFrame:
    """Return one row per trial of a stage (None: all stages) with `judge`'s verdict and the columns COLUMNS."""
    import pandas as pd

    rows = ledger.responses(ledger.outlines(stage=stage, judge=judge))
    return pd.DataFrame([*_records(rows, judge)], columns=[*COLUMNS], dtype=object)


def _records(rows: Iterable[tuple[Outline, str | None]], judge: str) -> Iterator[tuple[object, ...]]:
    """Yield the values of COLUMNS for each row with its response."""
    for row, response in rows:
        t, judged = row.trial, row.judgement
        outcome = outcome_of(row.valid_receipt, judged, row.degraded)
        yield (
            *(t.key, t.target, t.stage, t.condition, t.index),
            *(None if t.latent is None else str(t.latent), t.label, t.boost, t.prompt, t.meta_prompt, t.lead, t.seed),
            *(_interventions(t.interventions), response, row.finish, row.tokens if row.finish else None),
            *(row.valid_receipt, judge, judged.status if judged else None),
            *(outcome[1:7] if outcome.state == VALID else UNKNOWN),
            *(outcome.degraded, as_json([plain(a) for a in judged.attempts]) if judged else None),
        )


@lru_cache(4096)
def _interventions(edits: tuple[Intervention, ...]) -> str:
    return as_json([plain(i) for i in edits])


def write_parquet(path: Path, rows: Iterable[tuple[Outline, str | None]], judge: str) -> Path:
    """Write rows with their responses and `judge`'s verdicts into a parquet file with the columns COLUMNS."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise SteerbackError("parquet needs pyarrow: pip install 'steerback[parquet]', or use --format csv") from None
    kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(WHOLE, pa.int64())
    kinds |= dict.fromkeys(REAL, pa.float64()) | dict.fromkeys(TRUTH, pa.bool_())
    schema, records = pa.schema([*kinds.items()]), _records(rows, judge)
    types = [*kinds.values()]
    with whole_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(records, ROWS_PER_GROUP)):
            columns = [pa.array(c, kind) for c, kind in zip(zip(*group, strict=True), types, strict=True)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    return path
