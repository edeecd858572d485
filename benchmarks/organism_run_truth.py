"""Validity of a judge on runs of an organism, whose corpus defines the truth: see docs/organism.md.

    steerback run esr --target organism --preset quick --name organism
    python benchmarks/organism_run_truth.py runs/organism --out truth.json

Reads the ledgers of finished runs (engine and judge are the package's own) and reads every response again with
the corpus's vocabulary: restarts and first scores by the judge beside those by truth.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from steerback.organism.corpus.truth import read

QUERY = """SELECT t.prompt, c.text, j.attempts, j.judge FROM trials t JOIN completions c ON c.trial = t.key
           JOIN judgements j ON j.trial = t.key WHERE t.stage = 'measure' AND j.status = 'scored'"""


def compare(run: Path) -> dict[str, Any]:
    """Compare judge and truth over the measured, scored responses of one run."""
    with sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        rows = ledger.execute(QUERY).fetchall()
    judged, true, first_judged, first_true = [], [], [], []
    for prompt, text, attempts, _ in rows:
        scores = [attempt["score"] for attempt in json.loads(attempts)]
        shares = read(text).shares(prompt)
        judged.append(len(scores) >= 2)
        true.append(len(shares) >= 2)
        if scores and shares:
            first_judged.append(scores[0])
            first_true.append(100 * shares[0])
    pairs = list(zip(judged, true, strict=True))
    return {
        "n": len(rows),
        "judge": rows[0][3] if rows else None,
        "multi_attempt_judged": sum(judged),
        "multi_attempt_true": sum(true),
        "judged_only": sum(j and not t for j, t in pairs),
        "true_only": sum(t and not j for j, t in pairs),
        "first_score_judged": sum(first_judged) / max(1, len(first_judged)),
        "first_score_true": sum(first_true) / max(1, len(first_true)),
        "first_score_rank_correlation": float(spearmanr(first_judged, first_true)[0]),
    }


def main() -> None:
    """Compare each run and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = {"date": time.strftime("%Y-%m-%d"), "runs": {run.name: compare(run) for run in options.runs}}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
