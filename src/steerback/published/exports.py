"""Export of a run as result files in the format of the authors' code.

Data that this format does not cover is stored under the key `steerback`: plan, receipt and recorded activations in
each trial, settings and facts in a file without trials. `steerback import` restores all of it.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from steerback.calibration.thresholds import THRESHOLDS
from steerback.records import Judgement, LatentKey, Trial, WindowScores, digest
from steerback.store import facts
from steerback.store.database import pack_array
from steerback.store.facts import FORK, META_PROMPTS, SWEEP, Fact
from steerback.store.files import make_folder
from steerback.store.ledger import Row
from steerback.store.run import Run, write_json

TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)
WINDOWS: TypeAdapter[WindowScores] = TypeAdapter(WindowScores)
NO_LATENT = "unsteered"
"""Replaces the index of the latent in a trial without a latent."""
SMALL = (SWEEP.name, META_PROMPTS.name)
"""Facts that every file contains, so that each file can be imported alone."""
KEPT = (facts.CONFIG, facts.ENGINE, facts.IMPORTED, facts.JUDGES, facts.JUDGE_SPEND, facts.PROBES, facts.FORKS)
EXPORTED: Mapping[str, Fact[object]] = {
    fact.name: fact
    for fact in [THRESHOLDS, *vars(facts).values()]
    if isinstance(fact, Fact) and fact not in KEPT and fact is not facts.LABEL_SAMPLES
}
"""Exported facts by name. Facts about the run itself (settings, engine, judges, forks) are not exported."""


@dataclass
class Verdicts:
    """Further verdicts on one response, by judge, and its window scores."""

    judgements: dict[str, Judgement] = field(default_factory=dict)
    windows: list[WindowScores] = field(default_factory=list)


def export_authors(run: Run, folder: Path, judge: str) -> list[Path]:
    """Write one file in the authors' format for each target and condition, and one file with the facts of each target.

    Files with measured trials have the authors' file names. Names of files with other stages begin with `steerback_`.
    """
    make_folder(folder)
    paths, files = [], Counter[str]()
    for target, stage in run.ledger.stages():
        for owner, condition in run.ledger.conditions(stage):
            if owner != target or stage == FORK:
                continue
            keys = [o.trial.key for o in run.ledger.outlines(target, stage, condition)]
            body = _body(run, target, stage, condition, judge, keys)
            name = "experiment_results" if stage == "measure" else f"steerback_{stage}"
            paths.append(write_json(folder / f"{name}_{_safe(f'{target}_{condition}')}.json", body))
            files[target] += 1
    for target in dict.fromkeys((*run.config.targets, *files)):
        own = {
            "experiment": run.config.experiment,
            "condition": "facts",
            "config": run.config.model_dump(mode="json"),
            "files": files[target],
            "facts": _facts(run, target, tuple(EXPORTED)),
        }
        body = _head(run, target, judge) | {"results_by_feature": [], "steerback": own}
        paths.append(write_json(folder / f"steerback_{_safe(target)}.json", body))
    return paths


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "+-." else "_" for c in name)


def _facts(run: Run, target: str, names: Sequence[str]) -> dict[str, JsonValue]:
    own = {name: value for owner, name, value in run.ledger.facts() if owner == target}
    return {name: value for name, value in own.items() if name in names or (len(names) > 2 and " by " in name)}


def _head(run: Run, target: str, judge: str) -> dict[str, object]:
    config = run.config.of(target)
    return {
        "experiment_config": {
            "model_name": target,
            "prompts_file": config.prompts,
            "judge_model_name": judge,
            "target_score_normalized": config.calibration.target_score / 100,
            "max_completion_tokens": config.sampling.max_new_tokens,
            "n_trials_per_feature": config.trials_per_latent,
        }
    }


def _body(run: Run, target: str, stage: str, condition: str, judge: str, keys: Sequence[str]) -> dict[str, object]:
    by_latent: dict[LatentKey | None, list[dict[str, object]]] = {}
    clamped: set[LatentKey] = set()
    first: dict[LatentKey | None, Trial] = {}
    steered, others = False, _others(run, judge, keys)
    for row in run.ledger.stream(keys, judge, activations=True):
        trial = row.trial
        first.setdefault(trial.latent, trial)
        by_latent.setdefault(trial.latent, []).append(_entry(row, others.get(trial.key, Verdicts())))
        clamped |= {i.latent for i in trial.interventions if i.mode == "clamp" and not i.value}
        steered = steered or bool(trial.interventions)
    head = _head(run, target, judge)
    settings = head["experiment_config"]
    assert isinstance(settings, dict)
    settings |= {"disable_steering": not steered, "n_features": len(by_latent)}
    return {
        **head,
        "results_by_feature": [
            {**_named(first[k]), "threshold": first[k].boost, "trials": trials, "error": None}
            for k, trials in by_latent.items()
        ],
        **({"ablated_latents": sorted(clamped, key=str), "num_ablated_latents": len(clamped)} if clamped else {}),
        "steerback": {
            "experiment": run.config.experiment,
            "condition": condition,
            "stage": stage,
            "digest": digest(run.config.of(target)),
            "facts": _facts(run, target, SMALL),
        },
    }


def _others(run: Run, judge: str, keys: Sequence[str]) -> dict[str, Verdicts]:
    """Return the verdicts of all judges except `judge`, and the window scores of all judges, by trial key."""
    verdicts: dict[str, Verdicts] = {}
    for name in run.ledger.judges():
        for key, scores in run.ledger.windows(name, keys).items():
            verdicts.setdefault(key, Verdicts()).windows.append(scores)
        for outline in run.ledger.outlines(judge=name, keys=keys) if name != judge else ():
            if outline.judgement is not None:
                verdicts.setdefault(outline.trial.key, Verdicts()).judgements[name] = outline.judgement
    return verdicts


def _named(trial: Trial) -> dict[str, object]:
    latent = NO_LATENT if trial.latent is None else trial.latent
    return {"feature_index_in_sae": latent, "feature_label": trial.label or f"feature_{latent}"}


def _entry(row: Row, others: Verdicts) -> dict[str, object]:
    trial, text, done = row.trial, row.judged_text, row.completion
    own: dict[str, object] = {
        "index": trial.index,
        "meta_prompt": trial.meta_prompt,
        "finish": row.finish or "unknown",
        "trial": TRIAL.dump_python(trial, mode="json"),
        "judgements": {name: _score(judged, text) for name, judged in others.judgements.items()},
        "windows": [WINDOWS.dump_python(scores, mode="json") for scores in others.windows],
    }
    if done is not None:
        blob = pack_array(done.activations)
        own["completion"] = {
            "text": done.text,
            "token_ids": list(done.token_ids),
            "prompt_tokens": done.prompt_tokens,
            "receipt": [done.receipt.prompt_positions, done.receipt.generated_positions, done.receipt.added_norm],
            "activations": None if blob is None else base64.b64encode(blob).decode(),
        }
    return {
        **_named(trial),
        "prompt": f"{trial.prompt} {trial.meta_prompt}".strip(),
        "threshold": trial.boost,
        "seed": trial.seed,
        "response": text if row.valid_receipt else "",
        "score": _score(row.judgement, text),
        "error": None if row.valid_receipt else "not generated, or not steered as planned",
        "steerback": own,
    }


def _score(judged: Judgement | None, text: str) -> dict[str, object]:
    if judged is None or judged.status == "unscored":
        return {"error": judged.reason if judged else "not judged"}
    return {
        "attempts": [
            {
                "attempt_text": text[a.start : a.end],
                "score": a.score,
                "phrase": a.phrase,
                "gated": a.gated,
                "start": a.start,
                "end": a.end,
            }
            for a in judged.attempts
        ]
    }
