"""One line for each trial, for spreadsheets and data frames: CSV, or parquet where pyarrow is installed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from steerback.errors import SteerbackError, unknown
from steerback.metrics import VALID, outcome_of
from steerback.readers.tables import csv_lines
from steerback.store.ledger import Ledger, Row
from steerback.store.run import write_atomic

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


def export_flat(ledger: Ledger, path: Path, judge: str, form: str) -> Path:
    """Write all trials of a ledger with `judge`'s verdicts into one file, `form` csv or parquet.

    Attempts, first and last are gated. A missing number is empty, never 0. `spans` and `interventions` are JSON. No
    cell of a CSV is a formula; `readers.tables.csv_rows` reads its texts back unchanged.
    """
    if form not in ("csv", "parquet"):
        raise unknown("export format", form, FORMATS)
    rows = ledger.rows(judge=judge)
    if form == "parquet":
        return write_atomic(path, parquet(trial_table(rows, judge)))
    lines = csv_lines(COLUMNS, (record.values() for record in _records(rows, judge)))
    return write_atomic(path, "".join(lines).encode("utf-8"))


def trial_table(rows: Sequence[Row], judge: str) -> pd.DataFrame:
    """Return one line for each row, with `judge`'s verdict; the columns are COLUMNS."""
    return pd.DataFrame(_records(rows, judge), columns=[*COLUMNS], dtype=object)


def _records(rows: Sequence[Row], judge: str) -> Iterator[dict[str, object]]:
    for row in rows:
        trial, done, judged = row.trial, row.completion, row.judgement
        outcome = outcome_of(row.valid_receipt, judged, done.text if done else "")
        yield {
            **{name: getattr(trial, name) for name in TRIAL if name != "latent"},
            "latent": None if trial.latent is None else str(trial.latent),
            "prefill": trial.lead,
            "seed": trial.seed,
            "interventions": json.dumps([asdict(i) for i in trial.interventions], ensure_ascii=False),
            "response": done.text if done else None,
            "finish": done.finish if done else None,
            "tokens": len(done.token_ids) if done else None,
            "valid_receipt": row.valid_receipt,
            "judge": judge,
            "status": judged.status if judged else None,
            **{name: getattr(outcome, name) if outcome.state == VALID else None for name in SCORES},
            "degraded": outcome.degraded,
            "spans": json.dumps([asdict(a) for a in judged.attempts], ensure_ascii=False) if judged else None,
        }


def parquet(frame: pd.DataFrame) -> bytes:
    """Return a table of trials as a parquet file."""
    try:
        import pyarrow as pa
    except ImportError:
        raise SteerbackError("parquet needs pyarrow: pip install 'steerback[parquet]', or use --format csv") from None
    kinds = dict.fromkeys(COLUMNS, pa.string()) | dict.fromkeys(WHOLE, pa.int64())
    kinds |= dict.fromkeys(REAL, pa.float64()) | dict.fromkeys(TRUTH, pa.bool_())
    out = io.BytesIO()
    frame.to_parquet(out, engine="pyarrow", index=False, schema=pa.schema([*kinds.items()]))
    return out.getvalue()
