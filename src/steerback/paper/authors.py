"""The authors' result files as a run of ours, and a run of ours as such files.

After import every analysis and figure works on the ledger. What the files do not hold (token ids, receipts, restart
phrases) is not made up: the run's fact `imported` says so, and counts what was irregular.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.paper.schema import (
    LARGEST,
    Source,
    judgement_of,
    label_of,
    read_source,
    split_prompt,
    threshold_of,
)
from steerback.records import Completion, FinishReason, Intervention, Judgement, Receipt, Trial, digest
from steerback.store.files import make_folder
from steerback.store.ledger import Ledger, Row
from steerback.store.run import Run, write_json

ENGINE = "imported"
SETS = {  # what the kinds of the files of one import come to: experiment, condition of the plain files
    frozenset({"plain"}): ("esr", "steered"),
    frozenset({"sweep"}): ("boost-sweep", ""),
    frozenset({"unsteered"}): ("no-steering", "baseline"),
    frozenset({"plain", "unsteered"}): ("no-steering", "baseline"),
    frozenset({"variant"}): ("meta-prompts", "baseline"),
    frozenset({"plain", "variant"}): ("meta-prompts", "baseline"),
}

WHOLE = (
    "esr",
    "no-steering",
    "boost-sweep",
    "meta-prompts",
    "held-out",
)  # nothing but trials and these facts is needed


@dataclass
class Imported:
    """What came in: the experiment it is analysed as, and how many trials were regular and were not."""

    experiment: str
    targets: list[str]
    judge: str
    counts: Counter[str] = field(default_factory=Counter)
    failed: set[tuple[str, str, Any]] = field(default_factory=set)

    def lines(self) -> list[str]:
        said = ", ".join(f"{n:,} {what}" for what, n in self.counts.items() if n)
        return [f"imported as {self.experiment}, targets {', '.join(self.targets)}, judge {self.judge}: {said}"]


def import_authors(
    paths: Sequence[Path],
    folder: Path,
    target: str | None = None,
    judge: str | None = None,
    condition: str | None = None,
) -> Imported:
    """Writes the files into the run `folder` and returns what was found.

    `target` and `judge` replace the names in the files; `condition` names the condition of all of them. Trials of
    several files are paired by latent, object-level prompt and their order.
    """
    sources = [read_source(path, condition) for path in paths]
    if not sources:
        raise SteerbackError("name at least one result file to import")
    judges = {judge} if judge else {s.judge for s in sources}
    if len(judges) > 1:
        raise SteerbackError(
            f"the files were judged by {', '.join(sorted(judges))}; import one judge's files at a time"
        )
    experiment, plain = _experiment(sources)
    found = Imported(experiment, list(dict.fromkeys(target or s.model for s in sources)), judges.pop())
    pairs: dict[tuple[Any, ...], int] = {}
    entries: dict[str, Entry] = {}
    for source in sources:
        used = condition or (plain if source.kind == "plain" else source.condition)
        _read(source, target or source.model, used, found, pairs, entries)
    with Run.start(folder, _config(found, sources)) as run:
        run.ledger.add_trials([trial for trial, _, _ in entries.values()])
        run.ledger.add_completions((key, completion, ENGINE) for key, (_, completion, _) in entries.items())
        run.ledger.add_judgements((key, verdict) for key, (_, _, verdict) in entries.items() if verdict is not None)
        _facts(run.ledger, sources, target, found)
        run.write_manifest({"imported": [{"file": s.path.name, "sha256": s.sha256} for s in sources]})
    return found


def _experiment(sources: Sequence[Source]) -> tuple[str, str]:
    ours = {str((s.body.get("steerback") or {}).get("experiment")) for s in sources if s.kind == "ours"}
    if ours:
        name = ours.pop()
        return (name if not ours and name in WHOLE else "imported"), "baseline"
    return SETS.get(frozenset(s.kind for s in sources), ("imported", "baseline"))


def _config(found: Imported, sources: Sequence[Source]) -> RunConfig:
    first = sources[0].config
    base = RunConfig(
        experiment=found.experiment, targets=tuple(found.targets), preset="authors", engine=ENGINE, judge=found.judge
    )
    changes: dict[str, Any] = {"n_latents": max(len({_index(f) for s in sources for f in s.features}), 1)}
    goal = threshold_of(first.get("target_score_normalized"))
    if goal is not None and 0 < goal < 1:
        changes["calibration"] = base.calibration.model_copy(update={"target_score": 100 * goal})
    tokens = first.get("max_completion_tokens")
    if isinstance(tokens, int) and tokens > 0:
        changes["sampling"] = base.sampling.model_copy(update={"max_new_tokens": tokens})
    return base.model_copy(update=changes)


def _index(feature: Mapping[str, Any]) -> Any:
    index = feature.get("feature_index_in_sae")
    valid = 0 <= index <= LARGEST if isinstance(index, int) else isinstance(index, str)
    if not valid or isinstance(index, bool):
        raise SteerbackError(f"a feature has no valid feature_index_in_sae: {index!r}")
    return index


Entry = tuple[Trial, Completion, Judgement | None]


def _read(
    source: Source,
    target: str,
    condition: str,
    found: Imported,
    pairs: dict[tuple[Any, ...], int],
    entries: dict[str, Entry],
) -> None:
    """Adds what a file holds to the `entries` of all files, by trial; what is there already is not counted again."""
    seen: Counter[tuple[Any, ...]] = Counter()
    levels = _levels(source)
    for feature in source.features:
        index = _index(feature)
        if feature.get("error"):
            found.failed.add((target, condition, index))
        for entry in feature.get("trials") or []:
            trial = _trial(source, feature, index, entry, target, condition, levels, seen, pairs)
            if trial.key in entries:
                if entries[trial.key][0] != trial:
                    raise SteerbackError(
                        f"{source.path}: trial {trial.key} is another one than in a file before it; import the files "
                        "of one condition apart, with a --condition each"
                    )
                continue
            completion, judgement, lost = _answer(entry, found.judge)
            entries[trial.key] = (trial, completion, judgement)
            found.counts["trials"] += 1
            found.counts["trials without a response"] += completion.finish == "error"
            found.counts["unscored"] += judgement is not None and judgement.status == "unscored"
            found.counts["attempts whose text does not occur in the response"] += lost
    found.counts["latents that failed"] = len(found.failed)


def _trial(
    source: Source,
    feature: Mapping[str, Any],
    index: Any,
    entry: Mapping[str, Any],
    target: str,
    condition: str,
    levels: Mapping[str, float] | None,
    seen: Counter[tuple[Any, ...]],
    pairs: dict[tuple[Any, ...], int],
) -> Trial:
    """One trial; its index is the same in all conditions for the n-th trial of a latent and prompt."""
    label = label_of(feature, index)
    ours = entry.get("steerback") or {}  # what our own exports say beside
    whole, said = str(entry.get("prompt") or ""), str(feature.get("feature_label") or "")
    prompt, meta = split_prompt(whole, source.template, said)
    if "meta_prompt" in ours:
        meta = str(ours["meta_prompt"])
        prompt = whole.removesuffix(meta).strip()
    boost = threshold_of(entry.get("threshold", feature.get("threshold")))
    steered = boost is not None and boost != 0 and source.kind != "unsteered"
    if levels is not None:
        from steerback.experiments.boost_sweep import condition as level_name

        condition = level_name(_level(boost, levels))
    place = (target, condition, index, prompt)
    pair = (target, index, prompt, seen[place])
    seen[place] += 1
    number = ours["index"] if isinstance(ours.get("index"), int) else pairs.setdefault(pair, len(pairs))
    edits = [Intervention("add", index, boost)] if steered and boost is not None else []
    edits += [Intervention("clamp", k, 0.0) for k in source.body.get("ablated_latents") or []]
    seed = entry.get("seed")
    return Trial(
        key=f"{target}/measure/{condition}/{number}",
        target=target,
        stage="measure",
        condition=condition,
        index=number,
        prompt=prompt,
        seed=seed if isinstance(seed, int) else 0,
        latent=index,
        label=label,
        boost=0.0 if source.kind == "unsteered" else boost,
        meta_prompt=meta,
        interventions=tuple(edits),
    )


def _answer(entry: Mapping[str, Any], judge: str) -> tuple[Completion, Judgement | None, int]:
    response, error = entry.get("response"), entry.get("error")
    if not isinstance(response, str) or (error and not response):
        return Completion("", (), 0, "error", Receipt()), None, 0
    score = {"error": error} if error else entry.get("score")
    judgement, lost = judgement_of(score, response, judge)
    said = (entry.get("steerback") or {}).get("finish")
    finish: FinishReason = "length" if said == "length" else "stop" if said == "stop" else "unknown"
    return Completion(response, (), 0, finish, Receipt()), judgement, lost


def _levels(source: Source) -> dict[str, float] | None:
    """Mean and sd of thresholds that a sweep's boosts are normalised by."""
    if source.kind != "sweep":
        return None
    import numpy as np

    stats = source.body.get("threshold_cache_stats") or {}
    own = [t for f in source.features if (t := threshold_of(f.get("threshold"))) is not None]
    mean, sd = threshold_of(stats.get("mean")), threshold_of(stats.get("std"))
    if mean is None or not sd:
        if len(own) < 2:
            raise SteerbackError(f"{source.path}: a sweep needs threshold_cache_stats or at least two thresholds")
        mean, sd = float(np.mean(own)), float(np.std(own))
    return {"mean": mean, "sd": sd, "latents": len(source.features)}


