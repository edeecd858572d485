"""The authors' result files as a run of ours, and a run of ours as such files.

After import every analysis and figure works on the ledger. The files hold no token ids, receipts or restart phrases,
and none are made up: the run's fact `imported` says so, and counts irregular trials.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.published.schema import (
    AuthorsFeature,
    AuthorsTrial,
    OwnTrial,
    Source,
    judgement_of,
    read_source,
    split_prompt,
)
from steerback.readers import read_json_table
from steerback.records import Completion, Intervention, Judgement, Latent, LatentKey, Receipt, Trial, digest
from steerback.store.facts import (
    IMPORTED,
    LATENTS,
    META_PROMPTS,
    SWEEP,
    UNSTEERED,
    ImportedFiles,
    MetaPromptSet,
    Selection,
    Sweep,
)
from steerback.store.files import make_folder
from steerback.store.ledger import Row
from steerback.store.manifest import ImportedFile
from steerback.store.run import Run, new_or_nothing, write_json

ENGINE = "imported"
SETS = {  # kinds of the files of one import: the experiment that they make up, condition of the plain files
    frozenset({"plain"}): ("esr", "steered"),
    frozenset({"sweep"}): ("boost-sweep", ""),
    frozenset({"unsteered"}): ("no-steering", "baseline"),
    frozenset({"plain", "unsteered"}): ("no-steering", "baseline"),
    frozenset({"variant"}): ("meta-prompts", "baseline"),
    frozenset({"plain", "variant"}): ("meta-prompts", "baseline"),
}
WHOLE = ("esr", "no-steering", "boost-sweep", "meta-prompts", "held-out")
"""Experiments that need nothing but trials and the facts that our exports hold."""
EXPORTED_FACTS = ("sweep", "meta-prompts")
SMALLEST_SD = 1e-6
"""Boosts are rounded and compared in steps of the standard deviation, so a smaller one tells none apart."""


@dataclass(frozen=True)
class Levels:
    """Boost levels of a sweep in standard deviations of the thresholds around their mean."""

    mean: float
    sd: float
    latents: int

    def of(self, boost: float | None) -> float:
        """The level of a boost."""
        if boost is None:
            raise SteerbackError("a trial of a sweep has no boost (its threshold field)")
        return round((boost - self.mean) / self.sd, 2)


@dataclass
class Imported:
    """The result of an import: the experiment it is analysed as, its trials, and counts of irregular ones."""

    experiment: str
    targets: list[str]
    judge: str
    counts: Counter[str] = field(default_factory=Counter)
    failed: set[tuple[str, str, LatentKey]] = field(default_factory=set)
    trials: dict[str, Trial] = field(default_factory=dict)
    completions: dict[str, Completion] = field(default_factory=dict)
    verdicts: dict[str, Judgement] = field(default_factory=dict)
    pairs: dict[tuple[str, LatentKey, str, int], int] = field(default_factory=dict)
    """Index of the n-th trial of a target, latent and prompt, the same in all conditions."""

    def lines(self) -> list[str]:
        """One line for the terminal."""
        counts = ", ".join(f"{n:,} {name}" for name, n in self.counts.items() if n)
        return [f"imported as {self.experiment}, targets {', '.join(self.targets)}, judge {self.judge}: {counts}"]


def import_authors(
    paths: Sequence[Path],
    folder: Path,
    target: str | None = None,
    judge: str | None = None,
    condition: str | None = None,
) -> Imported:
    """Write the files into the run `folder`.

    `target` and `judge` replace the names in the files; `condition` names the condition of all of them. Trials of
    several files are paired by latent, object-level prompt and their order. Everything is checked before the folder is
    made; a run of the same name must come from the same files.
    """
    for option, named in (("--target", target), ("--judge", judge), ("--condition", condition)):
        if named is not None and not named.strip():
            raise SteerbackError(f"{option} is empty; give it a name or leave it out")
    sources = [read_source(path, condition) for path in paths]
    if not sources:
        raise SteerbackError("name at least one result file to import")
    judges = {judge} if judge else {s.judge for s in sources}
    if len(judges) > 1:
        raise SteerbackError(
            f"the files were judged by {', '.join(sorted(judges))}; import one judge's files at a time"
        )
    experiment, plain = _experiment(sources)
    result = Imported(experiment, list(dict.fromkeys(target or s.model for s in sources)), judges.pop())
    for source in sources:
        used = condition or (plain if source.kind == "plain" else source.condition)
        _read(source, target or source.model, used, result)
    facts = _facts(sources, target, result)
    result.experiment = _analysable(result, facts)
    files: list[ImportedFile] = [{"file": s.path.name, "sha256": s.sha256} for s in sources]
    _same_files(folder, sources)
    with new_or_nothing(folder), Run.start(folder, _config(result, sources)) as run:
        run.write_manifest({"imported": files})
        run.ledger.add_trials(list(result.trials.values()))
        run.ledger.add_completions((key, completion, ENGINE) for key, completion in result.completions.items())
        run.ledger.add_judgements(result.verdicts.items())
        for (owner, name), value in facts.items():
            run.ledger.put_json(owner, name, value)
    return result


def _same_files(folder: Path, sources: Sequence[Source]) -> None:
    """Raise SteerbackError if the run exists and was imported from files with other hashes."""
    path = folder / "manifest.json"
    listed = read_json_table(path, "manifest").get("imported") if path.is_file() else None
    if not isinstance(listed, list):
        return
    before = {str(entry.get("sha256")) for entry in listed if isinstance(entry, dict)}
    if before != {s.sha256 for s in sources}:
        raise SteerbackError(f"run {folder.name!r} was imported from other files; choose another --name")


def _analysable(result: Imported, facts: Mapping[tuple[str, str], JsonValue]) -> str:
    """Return the experiment, or "imported" where a target lacks a condition or fact that its analysis reads."""
    needed = {"boost-sweep": SWEEP.name, "meta-prompts": META_PROMPTS.name}.get(result.experiment)
    unsteered = {t.target for t in result.trials.values() if t.condition == UNSTEERED}
    for name in result.targets:
        if (needed and (name, needed) not in facts) or (result.experiment == "no-steering" and name not in unsteered):
            return "imported"
    return result.experiment


def _experiment(sources: Sequence[Source]) -> tuple[str, str]:
    """The experiment of the files together, and the condition of the plain ones."""
    ours = {s.file.steerback.experiment for s in sources if s.kind == "ours" and s.file.steerback is not None}
    if ours:
        name = ours.pop()
        return (name if not ours and name in WHOLE else "imported"), "baseline"
    return SETS.get(frozenset(s.kind for s in sources), ("imported", "baseline"))


def _config(result: Imported, sources: Sequence[Source]) -> RunConfig:
    first = sources[0].file.experiment_config
    config = RunConfig(
        experiment=result.experiment,
        targets=tuple(result.targets),
        preset="authors",
        engine=ENGINE,
        judge=result.judge,
        n_latents=max(len({f.index for s in sources for f in s.file.results_by_feature}), 1),
    )
    calibration, sampling = config.calibration, config.sampling
    goal, tokens = first.target_score_normalized, first.max_completion_tokens
    if goal is not None and 0 < goal < 1:
        calibration = calibration.model_copy(update={"target_score": 100 * goal})
    if tokens is not None and tokens > 0:
        sampling = sampling.model_copy(update={"max_new_tokens": tokens})
    return config.model_copy(update={"calibration": calibration, "sampling": sampling})


def _read(source: Source, target: str, condition: str, result: Imported) -> None:
    """Add a file's trials to the result; a trial that is there already is not counted again."""
    seen: Counter[tuple[str, LatentKey, str]] = Counter()
    levels = _levels(source)
    for feature in source.file.results_by_feature:
        if feature.error:
            result.failed.add((target, condition, feature.index))
        for entry in feature.trials or []:
            trial = _trial(source, feature, entry, target, condition, levels, seen, result.pairs)
            if trial.key in result.trials:
                if result.trials[trial.key] != trial:
                    raise SteerbackError(
                        f"{source.path}: trial {trial.key} is another one than in a file before it; import the files "
                        "of one condition apart, with a --condition each"
                    )
                continue
            completion, judgement, lost = _answer(entry, result.judge)
            result.trials[trial.key], result.completions[trial.key] = trial, completion
            if judgement is not None:
                result.verdicts[trial.key] = judgement
            result.counts["trials"] += 1
            result.counts["trials without a response"] += completion.finish == "error"
            result.counts["unscored"] += judgement is not None and judgement.status == "unscored"
            result.counts["attempts whose text does not occur in the response"] += lost
    result.counts["latents that failed"] = len(result.failed)


