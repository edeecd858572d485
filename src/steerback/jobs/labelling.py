"""Human labels of a run: draw the sample, write its page and spreadsheet, and import what labellers return."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.judging import human
from steerback.judging.human import LabelItem
from steerback.readers import read_bytes
from steerback.report import labelling
from steerback.store.facts import CONTINUATION, JUDGES, LABEL_SAMPLES, LabelSample
from steerback.store.files import write_atomic
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline
from steerback.store.run import Run

STAGES = ("measure", CONTINUATION)


@dataclass(frozen=True, slots=True)
class DrawnSample:
    """Sample of `count` responses for human labelling, and its files."""

    identifier: str
    count: int
    page: Path
    spreadsheet: Path


def draw_sample(
    folder: Path,
    size: int,
    seed: int,
    judge: str | None = None,
    conditions: Sequence[str] = (),
    out: Path | None = None,
) -> DrawnSample:
    """Draw a sample of a finished run, store it in the ledger, and write its page and spreadsheet into `out`.

    The same size, seed and conditions give the same sample again. A further sample contains only responses that are
    in no earlier sample, and must be drawn by the verdicts of the same judge.
    """
    with Run.reopen(folder) as run:
        chosen = run.judge(judge)
        stored = stored_samples(run.ledger)
        asked = (size, seed, sorted(conditions))
        known = next((i for i, s in stored.items() if _asked(s) == asked), None)
        by = {s.judge for samples in stored.values() for s in samples.values()}
        if by and by != {chosen}:
            raise SteerbackError(
                f"the label sample of run {run.folder.name!r} was drawn by the verdicts of judge {min(by)}; further "
                f"samples must be drawn by the same, so name it with --judge {min(by)}"
            )
        if known is None:
            taken = {key for samples in stored.values() for s in samples.values() for key in s.items.values()}
            pools = _pools(run, chosen, conditions, taken)
            samples = human.draw(pools, chosen, size, seed, sorted(conditions))
            identifier = human.identifier(_items(run.ledger, samples))
            for target, sample in samples.items():
                kept = run.ledger.get(target, LABEL_SAMPLES) or {}
                run.ledger.put(target, LABEL_SAMPLES, {**kept, identifier: sample})
        else:
            identifier, samples = known, stored[known]
        items = _items(run.ledger, samples)
        place, name = out or run.folder, f"labels-{identifier}"
        page = labelling.page(items, run.folder.name, identifier)
        return DrawnSample(
            identifier,
            len(items),
            write_atomic(place / f"{name}.html", page.encode("utf-8")),
            # the byte-order mark tells spreadsheets that the file is UTF-8
            write_atomic(place / f"{name}.csv", labelling.spreadsheet(items, identifier).encode("utf-8-sig")),
        )


def stored_samples(ledger: Ledger) -> dict[str, dict[str, LabelSample]]:
    """Return the label samples of a ledger: identifier -> target -> sample."""
    by_identifier: dict[str, dict[str, LabelSample]] = {}
    for target, samples in ledger.targets_with(LABEL_SAMPLES).items():
        for identifier, sample in samples.items():
            by_identifier.setdefault(identifier, {})[target] = sample
    return by_identifier


def _asked(samples: Mapping[str, LabelSample]) -> tuple[int, int, list[str]]:
    first = next(iter(samples.values()))
    return first.size, first.seed, first.conditions


def _pools(run: Run, judge: str, conditions: Sequence[str], taken: set[str]) -> dict[str, list[Outline]]:
    """Return the scored rows of each target that can be drawn. Raises SteerbackError if the run is not finished."""
    rows = [r for stage in STAGES for r in run.ledger.outlines(stage=stage, judge=judge)]
    known = dict.fromkeys(r.trial.condition for r in rows)
    strange = [name for name in conditions if name not in known]
    if strange:
        raise SteerbackError(f"no condition {strange[0]!r} in this run; choose one of: {', '.join(known) or 'none'}")
    rows = [r for r in rows if not conditions or r.trial.condition in conditions]
    missing = sum(r.finish is None for r in rows)
    if missing:
        raise SteerbackError(
            f"{missing:,} of {len(rows):,} responses are missing, and a sample must be drawn of all: "
            f"steerback resume {run.folder.name}"
        )
    unjudged = sum(r.judgement is None for r in rows)
    if unjudged:
        raise SteerbackError(
            f"judge {judge} has not judged {unjudged:,} of {len(rows):,} responses, and a sample must be drawn of all: "
            f"steerback judge {run.folder.name} --judge {judge}"
        )
    pools: dict[str, list[Outline]] = {}
    for row in rows:
        if row.attempts and row.trial.key not in taken:
            pools.setdefault(row.trial.target, []).append(row)
    if not pools and taken:
        raise SteerbackError("every scored response is in a sample already")
    return pools


def _items(ledger: Ledger, samples: Mapping[str, LabelSample]) -> list[LabelItem]:
    keys = [key for sample in samples.values() for key in sample.items.values()]
    return human.items_of(samples, {r.trial.key: r for r in ledger.rows(keys=keys)})


@dataclass(frozen=True, slots=True)
class ImportedLabels:
    """Result of a label import: the judge's name, the number of new labels, and its total in a sample of `size`."""

    judge: str
    new: int
    labelled: int
    size: int


def import_labels(folder: Path, file: Path, labeller: str) -> ImportedLabels:
    """Store the labels in a file as the verdicts of judge `human:labeller`.

    The whole file is checked before anything is stored. Labels that exist already are skipped if they are equal.
    Raises SteerbackError if a label differs from its stored value, or if the file belongs to the sample of another run.
    """
    judge, where = human.judge_name(labeller), f"label file {file}"
    labels = labelling.read_labels(file)
    with Run.reopen(folder) as run:
        stored = stored_samples(run.ledger)
        if labels.sample not in stored:
            known = ", ".join(stored) or f"none; draw one with: steerback label {run.folder.name}"
            raise SteerbackError(
                f"{where} belongs to sample {labels.sample[:40]!r}; run {run.folder.name!r} has the samples: {known}"
            )
        samples = stored[labels.sample]
        items = _items(run.ledger, samples)
        if human.identifier(items) != labels.sample:
            raise SteerbackError(f"the responses of sample {labels.sample} have changed since it was drawn")
        verdicts = human.judgements(labels, items, judge, where)
        keys = {number: key for sample in samples.values() for number, key in sample.items.items()}
        given = {r.trial.key: r.judgement for r in run.ledger.rows(keys=[*keys.values()], judge=judge)}
        changed = [n for n, verdict in verdicts.items() if given[keys[n]] not in (None, verdict)]
        if changed:
            raise SteerbackError(
                f"{where}: {judge} has a different label for response {changed[0]}; labels are never replaced, so "
                "import the file under another name with --by"
            )
        new = {keys[n]: verdict for n, verdict in verdicts.items() if given[keys[n]] is None}
        run.ledger.add_judgements(new.items())
        digest = hashlib.sha256(read_bytes(file, "label file")).hexdigest()
        about: dict[str, object] = {"rubric": human.RUBRIC, "sample": labels.sample, "file sha256": digest}
        described = run.ledger.get("", JUDGES)
        run.ledger.put("", JUDGES, {**(described or {}), judge: about})
        return ImportedLabels(judge, len(new), sum(v is not None for v in given.values()) + len(new), len(items))
