"""Viewer of runs: one HTML file with overview, trials, single responses and calibration.

Python writes the data, and the scripts in this folder display them. The columns of the trial table are available when
the page opens. Texts, verdicts and activations are stored in compressed chunks, which are read on demand.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

from steerback.calibration.thresholds import THRESHOLDS
from steerback.errors import VERSION
from steerback.figures.tables import Table
from steerback.readers import read_json_table
from steerback.report import pages
from steerback.report.view_calibration import calibration
from steerback.report.view_forks import forks_of
from steerback.report.view_sample import CHUNK, SEED, sampled
from steerback.report.view_trials import STAGES, ShownRun, flags_of, reason_of
from steerback.store.facts import FORK, LATENTS
from steerback.store.ledger import Ledger

MOST_TRIALS = 5000
MOST_BYTES = 22_000_000  # size of the file without the table of trials (about 1 MB)
LEAST_BYTES = 2_000_000  # room for the responses even if overview and figures exceed that size
STYLES = ("view.css",)
SCRIPTS = (
    "text.js",
    *(
        f"view{part}.js"
        for part in ("", "_overview", "_trials", "_tokens", "_lines", "_trial", "_calibration", "_forks")
    ),
)


def page(runs: Sequence[ShownRun], stages: Sequence[str] = STAGES, limit: int = MOST_TRIALS) -> str:
    """Return the page of some runs, with at most `limit` trials."""
    from markupsafe import Markup

    known = [r.counts_and_curves or (trial_counts(r.run.ledger, r.judge, stages), calibration(r)) for r in runs]
    overview, curves = [_overview(r, counts) for r, (counts, _) in zip(runs, known, strict=True)], [c for _, c in known]
    figures = [
        {"name": name, "src": "data:image/png;base64," + base64.b64encode(image).decode("ascii"), "caption": caption}
        for r in runs
        for name, (image, caption) in r.figures.items()
    ]
    forks = [fork for number, r in enumerate(runs) for fork in forks_of(number, r)]
    parts = {"figures": pages.packed(figures), "calibration": pages.packed(curves), "forks": pages.packed(forks)}
    room = MOST_BYTES - len(json.dumps(overview)) - sum(map(len, parts.values()))
    sample, light, chunks = sampled(runs, stages, limit, max(room, LEAST_BYTES))
    data = {
        "version": VERSION,
        "runs": overview,
        "trials": light,
        "forks": [[fork["run"], fork["parent"]] for fork in forks],
        "parents": [_parents(r) for r in runs],
        "chunk": CHUNK,
        "sample": {"shown": len(sample.keys), "total": sample.total, "why": sample.why, "seed": SEED},
    }
    parts |= {f"chunk-{n}": chunk for n, chunk in enumerate(chunks)}
    values: dict[str, object] = {
        "title": ", ".join(r.name for r in runs),
        "data": Markup(pages.json_in_html(data)),
        "parts": parts,
    }
    return pages.render("view.html", STYLES, SCRIPTS, values, images="data:")


def _parents(shown: ShownRun) -> dict[str, tuple[str, int]]:
    """Return, for each fork condition, the key of the continued trial and the number of its kept tokens."""
    forks = [forked.fork for forked in shown.forks]
    return {fork.condition(arm): (fork.parent, fork.tokens) for fork in forks for arm in fork.arms}


def _overview(shown: ShownRun, counts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    run, ledger = shown.run, shown.run.ledger
    manifest = run.folder / "manifest.json"
    return {
        "name": shown.name,
        "experiment": run.config.experiment,
        "targets": list(run.config.targets),
        "judge": shown.judge,
        "judges": ledger.judges(),
        "lines": list(shown.lines),
        "problem": shown.problem,
        "tables": [_table(name, table) for name, table in shown.tables.items()],
        "figures": list(shown.figures),
        "counts": counts,
        "stages": ledger.stage_sizes(),
        "latents": _left_out(ledger),
        "manifest": read_json_table(manifest, "manifest") if manifest.is_file() else {},
        "config": run.config.model_dump(mode="json"),
    }


def _table(name: str, table: Table) -> dict[str, object]:
    return {"name": name, "columns": table.columns, "cells": table.cells, "caption": table.caption, "left": table.left}


def trial_counts(ledger: Ledger, judge: str, stages: Sequence[str]) -> list[Mapping[str, object]]:
    """Return the trials by state for each target, stage and condition, with the most frequent reasons for exclusion."""
    shown = [stage for stage in dict.fromkeys(stages) if stage != FORK]  # the page of forks counts its arms
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for row, number in chain.from_iterable(ledger.kinds(stage, judge) for stage in shown):
        place, reason = (row.trial.target, row.trial.stage, row.trial.condition), reason_of(row)
        counts[place].update(dict.fromkeys(("planned", *(flags_of(row) or ("sound",))), number))
        reasons[place].update({reason: number} if reason else {})
    return [
        {
            "target": target,
            "stage": stage,
            "condition": condition,
            "counts": dict(counts[target, stage, condition]),
            "reasons": reasons[target, stage, condition].most_common(5),
        }
        for target, stage, condition in sorted(counts)
    ]


def _left_out(ledger: Ledger) -> list[dict[str, object]]:
    """Return the counts of latents after selection and calibration of each target."""
    left: dict[str, dict[str, object]] = {}
    for target, selection in ledger.targets_with(LATENTS).items():
        left.setdefault(target, {})["selection"] = dict(selection.counts)
    for target, thresholds in ledger.targets_with(THRESHOLDS).items():
        unusable = [e for e in thresholds if not e.threshold.usable]
        left.setdefault(target, {}).update(
            calibrated=len(thresholds),
            unusable=[
                {"latent": e.latent, "status": e.threshold.status, "reason": e.threshold.reason} for e in unusable
            ],
        )
    return [{"target": target, **entry} for target, entry in left.items()]
