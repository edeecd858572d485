"""Export of a run as result files in the format of the authors' code.

Data that this format does not cover is stored under the key `steerback`: plan, receipt and recorded activations in
each trial, settings and facts in a file without trials. `steerback import` restores all of it.
"""

from __future__ import annotations

import base64
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pydantic import JsonValue
from pydantic_core import to_json

from steerback.calibration.thresholds import THRESHOLDS
from steerback.records import Judgement, Trial, WindowScores, digest
from steerback.store import facts
from steerback.store.database import reading
from steerback.store.facts import FORK, META_PROMPTS, SWEEP, Fact
from steerback.store.files import make_folder, whole_file
from steerback.store.ledger import MANY
from steerback.store.processes import collector_paused, second_part
from steerback.store.rows import Outline, Stored, interventions_of, judged_text
from steerback.store.run import Run, write_json

Place: TypeAlias = tuple[str, str, str]
"""Target, stage and condition."""
Batch: TypeAlias = tuple[bytes, Sequence[str]]
"""Content of the file before some trials of a latent, and the keys of the trials."""
NO_LATENT = "unsteered"
"""Replaces the index of the latent in a trial without a latent."""
AT_ONCE = 100
"""Number of trials with texts in memory."""
SMALL: tuple[Fact[Any], ...] = (SWEEP, META_PROMPTS)
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


@collector_paused()
def export_authors(run: Run, folder: Path, judge: str) -> list[Path]:
    """Write one file in the authors' format for each target and condition, and one file with the facts of each target.

    Files with measured trials have the authors' file names. Names of files with other stages begin with `steerback_`.
    Each trial is one line, and at most `AT_ONCE` trials are in memory. Two processes share the work of a large run.
    """
    make_folder(folder)
    places = [(t, stage, c) for t, stage in run.ledger.stages() for own, c in run.ledger.conditions(stage) if own == t]
    places = [place for place in places if place[1] != FORK]
    paths, files = _write(run, folder, judge, places), Counter(target for target, *_ in places)
    for target in dict.fromkeys((*run.config.targets, *files)):
        own = {
            "experiment": run.config.experiment,
            "condition": "facts",
            "config": run.config.model_dump(mode="json"),
            "files": files[target],
            "facts": _facts(run, target),
        }
        body = _head(run, target, judge) | {"results_by_feature": [], "steerback": own}
        paths.append(write_json(folder / f"steerback_{_safe(target)}.json", body))
    return paths


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "+-." else "_" for c in name)


def _facts(run: Run, target: str) -> dict[str, JsonValue]:
    own = {name: value for owner, name, value in run.ledger.facts() if owner == target}
    return {name: value for name, value in own.items() if name in EXPORTED or " by " in name}


def _head(run: Run, target: str, judge: str) -> dict[str, Any]:
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


def _write(run: Run, folder: Path, judge: str, places: Sequence[Place]) -> list[Path]:
    """Write the files of some conditions; two processes write half of the trials each.

    This process writes the first files and the beginning of the file in the middle, the other one the rest.
    """
    plans = [(_path(folder, place), *_plan(run, judge, place)) for place in places]
    half, middle, seen = sum(_size(batches) for *_, batches in plans) / 2, 0, 0
    while middle < len(plans) - 1 and seen + _size(plans[middle][2]) < half:
        seen, middle = seen + _size(plans[middle][2]), middle + 1
    sizes = list(accumulate(len(keys) for _, keys in plans[middle][2])) if plans else []
    cut = bisect_left(sizes, half - seen) + 1

    def trials(batches: Sequence[Batch]) -> Iterator[bytes]:
        return _trials(run.folder, judge, batches)

    def others(part: BinaryIO) -> None:
        for _, _, batches in plans[middle : middle + 1]:
            part.writelines(trials(batches[cut:]))
        for path, head, batches in plans[middle + 1 :]:
            with whole_file(path) as file:
                file.writelines(chain([head], trials(batches), [_end(batches)]))

    with second_part(folder, others, half > MANY / 20) as append_rest:
        for number, (path, head, batches) in enumerate(plans[: middle + 1]):
            with whole_file(path) as file:
                file.write(head)
                file.writelines(trials(batches if number < middle else batches[:cut]))
                if number == middle:
                    append_rest(file)
                file.write(_end(batches))
    return [path for path, *_ in plans]


def _path(folder: Path, place: Place) -> Path:
    target, stage, condition = place
    name = "experiment_results" if stage == "measure" else f"steerback_{stage}"
    return folder / f"{name}_{_safe(f'{target}_{condition}')}.json"


def _size(batches: Sequence[Batch]) -> int:
    return sum(len(keys) for _, keys in batches)


def _end(batches: Sequence[Batch]) -> bytes:
    return b"]}]}\n" if batches else b"]}\n"