def _trial(
    source: Source,
    feature: AuthorsFeature,
    entry: AuthorsTrial,
    target: str,
    condition: str,
    levels: Levels | None,
    seen: Counter[tuple[str, LatentKey, str]],
    pairs: dict[tuple[str, LatentKey, str, int], int],
) -> Trial:
    """One trial; its index is the same in all conditions for the n-th trial of a latent and prompt."""
    ours = entry.steerback or OwnTrial()
    prompt, meta = split_prompt(entry.prompt, source.file.variant.template, feature.text)
    if ours.meta_prompt is not None:
        meta = ours.meta_prompt
        prompt = entry.prompt.removesuffix(meta).strip()
    boost = feature.boost(entry)
    if levels is not None:
        condition = Sweep.condition(levels.of(boost))
    place = (condition, feature.index, prompt)
    pair = (target, feature.index, prompt, seen[place])
    seen[place] += 1
    number = ours.index if ours.index is not None else pairs.setdefault(pair, len(pairs))
    edits = [Intervention("add", feature.index, boost)] if boost and source.kind != "unsteered" else []
    edits += [Intervention("clamp", key, 0.0) for key in source.file.ablated_latents or []]
    return Trial(
        key=f"{target}/measure/{condition}/{number}",
        target=target,
        stage="measure",
        condition=condition,
        index=number,
        prompt=prompt,
        seed=entry.seed or 0,
        latent=feature.index,
        label=feature.label,
        meta_prompt=meta,
        interventions=tuple(edits),
    )


