"""One line for each trial, for spreadsheets and data frames: CSV, or parquet where pyarrow is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError, unknown
from steerback.metrics import VALID, outcome_of
from steerback.readers.tables import csv_lines
from steerback.store.files import whole_file
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline, plain

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("authors", "parquet", "csv", "inspect", "hf")

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
ROWS_PER_GROUP = 5_000
"""Rows of a parquet file that are held in memory at a time."""


def export_flat(ledger: Ledger, path: Path, judge: str, form: str) -> Path:
    """Write all trials of a ledger with `judge`'s verdicts into one file, `form` csv or parquet.

    Attempts, first and last are gated. A missing number is empty, never 0. `spans` and `interventions` are JSON. No
    cell of a CSV is a formula; `readers.tables.csv_rows` reads its texts back unchanged.
    """
    if form not in ("csv", "parquet"):
        raise unknown("export format", form, FORMATS)
    rows = ledger.responses(ledger.outlines(judge=judge))
    if form == "parquet":
        return write_parquet(path, rows, judge)
    with whole_file(path) as file:
        for line in csv_lines(COLUMNS, (record.values() for record in _records(rows, judge))):
            file.write(line.encode("utf-8"))
    return path


def trial_table(ledger: Ledger, judge: str, stage: str | None = None) -> pd.DataFrame:
    """Return one line for each trial of a stage (None: of all) with `judge`'s verdict; the columns are COLUMNS."""
    import pandas as pd

    rows = ledger.responses(ledger.outlines(stage=stage, judge=judge))
    return pd.DataFrame([*_records(rows, judge)], columns=[*COLUMNS], dtype=object)


def _records(rows: Iterable[tuple[Outline, str | None]], judge: str) -> Iterator[dict[str, object]]:
    for row, response in rows:
        trial, judged = row.trial, row.judgement
        outcome = outcome_of(row.valid_receipt, judged, row.degraded)
        yield {
            **{name: getattr(trial, name) for name in TRIAL if name != "latent"},
            "latent": None if trial.latent is None else str(trial.latent),
            "prefill": trial.lead,
            "seed": trial.seed,
            "interventions": json.dumps([plain(i) for i in trial.interventions], ensure_ascii=False),
            "response": response,
            "finish": row.finish,
            "tokens": row.tokens if row.finish else None,
            "valid_receipt": row.valid_receipt,
            "judge": judge,
            "status": judged.status if judged else None,
            **{name: getattr(outcome, name) if outcome.state == VALID else None for name in SCORES},
            "degraded": outcome.degraded,
            "spans": json.dumps([plain(a) for a in judged.attempts], ensure_ascii=False) if judged else None,
        }


def write_parquet(path: Path, rows: Iterable[tuple[Outline, str | None]], judge: str) -> Path:
    """Write rows with their responses into a parquet file, one line each with `judge`'s verdict; columns: COLUMNS."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise SteerbackError("parquet needs pyarrow: pip install 'steerback[parquet]', or use --format csv") from None
    kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(WHOLE, pa.int64())
    kinds |= dict.fromkeys(REAL, pa.float64()) | dict.fromkeys(TRUTH, pa.bool_())
    schema, records = pa.schema([*kinds.items()]), _records(rows, judge)
    with whole_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(records, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema))
    return path