def _plan(run: Run, judge: str, place: Place) -> tuple[bytes, list[Batch]]:
    """Return the content of the file of a condition before its first latent, and the batches of its trials."""
    target, stage, condition = place
    by_latent: dict[str | None, list[str]] = {}
    stored: set[str] = set()
    for key, latent, interventions in run.ledger.plan(place):
        by_latent.setdefault(latent, []).append(key)
        stored.add(interventions)
    with reading(run.ledger.path):
        edits = {edit for interventions in stored for edit in interventions_of(interventions)}
    clamped = sorted({i.latent for i in edits if i.mode == "clamp" and not i.value}, key=str)
    head = _head(run, target, judge)
    head["experiment_config"] |= {"disable_steering": not edits, "n_features": len(by_latent)}
    small = [(fact.name, fact.dump(x)) for fact in SMALL if (x := run.ledger.get(target, fact)) is not None]
    own = {"experiment": run.config.experiment, "condition": condition, "stage": stage, "facts": dict(small)}
    head |= {"ablated_latents": clamped, "num_ablated_latents": len(clamped)} if clamped else {}
    first = {o.trial.key: o.trial for o in run.ledger.outlines(keys=[keys[0] for keys in by_latent.values()])}
    batches: list[Batch] = []
    for keys in by_latent.values():
        trial = first[keys[0]]
        feature = _open({**_named(trial), "threshold": trial.boost, "error": None}, "trials")
        start = b"]},\n" + feature if batches else feature
        for n in range(0, len(keys), AT_ONCE):
            batches.append((b",\n" if n else start, keys[n : n + AT_ONCE]))
    own["digest"] = digest(run.config.of(target))
    return _open(head | {"steerback": own}, "results_by_feature"), batches


def _trials(folder: Path, judge: str, batches: Sequence[Batch]) -> Iterator[bytes]:
    """Yield the content of a file from the first to the last trial of some batches."""
    with Run.read(folder) as run:
        judges = run.ledger.judges()
        for start, keys in batches:
            others = _others(run, judges, judge, keys)
            with reading(run.ledger.path):
                rows = run.ledger.completions(run.ledger.outlines(judge=judge, keys=keys))
                entries = [_entry(row, done, others.get(row.trial.key, Verdicts())) for row, done in rows]
                yield start + b",\n".join(entries)


def _open(start: Mapping[str, object], last: str) -> bytes:
    """Return the JSON of an object up to the items of the list `last`."""
    return to_json(start)[:-1] + f',"{last}":[\n'.encode()


def _others(run: Run, judges: Sequence[str], judge: str, keys: Sequence[str]) -> dict[str, Verdicts]:
    """Return the verdicts of all judges except `judge`, and the window scores of all judges, by trial key."""
    verdicts: dict[str, Verdicts] = {}
    for name in judges:
        for key, scores in run.ledger.windows(name, keys).items():
            verdicts.setdefault(key, Verdicts()).windows.append(scores)
        for outline in run.ledger.outlines(judge=name, keys=keys) if name != judge else ():
            if outline.judgement is not None:
                verdicts.setdefault(outline.trial.key, Verdicts()).judgements[name] = outline.judgement
    return verdicts


def _named(trial: Trial) -> dict[str, object]:
    latent = NO_LATENT if trial.latent is None else trial.latent
    return {"feature_index_in_sae": latent, "feature_label": trial.label or f"feature_{latent}"}


def _entry(row: Outline, done: Stored | None, others: Verdicts) -> bytes:
    trial = row.trial
    text = judged_text(trial, "" if done is None else done[0])
    own: dict[str, object] = {
        "index": trial.index,
        "meta_prompt": trial.meta_prompt,
        "finish": row.finish or "unknown",
        "trial": trial,
        "judgements": {name: _score(judged, text) for name, judged in others.judgements.items()},
        "windows": others.windows,
    }
    if done is not None:
        response, _, prompt_tokens, _, *receipt, blob = done
        own["completion"] = {
            "text": response,
            "token_ids": (),
            "prompt_tokens": prompt_tokens,
            "receipt": receipt,
            "activations": None if blob is None else base64.b64encode(blob).decode(),
        }
    entry = {
        **_named(trial),
        "prompt": f"{trial.prompt} {trial.meta_prompt}".strip(),
        "threshold": trial.boost,
        "seed": trial.seed,
        "response": text if row.valid_receipt else "",
        "score": _score(row.judgement, text),
        "error": None if row.valid_receipt else "not generated, or not steered as planned",
        "steerback": own,
    }
    written = to_json(entry, inf_nan_mode="null")
    if done is None:
        return written
    # The stored ids are JSON already: to decode and encode them takes a quarter of the time of an export. Quotes in
    # texts are escaped, so the last list of that name is the one of the completion.
    before, _, after = written.rpartition(b'"token_ids":[]')
    return before + b'"token_ids":' + _compact(done[1]) + after


def _compact(ids: str) -> bytes:
    """Return a JSON list of whole numbers without spaces."""
    compact = ids.encode().translate(None, b" ")
    if compact.translate(None, b"0123456789,") != b"[]":
        raise ValueError("a list of token ids")
    return compact


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