def _answer(entry: AuthorsTrial, judge: str) -> tuple[Completion, Judgement | None, int]:
    if entry.response is None or (entry.error and not entry.response):
        return Completion("", (), 0, "error", Receipt()), None, 0
    judgement, lost = judgement_of({"error": entry.error} if entry.error else entry.score, entry.response, judge)
    finish = (entry.steerback or OwnTrial()).finish
    return Completion(entry.response, (), 0, finish, Receipt()), judgement, lost


def _levels(source: Source) -> Levels | None:
    """The levels of a sweep; None for other files."""
    if source.kind != "sweep":
        return None
    features, stats = source.file.results_by_feature, source.file.threshold_cache_stats
    if stats is not None and stats.mean is not None and stats.std:
        mean, sd = stats.mean, stats.std
    else:
        own = [f.threshold for f in features if f.threshold is not None]
        if len(own) < 2:
            raise SteerbackError(f"{source.path}: a sweep needs threshold_cache_stats or at least two thresholds")
        mean, sd = float(np.mean(own)), float(np.std(own))
    if not (math.isfinite(mean) and SMALLEST_SD < sd < math.inf):
        raise SteerbackError(
            f"{source.path}: the standard deviation of the thresholds is {sd:g}, so its boosts have no levels; "
            "give threshold_cache_stats a finite mean and a std above 0"
        )
    return Levels(mean, sd, len(features))


