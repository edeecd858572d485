"""A run as result files in the form that the authors' code writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from steerback.records import LatentKey, Trial, digest
from steerback.store.facts import META_PROMPTS, SWEEP
from steerback.store.files import make_folder
from steerback.store.rows import Outline
from steerback.store.run import Run, write_json

Response: TypeAlias = tuple[Outline, str | None]
"""A trial with the text of its response."""
EXPORTED_FACTS = (SWEEP.name, META_PROMPTS.name)


def export_authors(run: Run, folder: Path, judge: str) -> list[Path]:
    """Write one file in the authors' form for each target and condition of the measured trials."""
    make_folder(folder)
    paths = []
    for target, condition in run.ledger.conditions():
        outlines = run.ledger.outlines(target, "measure", condition, judge)
        body = _body(run, target, condition, judge, list(run.ledger.responses(outlines)))
        safe = "".join(c if c.isalnum() or c in "+-." else "_" for c in f"{target}_{condition}")
        paths.append(write_json(folder / f"experiment_results_{safe}.json", body))
    return paths


def _body(run: Run, target: str, condition: str, judge: str, rows: Sequence[Response]) -> dict[str, object]:
    by_latent: dict[LatentKey | None, list[Response]] = {}
    for row in rows:
        by_latent.setdefault(row[0].trial.latent, []).append(row)
    config = run.config.of(target)
    clamped = {i.latent for row, _ in rows for i in row.trial.interventions if i.mode == "clamp" and not i.value}
    facts = {name: value for owner, name, value in run.ledger.facts() if owner == target and name in EXPORTED_FACTS}
    return {
        "experiment_config": {
            "model_name": target,
            "prompts_file": config.prompts,
            "judge_model_name": judge,
            "disable_steering": not any(row.trial.interventions for row, _ in rows),
            "target_score_normalized": config.calibration.target_score / 100,
            "max_completion_tokens": config.sampling.max_new_tokens,
            "n_trials_per_feature": config.trials_per_latent,
            "n_features": len(by_latent),
        },
        "results_by_feature": [_feature(rows) for rows in by_latent.values()],
        **({"ablated_latents": sorted(clamped, key=str), "num_ablated_latents": len(clamped)} if clamped else {}),
        "steerback": {
            "experiment": config.experiment,
            "condition": condition,
            "config": digest(config),
            "facts": facts,
        },
    }


def _feature(rows: Sequence[Response]) -> dict[str, object]:
    first = rows[0][0].trial
    return {**_named(first), "threshold": first.boost, "trials": [_entry(*row) for row in rows], "error": None}


def _named(trial: Trial) -> dict[str, object]:
    return {"feature_index_in_sae": trial.latent, "feature_label": trial.label or f"feature_{trial.latent}"}


def _entry(row: Outline, response: str | None) -> dict[str, object]:
    trial, judged, text = row.trial, row.judgement, row.trial.lead + (response or "")
    if judged is None or judged.status == "unscored":
        score: dict[str, object] = {"error": judged.reason if judged else "not judged"}
    else:
        spans = [(text[a.start : a.end], a) for a in judged.attempts]
        score = {
            "attempts": [
                {"attempt_text": part, "score": a.score, "phrase": a.phrase, "gated": a.gated} for part, a in spans
            ]
        }
    return {
        **_named(trial),
        "prompt": f"{trial.prompt} {trial.meta_prompt}".strip(),
        "threshold": trial.boost,
        "seed": trial.seed,
        "response": text if row.valid_receipt else "",
        "score": score,
        "error": None if row.valid_receipt else "not generated, or not steered as planned",
        "steerback": {
            "index": trial.index,
            "meta_prompt": trial.meta_prompt,
            "finish": row.finish or "unknown",
        },
    }