def _level(boost: float | None, levels: Mapping[str, float]) -> float:
    if boost is None:
        raise SteerbackError("a trial of a sweep has no boost (its threshold field)")
    return round((boost - levels["mean"]) / levels["sd"], 2)


def _facts(ledger: Ledger, sources: Sequence[Source], target: str | None, found: Imported) -> None:
    """What the analyses read beside the trials."""
    for name in found.targets:
        own = [s for s in sources if (target or s.model) == name]
        chosen = {_index(f): label_of(f, _index(f)) for s in own for f in s.features}
        latents = [{"key": key, "label": label} for key, label in chosen.items()]
        ledger.set_fact(name, "latents", {"chosen": latents, "counts": {"imported": len(latents)}})
        for source in own:
            for fact, value in ((source.body.get("steerback") or {}).get("facts") or {}).items():
                ledger.set_fact(name, str(fact), value)
        sweeps = [levels for s in own if (levels := _levels(s)) is not None]
        if sweeps:
            names = {c for t, c in ledger.conditions() if t == name}
            grid = sorted(float(c.split()[0]) for c in names)
            ledger.set_fact(name, "sweep", {**sweeps[0], "levels": grid, "dropped": {}, "boosts": "absolute"})
        if found.experiment == "meta-prompts" and not any(s.kind == "ours" for s in own):
            texts = {s.condition: s.template for s in own if s.kind == "variant"}
            fact = {"variants": texts, "cells_without_label": 0, "parameters": None}
            ledger.set_fact(name, "meta-prompts", fact)
    ledger.set_fact("", "imported", {"files": [s.path.name for s in sources], "counts": dict(found.counts)})