def _facts(sources: Sequence[Source], target: str | None, result: Imported) -> dict[tuple[str, str], JsonValue]:
    """Return the facts that analyses read besides the trials, by target and name, in the form they are stored in."""
    facts: dict[tuple[str, str], JsonValue] = {}
    for name in result.targets:
        own = [s for s in sources if (target or s.model) == name]
        chosen = {f.index: f.label for s in own for f in s.file.results_by_feature}
        latents = [Latent(key, label) for key, label in chosen.items()]
        facts[name, LATENTS.name] = LATENTS.dump(Selection(chosen=latents, counts={"imported": len(latents)}))
        for source in own:
            for fact, value in ((source.file.steerback and source.file.steerback.facts) or {}).items():
                facts[name, fact] = _own_fact(source, fact, value)
        sweeps = [(s, levels) for s in own if (levels := _levels(s)) is not None]
        if sweeps:
            first = sweeps[0][1]
            grid = {
                levels.of(f.boost(t)) for s, levels in sweeps for f in s.file.results_by_feature for t in f.trials or []
            }
            swept = Sweep(
                mean=first.mean, sd=first.sd, latents=first.latents, levels=sorted(grid), dropped={}, boosts="absolute"
            )
            facts[name, SWEEP.name] = SWEEP.dump(swept)
        if result.experiment == "meta-prompts" and not any(s.kind == "ours" for s in own):
            texts = {s.condition: s.file.variant.template for s in own if s.kind == "variant"}
            variants = MetaPromptSet(variants=texts, cells_without_label=0, parameters=None)
            facts[name, META_PROMPTS.name] = META_PROMPTS.dump(variants)
    facts["", IMPORTED.name] = IMPORTED.dump(
        ImportedFiles(files=[s.path.name for s in sources], counts=dict(result.counts))
    )
    return facts


def _own_fact(source: Source, name: str, value: JsonValue) -> JsonValue:
    """Return a fact of one of our exports, checked. Raises SteerbackError for facts that exports do not hold."""
    if name == SWEEP.name:
        return SWEEP.dump(SWEEP.load(value, str(source.path)))
    if name == META_PROMPTS.name:
        return META_PROMPTS.dump(META_PROMPTS.load(value, str(source.path)))
    raise SteerbackError(
        f"{source.path}: steerback.facts holds {name[:80]!r}; an export holds {' and '.join(EXPORTED_FACTS)} alone"
    )


def export_authors(run: Run, folder: Path, judge: str) -> list[Path]:
    """Write one file in the authors' form for each target and condition of the measured trials."""
    make_folder(folder)
    paths = []
    for target, condition in run.ledger.conditions():
        rows = run.ledger.rows(target, "measure", condition, judge)
        body = _body(run, target, condition, judge, rows)
        safe = "".join(c if c.isalnum() or c in "+-." else "_" for c in f"{target}_{condition}")
        paths.append(write_json(folder / f"experiment_results_{safe}.json", body))
    return paths


def _body(run: Run, target: str, condition: str, judge: str, rows: Sequence[Row]) -> dict[str, object]:
    by_latent: dict[LatentKey | None, list[Row]] = {}
    for row in rows:
        by_latent.setdefault(row.trial.latent, []).append(row)
    config = run.config
    clamped = {i.latent for row in rows for i in row.trial.interventions if i.mode == "clamp"}
    facts = {name: value for owner, name, value in run.ledger.facts() if owner == target and name in EXPORTED_FACTS}
    return {
        "experiment_config": {
            "model_name": target,
            "prompts_file": config.prompts,
            "judge_model_name": judge,
            "disable_steering": not any(row.trial.interventions for row in rows),
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


def _feature(rows: Sequence[Row]) -> dict[str, object]:
    first = rows[0].trial
    return {**_named(first), "threshold": first.boost, "trials": [_entry(row) for row in rows], "error": None}


def _named(trial: Trial) -> dict[str, object]:
    return {"feature_index_in_sae": trial.latent, "feature_label": trial.label or f"feature_{trial.latent}"}


def _entry(row: Row) -> dict[str, object]:
    trial, judged, text = row.trial, row.judgement, row.judged_text
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
            "finish": row.completion.finish if row.completion else "unknown",
        },
    }
