"""One line a trial, for spreadsheets and data frames: CSV always, parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerback.errors import SteerbackError, unknown
from steerback.metrics import STATES, Outcome, outcome_of
from steerback.store.ledger import Ledger, Row
from steerback.store.run import write_atomic

FORMATS = ("authors", "parquet", "csv")

TRIAL = ("key", "target", "stage", "condition", "index", "latent", "label", "boost", "prompt", "meta_prompt")
COLUMNS = (
    *TRIAL,
    *("prefill", "seed", "interventions", "response", "finish", "tokens", "valid_receipt", "judge", "status"),
    *("attempts", "first", "last", "ungated_attempts", "ungated_first", "ungated_last", "degraded", "spans"),
)


def export_flat(ledger: Ledger, path: Path, judge: str, form: str) -> Path:
    """All trials of a ledger with `judge`'s verdicts into one file, `form` csv or parquet.

    Attempts, first and last are gated; missing numbers are empty, never 0. `spans` and `interventions` are JSON.
    """
    rows = ledger.rows(judge=judge)
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat(rows, judge))
        return write_atomic(path, out.getvalue().encode("utf-8"))
    if form == "parquet":
        return _parquet(rows, path, judge)
    raise unknown("export format", form, ("authors", "parquet", "csv"))


def flat(rows: Sequence[Row], judge: str) -> Iterator[dict[str, Any]]:
    """The rows as flat dicts with the keys COLUMNS."""
    for row in rows:
        trial, done, judged = row.trial, row.completion, row.judgement
        outcome = outcome_of(row.valid_receipt, judged, done.text if done else "")
        yield {
            **{name: getattr(trial, name) for name in TRIAL if name != "latent"},
            "latent": None if trial.latent is None else str(trial.latent),
            "prefill": trial.prefill,
            "seed": trial.seed,
            "interventions": json.dumps([asdict(i) for i in trial.interventions], ensure_ascii=False),
            "response": done.text if done else None,
            "finish": done.finish if done else None,
            "tokens": len(done.token_ids) if done else None,
            "valid_receipt": row.valid_receipt,
            "judge": judge,
            "status": judged.status if judged else None,
            "degraded": outcome.degraded,
            "spans": json.dumps([asdict(a) for a in judged.attempts], ensure_ascii=False) if judged else None,
            **_numbers(outcome),
        }


def _numbers(outcome: Outcome) -> dict[str, Any]:
    names = ("attempts", "first", "last", "ungated_attempts", "ungated_first", "ungated_last")
    valid = STATES[outcome.state] == "valid"
    return {name: getattr(outcome, name) if valid else None for name in names}


def _parquet(rows: Sequence[Row], path: Path, judge: str) -> Path:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise SteerbackError("parquet needs pyarrow: pip install 'steerback[parquet]', or use --format csv") from None
    records = list(flat(rows, judge))
    whole, real, yes = pa.int64(), pa.float64(), pa.bool_()
    kinds = dict.fromkeys(COLUMNS, pa.string())
    kinds |= dict.fromkeys(("index", "seed", "tokens", "attempts", "ungated_attempts"), whole)
    kinds |= dict.fromkeys(("boost", "first", "last", "ungated_first", "ungated_last"), real)
    kinds |= dict.fromkeys(("valid_receipt", "degraded"), yes)
    table = pa.table({name: pa.array([r[name] for r in records], kinds[name]) for name in COLUMNS})
    out = io.BytesIO()
    pq.write_table(table, out)
    return write_atomic(path, out.getvalue())