def export_authors(run: Run, folder: Path, judge: str) -> list[Path]:
    """One file in the authors' form per target and condition of the measured trials."""
    make_folder(folder)
    paths = []
    for target, condition in run.ledger.conditions():
        rows = run.ledger.rows(target, "measure", condition, judge)
        body = _body(run, target, condition, judge, rows)
        safe = "".join(c if c.isalnum() or c in "+-." else "_" for c in f"{target}_{condition}")
        paths.append(write_json(folder / f"experiment_results_{safe}.json", body))
    return paths


def _body(run: Run, target: str, condition: str, judge: str, rows: Sequence[Row]) -> dict[str, Any]:
    features: dict[Any, dict[str, Any]] = {}
    for row in rows:
        trial = row.trial
        label = trial.label or f"feature_{trial.latent}"
        feature = features.setdefault(
            trial.latent,
            {
                "feature_index_in_sae": trial.latent,
                "feature_label": label,
                "threshold": trial.boost,
                "trials": [],
                "error": None,
            },
        )
        feature["trials"].append({"feature_index_in_sae": trial.latent, "feature_label": label, **_entry(row)})
    config = run.config
    clamped = {i.latent for row in rows for i in row.trial.interventions if i.mode == "clamp"}
    facts = ("sweep", "meta-prompts")
    return {
        "experiment_config": {
            "model_name": target,
            "prompts_file": config.prompts,
            "judge_model_name": judge,
            "disable_steering": not any(row.trial.interventions for row in rows),
            "target_score_normalized": config.calibration.target_score / 100,
            "max_completion_tokens": config.sampling.max_new_tokens,
            "n_trials_per_feature": config.trials_per_latent,
            "n_features": len(features),
        },
        "results_by_feature": list(features.values()),
        **({"ablated_latents": sorted(clamped, key=str), "num_ablated_latents": len(clamped)} if clamped else {}),
        "steerback": {
            "experiment": config.experiment,
            "condition": condition,
            "config": digest(config),
            "facts": {name: value for name in facts if (value := run.ledger.fact(target, name)) is not None},
        },
    }


def _entry(row: Row) -> dict[str, Any]:
    trial, judged = row.trial, row.judgement
    error = None if row.valid_receipt else "not generated, or not steered as planned"
    if judged is None or judged.status == "unscored":
        score: dict[str, Any] = {"error": judged.reason if judged else "not judged"}
    else:
        text = row.judged_text
        score = {
            "attempts": [
                {"attempt_text": text[a.start : a.end], "score": a.score, "phrase": a.phrase, "gated": a.gated}
                for a in judged.attempts
            ]
        }
    return {
        "prompt": f"{trial.prompt} {trial.meta_prompt}".strip(),
        "threshold": trial.boost,
        "seed": trial.seed,
        "response": row.judged_text if row.valid_receipt else "",
        "score": score,
        "error": error,
        "steerback": {
            "index": trial.index,
            "meta_prompt": trial.meta_prompt,
            "finish": row.completion.finish if row.completion else "unknown",
        },
    }
