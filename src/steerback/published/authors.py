"""Import of the authors' result files as a run. Files of the same model are pooled, as in the authors' plots.

All analyses and figures work on the imported ledger. The files contain no token ids, receipts or restart phrases, and
the import does not invent them: the fact `imported` marks the run and counts irregular trials. Files are read one
latent at a time, so memory does not grow with their size.
"""

from __future__ import annotations

import base64
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from steerback.config import RunConfig, authors, parse_config
from steerback.data.paper_files import PROMPTS
from steerback.errors import SteerbackError, one_line
from steerback.published.imported_facts import facts_of, levels_of
from steerback.published.schema import AuthorsFeature, AuthorsTrial, OwnTrial, judgement_of, split_prompt
from steerback.published.sources import (
    FEATURES,
    NO_JUDGE,
    Ablations,
    Source,
    TrialNumbers,
    ablations,
    named,
    read_source,
)
from steerback.readers import read_json_table
from steerback.records import Completion, Intervention, Judgement, LatentKey, Receipt, Trial, WindowScores
from steerback.store.database import unpack_array
from steerback.store.facts import (
    ABLATED,
    BASELINE,
    CONTINUATION,
    META_PROMPTS,
    SWEEP,
    UNSTEERED,
    ControlSets,
    Sweep,
)
from steerback.store.manifest import ImportedFile
from steerback.store.run import Run, new_or_nothing

ENGINE = "imported"
SETS = {  # kinds of the imported files: (experiment, condition of the plain files)
    frozenset({"plain"}): ("esr", "steered"),
    frozenset({"sweep"}): ("boost-sweep", ""),
    frozenset({"unsteered"}): ("no-steering", BASELINE),
    frozenset({"plain", "unsteered"}): ("no-steering", BASELINE),
    frozenset({"variant"}): ("meta-prompts", BASELINE),
    frozenset({"plain", "variant"}): ("meta-prompts", BASELINE),
    frozenset({"plain", "ablated"}): ("detector-ablation", BASELINE),
    frozenset({"plain", "ablated", "random"}): ("random-ablation", BASELINE),
}
WHOLE = ("esr", "no-steering", "boost-sweep", "meta-prompts", "held-out")
"""Experiments whose analysis needs only trials and exported facts."""
BATCH = 500
"""Number of trials in one write to the ledger."""
KNOWN: Mapping[str, tuple[str, float]] = {
    "calibration.target_score": ("target_score_normalized", 100),
    "calibration.max_iterations": ("threshold_n_trials", 1),
    "calibration.trials_per_iteration": ("threshold_samples_per_trial", 1),
    "sampling.max_new_tokens": ("max_completion_tokens", 1),
    "trials_per_latent": ("n_trials_per_feature", 1),
    "selection.concreteness_threshold": ("min_feature_concreteness", 1),
}
"""Maps a setting of a run to the field of the authors' settings and the factor between the two values."""
GENERATED = ("sampling", "calibration", "selection", "seeds")
"""Groups of settings that affect responses. A setting of these groups is unknown if the files do not contain it."""


