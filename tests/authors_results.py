"""Result files in the format of the authors' code, and the analysis of a run imported from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steerback.jobs import execute
from steerback.jobs.execute import Analysis
from steerback.store.run import Run

MODEL = "meta-llama/Meta-Llama-3.3-70B-Instruct"


def attempts(*scores: Any) -> dict[str, Any]:
    """A score as the judge wrote it, for the response that `said` makes of as many parts."""
    return {"attempts": [{"attempt_text": f"part {n} of it.", "score": s} for n, s in enumerate(scores)]}


def said(n: int) -> str:
    return " ".join(f"part {i} of it." for i in range(n))


def trial(score: Any, n: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": "Explain how rainbows form.",
        "feature_index_in_sae": 7,
        "feature_label": "tea",
        "threshold": 8.5,
        "seed": 123,
        "response": said(n),
        "score": score,
        "error": None,
    } | changes


def result(features: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    config = {
        "model_name": MODEL,
        "judge_model_name": "claude-haiku-4-5-20251001",
        "target_score_normalized": 0.3,
        "max_completion_tokens": 512,
    } | changes.pop("config", {})
    return {"experiment_config": config, "results_by_feature": features} | changes


def feature(index: int, trials: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "feature_index_in_sae": index,
        "feature_label": f"topic {index}",
        "threshold": 8.5,
        "trials": trials,
    } | changes


def write(path: Path, body: Any) -> Path:
    path.write_text(json.dumps(body), encoding="utf-8")
    return path


def analysed(folder: Path) -> Analysis:
    with Run.read(folder) as run:
        return execute.analyse(run, run.config.judge, draws=min(run.config.draws, 200))