@dataclass(frozen=True)
class OwnCompletion:
    """A response in an export of steerback. `activations` are packed (`store.database.pack_array`), in base64."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    receipt: tuple[int, int, float]
    activations: str | None = None


TRIAL: TypeAdapter[Trial] = TypeAdapter(Trial)
WINDOWS: TypeAdapter[WindowScores] = TypeAdapter(WindowScores)
COMPLETION: TypeAdapter[OwnCompletion] = TypeAdapter(OwnCompletion)


@dataclass
class Imported:
    """Result of an import: the experiment whose analysis applies, and counts of irregular trials."""

    experiment: str
    targets: list[str]
    judge: str
    counts: Counter[str] = field(default_factory=Counter)
    failed: set[tuple[str, str, LatentKey]] = field(default_factory=set)
    levels: dict[str, set[float]] = field(default_factory=dict)
    """Boost levels of a sweep by target."""

    def counted(self, entry: ImportedTrial) -> ImportedTrial:
        """Count a trial and return it."""
        done, verdicts = entry.completion, entry.judgements
        self.counts["trials"] += 1
        self.counts["trials without a response"] += done is None or done.finish == "error"
        self.counts["unscored"] += any(v.status == "unscored" and v.judge == self.judge for v in verdicts)
        return entry

    def lines(self) -> list[str]:
        """Return the line to print."""
        counts = ", ".join(f"{n:,} {name}" for name, n in self.counts.items() if n)
        return [f"imported as {self.experiment}, targets {', '.join(self.targets)}, judge {self.judge}: {counts}"]


def import_authors(
    paths: Sequence[Path],
    folder: Path,
    target: str | None = None,
    judge: str | None = None,
    condition: str | None = None,
    detectors: Sequence[int] | None = None,
) -> Imported:
    """Import result files into the run `folder`.

    `target` and `judge` replace the names in the files. `condition` is the condition of all files. `detectors` is
    the ablated set that contains the detectors, if the files ablate several sets. Trials of the same condition are
    pooled, and paired across conditions (`TrialNumbers`). Duplicate files count once.

    Raises SteerbackError for an invalid file, before the folder is created, and if the folder contains a run that was
    imported from other files.
    """
    for option, name in (("--target", target), ("--judge", judge), ("--condition", condition)):
        if name is not None and not name.strip():
            raise SteerbackError(f"{option} is empty; add a name or leave the option out")
    sources = list({s.sha256: s for s in (read_source(path, condition) for path in paths)}.values())
    if not sources:
        raise SteerbackError("no result file to import; name at least one")
    judges = {judge} if judge else {s.judge for s in sources}
    if len(judges) > 1:
        raise SteerbackError(
            f"the files were judged by {', '.join(sorted(judges))}; import one judge's files at a time"
        )
    sets = Ablations() if condition else ablations(sources, detectors)
    sources = sources if condition else named(sources, sets)
    experiment, plain = _experiment(sources, sets)
    result = Imported(experiment, list(dict.fromkeys(target or s.model for s in sources)), judges.pop())
    result.experiment = _analysable(result, sources, target)
    _same_files(folder, sources)
    config, unknown = _config(result, sources, target)
    if not any(s.trials for s in sources):
        names = ", ".join(s.path.name for s in sources)
        raise SteerbackError(f"no trials to import: {FEATURES} is empty in {names}; name a file with results")
    with new_or_nothing(folder), Run.start(folder, config) as run:
        pairs = TrialNumbers()
        for source in sources:
            used = condition or (plain if source.kind == "plain" else source.condition)
            _write(run, _trials(source, target or source.model, used, result, pairs))
        result.counts["latents that failed"] = len(result.failed)
        files: list[ImportedFile] = [{"file": s.path.name, "sha256": s.sha256} for s in sources]
        run.write_manifest({"imported": files, "unknown settings": unknown})
        for (owner, name), value in facts_of(sources, target, result, sets, unknown).items():
            run.ledger.put_json(owner, name, value)
    return result


class ImportedTrial(NamedTuple):
    """A trial with its response, verdicts and window scores."""

    trial: Trial
    completion: Completion | None
    judgements: Sequence[Judgement] = ()
    windows: Sequence[WindowScores] = ()


def _write(run: Run, entries: Iterable[ImportedTrial]) -> None:
    """Write trials with their responses and verdicts to the ledger, `BATCH` trials at a time."""
    batch: list[ImportedTrial] = []

    def flush() -> None:
        run.ledger.add_trials([entry.trial for entry in batch])
        run.ledger.add_completions((trial.key, done, ENGINE) for trial, done, *_ in batch if done is not None)
        run.ledger.add_judgements((entry.trial.key, verdict) for entry in batch for verdict in entry.judgements)
        run.ledger.add_windows((entry.trial.key, scores) for entry in batch for scores in entry.windows)
        batch.clear()

    for entry in entries:
        batch.append(entry)
        if len(batch) == BATCH:
            flush()
    flush()


def _same_files(folder: Path, sources: Sequence[Source]) -> None:
    """Raise SteerbackError if the run exists and was imported from files with other hashes."""
    path = folder / "manifest.json"
    listed = read_json_table(path, "manifest").get("imported") if path.is_file() else None
    if not isinstance(listed, list):
        return
    before = {str(entry.get("sha256")) for entry in listed if isinstance(entry, dict)}
    if before != {s.sha256 for s in sources}:
        raise SteerbackError(f"run {folder.name!r} was imported from other files; choose another --name")


def _experiment(sources: Sequence[Source], sets: Ablations) -> tuple[str, str]:
    """Return the experiment of all files together, and the condition of the plain files."""
    ours = {s.file.steerback.experiment for s in sources if s.kind == "ours" and s.file.steerback is not None}
    if ours:
        name = ours.pop()
        whole = name in WHOLE or any(_settings_of(s) is not None for s in sources)
        return (name if not ours and whole else "imported"), BASELINE
    kinds: set[str] = {s.kind for s in sources}
    if sets.random:
        kinds |= {"random"}
        kinds -= set() if sets.detectors else {"ablated"}
    return SETS.get(frozenset(kinds), ("imported", BASELINE))


def _analysable(result: Imported, sources: Sequence[Source], target: str | None) -> str:
    """Return the experiment, or "imported" if a target lacks a condition or fact that the analysis needs."""
    needed: dict[str, set[str]] = {
        "no-steering": {UNSTEERED},
        "detector-ablation": {ABLATED},
        "random-ablation": {ABLATED, ControlSets.condition(1)},
    }
    complete = [s for s in sources if _settings_of(s) is not None]
    if complete and target is None:
        given = Counter(s.model for s in sources if s not in complete)
        whole = all(given[s.model] == ((s.file.steerback and s.file.steerback.files) or 0) for s in complete)
        return result.experiment if whole else "imported"
    fact = {"boost-sweep": SWEEP.name, "meta-prompts": META_PROMPTS.name}.get(result.experiment)
    for name in result.targets:
        own = [s for s in sources if (target or s.model) == name]
        facts = {f for s in own for f in ((s.file.steerback and s.file.steerback.facts) or {})}
        facts |= {SWEEP.name for s in own if s.kind == "sweep"}
        facts |= {META_PROMPTS.name} if not any(s.kind == "ours" for s in own) else set()
        conditions = {s.condition for s in own if s.trials}
        if (fact and fact not in facts) or not needed.get(result.experiment, set()) <= conditions:
            return "imported"
    return result.experiment


def _config(result: Imported, sources: Sequence[Source], target: str | None) -> tuple[RunConfig, list[str]]:
    """Return the config with the settings in the files, by target, and the names of unknown settings.

    An unknown setting has the value of preset `authors` in the config, which has no meaning.
    """
    own_settings = [x for s in sources if (x := _settings_of(s)) is not None]
    if own_settings and target is None and all(x == own_settings[0] for x in own_settings):
        values = own_settings[0] | {"engine": ENGINE, "engine_options": {}, "from_run": None, "judge": result.judge}
        if result.experiment == "imported":
            values |= {"experiment": "imported", "options": {}}
        return parse_config(values, "settings of the files"), []
    values = authors(result.experiment, ("imported",)).model_dump(mode="json")
    values |= {"targets": result.targets, "engine": ENGINE, "judge": result.judge}
    unknown = {f"{group}.{key}" for group in GENERATED for key in _group(values, group)} - KNOWN.keys()
    unknown |= {"reference_responses", "floor_responses"} | ({"judge"} if result.judge == NO_JUDGE else set())
    prompts = {s.file.experiment_config.prompts_file for s in sources}
    if len(prompts) > 1 or not all(prompts):
        unknown.add("prompts")
    else:
        (name,) = prompts
        values["prompts"] = "authors" if Path(name).name == PROMPTS else name
    rows: dict[str, dict[str, object]] = {}
    for owner in result.targets:
        own = [s for s in sources if (target or s.model) == owner]
        row = rows[owner] = {"n_latents": max(len({key for s in own for key in s.labels}), 1)}
        for key, value in _settings(own).items():
            group, _, name = key.rpartition(".")
            if value is None:
                unknown.add(key)
            elif group:
                row[group] = {**_group(row, group), name: value}
            else:
                row[name] = value
    if "selection.concreteness_threshold" not in unknown:
        unknown.discard("selection.concreteness")
    first = rows[result.targets[0]]
    values |= {key: {**_group(values, key), **x} if isinstance(x, dict) else x for key, x in first.items()}
    values["by_target"] = {owner: row for owner, row in rows.items() if row != first}
    return parse_config(values, "settings of the files"), sorted(unknown)


def _settings_of(source: Source) -> dict[str, object] | None:
    """Return the settings of the exported run, if this file contains its facts; else None."""
    own = source.file.steerback
    return dict(own.config) if own is not None and isinstance(own.config, dict) else None


def _group(values: Mapping[str, object], name: str) -> dict[str, object]:
    group = values.get(name)
    return group if isinstance(group, dict) else {}


def _settings(sources: Sequence[Source]) -> dict[str, float | None]:
    """Return the value of each setting in `KNOWN`; None (unknown) if the files of a target differ."""
    agreed: dict[str, float | None] = {}
    for key, (name, factor) in KNOWN.items():
        given = {getattr(s.file.experiment_config, name) for s in sources}
        value = given.pop() if len(given) == 1 else None
        usable = value is not None and value > 0 and (factor == 1 or value < 1)
        agreed[key] = value * factor if value is not None and usable else None
    return agreed


def _trials(
    source: Source, target: str, condition: str, result: Imported, pairs: TrialNumbers
) -> Iterator[ImportedTrial]:
    """Yield the trials of a file with their responses and verdicts, and count irregular trials."""
    levels = levels_of(source)
    for feature in source.features():
        if feature.error:
            result.failed.add((target, condition, feature.index))
        entries = feature.trials or []
        if source.kind == "ours" and all((x.steerback or OwnTrial()).trial is not None for x in entries):
            yield from (result.counted(_own_entry(source, entry, target, result.judge)) for entry in entries)
            continue
        split = [_prompts(source, feature, entry) for entry in entries]
        boosts = [feature.boost(entry) for entry in entries]
        if levels is not None:
            result.levels.setdefault(target, set()).update(levels.of(boost) for boost in boosts)
        places = [condition if levels is None else Sweep.condition(levels.of(boost)) for boost in boosts]
        numbers = pairs.numbers(
            target,
            feature.index,
            [
                (place, prompt, entry.seed, (entry.steerback or OwnTrial()).index)
                for place, (prompt, _), entry in zip(places, split, entries, strict=True)
            ],
            str(source.path),
        )
        for entry, place, (prompt, meta), boost, number in zip(entries, places, split, boosts, numbers, strict=True):
            edits = [Intervention("add", feature.index, boost)] if boost and source.kind != "unsteered" else []
            edits += [Intervention("clamp", key, 0.0) for key in source.file.ablated_latents or []]
            trial = Trial(
                key=f"{target}/measure/{place}/{number}",
                target=target,
                stage="measure",
                condition=place,
                index=number,
                prompt=prompt,
                seed=entry.seed or 0,
                latent=feature.index,
                label=feature.label,
                meta_prompt=meta,
                interventions=tuple(edits),
            )
            completion, judgement, lost = _answer(entry, result.judge)
            result.counts["attempts whose text does not occur in the response"] += lost
            yield result.counted(ImportedTrial(trial, completion, () if judgement is None else (judgement,)))


def _own_entry(source: Source, entry: AuthorsTrial, target: str, judge: str) -> ImportedTrial:
    """Return the original trial from an export of steerback. Raises SteerbackError if it is damaged."""
    own = entry.steerback or OwnTrial()
    try:
        trial = TRIAL.validate_python(own.trial)
        done = None if own.completion is None else COMPLETION.validate_python(own.completion)
        blob = None if done is None or done.activations is None else base64.b64decode(done.activations, validate=True)
        activations = unpack_array(blob)
        windows = [WINDOWS.validate_python(scores) for scores in own.windows]
    except (ValueError, zlib.error) as error:  # pydantic's errors, base64's and numpy's are ValueErrors
        raise SteerbackError(f"{source.path}: a trial under steerback is damaged ({one_line(error)[:120]})") from None
    if trial.target != target:
        trial = replace(trial, target=target, key=f"{target}/{trial.key.partition('/')[2]}")
    if done is None:
        return ImportedTrial(trial, None)
    receipt = Receipt(*done.receipt)
    completion = Completion(done.text, done.token_ids, done.prompt_tokens, own.finish, receipt, activations)
    text = done.text if trial.stage == CONTINUATION else trial.lead + done.text
    scores = {judge: entry.score, **own.judgements}
    unjudged = {"error": "not judged"}
    verdicts = [judgement_of(x, text, name)[0] for name, x in scores.items() if x != unjudged]
    return ImportedTrial(trial, completion, verdicts, windows)


def _prompts(source: Source, feature: AuthorsFeature, entry: AuthorsTrial) -> tuple[str, str]:
    """Return the object-level prompt and the meta-prompt of a trial."""
    meta = (entry.steerback or OwnTrial()).meta_prompt
    if meta is not None:
        return entry.prompt.removesuffix(meta).strip(), meta
    return split_prompt(entry.prompt, source.file.variant.template, feature.text)


def _answer(entry: AuthorsTrial, judge: str) -> tuple[Completion, Judgement | None, int]:
    if entry.response is None or (entry.error and not entry.response):
        return Completion("", (), 0, "error", Receipt()), None, 0
    judgement, lost = judgement_of({"error": entry.error} if entry.error else entry.score, entry.response, judge)
    finish = (entry.steerback or OwnTrial()).finish
    return Completion(entry.response, (), 0, finish, Receipt()), judgement, lost
