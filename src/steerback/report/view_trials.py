"""Trial data of the viewer: the columns of the table of trials, and the content of each trial's page.

Rows are read in batches, so memory does not grow with the number of responses.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from steerback.analysis.floor import rule_of
from steerback.analysis.forks import Forked
from steerback.figures.tables import Table
from steerback.metrics.outcomes import STATES, VALID, outcome_of
from steerback.metrics.recovery import Rule, Windows
from steerback.records import BoostPrior, Judgement, LatentKey, Trial, WindowScores, expected_positions
from steerback.store.facts import (
    BACKTRACKING,
    CONTINUATION,
    DETECTOR_SET,
    DETECTORS,
    FLOOR,
    FORK,
    RECORDED_LATENTS,
    REPLAY,
    TOKEN_ENDS,
)
from steerback.store.ledger import BATCH, Row
from steerback.store.rows import TrialRow, plain
from steerback.store.run import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from steerback.report.view_sample import Sample

    Floats = NDArray[np.float32]

STAGES = ("measure", REPLAY, CONTINUATION, FLOOR, FORK)
"""Stages whose trials are shown by default."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Activations along a response: `values` (fed-back tokens, latents) and `ends`, the end character of each token."""

    ends: Sequence[int]
    latents: Sequence[int]
    values: Floats


@dataclass(frozen=True, eq=False)
class ShownRun:
    """One run and the content that the page shows besides its ledger.

    `readings` are activations that were recorded for the page, by trial key; `forks` are the results of its forks;
    `problem` explains a missing analysis.
    """

    run: Run
    judge: str
    lines: Sequence[str] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, tuple[bytes, str]] = field(default_factory=dict)
    problem: str = ""
    labels: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    priors: Callable[[str, LatentKey], BoostPrior | None] = lambda target, key: None
    readings: Mapping[str, Reading] = field(default_factory=dict)
    forks: Sequence[Forked] = ()
    counts_and_curves: tuple[Sequence[Mapping[str, object]], Mapping[str, object]] | None = None
    """`view.trial_counts` and `view_calibration.calibration` of the run; None: not computed yet."""
    sample: Sample | None = None
    """Sample of the trials, for a run that is alone on its page; None: not drawn yet."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.folder.name


def flags_of(row: TrialRow) -> list[str]:
    """Return the reasons why a trial is not sound, or an empty list."""
    if row.finish is None:
        return ["missing"]
    outcome = outcome_of(row.valid_receipt, row.judgement, row.degraded)
    flags = [] if outcome.state == VALID else [STATES[outcome.state]]
    flags += ["degraded"] * outcome.degraded
    return flags + ["cut"] * (row.finish == "length")


def reason_of(row: TrialRow) -> str:
    """Return the reason why a trial does not count, or ""."""
    if row.finish is None:
        return "not generated yet"
    if row.finish == "error":
        return "invalid: the engine reported an error"
    if not row.valid_receipt:
        return "invalid: the receipt does not match the plan"
    if row.judgement is None:
        return "unscored: not judged yet"
    if row.judgement.status != "scored":
        return f"{row.judgement.status}: {row.judgement.reason}".rstrip(": ")
    return ""


Group = tuple[str, str, str, int]


def group_of(trial: Trial) -> Group:
    """Return target, latent, prompt and seed, which the trials of different conditions share."""
    return trial.target, repr(trial.latent), trial.prompt, trial.seed


class TableRow(NamedTuple):
    """Row of the trial table: its texts (`TEXTS`), its other values (`VALUES`), and its group."""

    texts: tuple[str, ...]
    values: tuple[object, ...]
    group: Group


TEXTS = ("target", "stage", "condition", "latent", "label", "prompt", "flags", "recovery", "activations")
VALUES = ("run", "key", "seed", "boost", "attempts", "first", "last", "gain")


class Light:
    """Columns of the trial table, which filters and sorting need."""

    def __init__(self) -> None:
        self._texts: dict[str, dict[str, int]] = {}
        self._columns: dict[str, list[object]] = defaultdict(list)
        self._groups: dict[Group, int] = {}

    def add(self, entry: TableRow) -> None:
        """Add a trial."""
        columns = self._columns
        for name, text in zip(TEXTS, entry.texts, strict=True):
            known = self._texts.setdefault(name, {})
            columns[name].append(known.setdefault(text, len(known)))
        for name, value in zip(VALUES, entry.values, strict=True):
            columns[name].append(value)
        columns["group"].append(self._groups.setdefault(entry.group, len(self._groups)))

    def columns(self) -> dict[str, object]:
        """Return the columns; repeated texts are indices into `texts`."""
        return {"columns": dict(self._columns), "texts": {name: [*known] for name, known in self._texts.items()}}


def details(runs: Sequence[ShownRun], keys: Sequence[tuple[int, str]]) -> Iterator[tuple[TableRow, dict[str, object]]]:
    """Yield for each trial (number of the run, key) its row of the table and the content of its page."""
    for number, shown in enumerate(runs):
        ledger, own = shown.run.ledger, [key for n, key in keys if n == number]
        if not own:
            continue
        ends = ledger.targets_with(TOKEN_ENDS)
        labels, rule = _Labels(shown), rule_of(ledger)
        judges = [judge for judge in ledger.judges() if judge != shown.judge]
        for first in range(0, len(own), BATCH):
            part = own[first : first + BATCH]
            rows = list(ledger.stream(part, shown.judge, activations=True))
            verdicts = {row.trial.key: [row.judgement] if row.judgement else [] for row in rows}
            for judge in judges:
                for row in ledger.rows(keys=part, judge=judge):
                    if row.judgement is not None:
                        verdicts[row.trial.key].append(row.judgement)
            flags = {row.trial.key: flags_of(row) for row in rows}
            recovery = _recovery(rows, flags, ledger.windows(shown.judge, keys=part), rule)
            for row in rows:
                key = row.trial.key
                reading = shown.readings.get(key) or _recorded(row, ends.get(row.trial.target, {}).get(key))
                detail = _detail(row, verdicts[key], reading, labels) | recovery.get(key, {})
                yield _table_row(number, row, flags[key], detail), detail


def _table_row(run: int, row: Row, flags: Sequence[str], detail: Mapping[str, object]) -> TableRow:
    trial, attempts = row.trial, row.attempts
    texts = (
        trial.target,
        trial.stage,
        trial.condition,
        "" if trial.latent is None else str(trial.latent),
        trial.label or "",
        trial.prompt,
        ", ".join(flags) or "sound",
        str(detail.get("recovery", "")),
        "yes" if "acts" in detail else "no",
    )
    first, last, gain = (attempts[0].score, attempts[-1].score, row.gain) if attempts else (None, None, None)
    values = (run, trial.key, trial.seed, trial.boost, len(attempts) or None, first, last, gain)
    return TableRow(texts, values, group_of(trial))


def _recovery(
    rows: Sequence[Row], flags: Mapping[str, Sequence[str]], windows: Mapping[str, WindowScores], rule: Rule
) -> dict[str, dict[str, object]]:
    """Return by trial whether the response recovered, with the scores of its windows; only trials with windows."""
    counted = {
        key: windows[key].scores
        for row in rows
        if (key := row.trial.key) in windows and row.attempts and "degraded" not in flags[key] and windows[key].scores
    }
    long = [key for key, scores in counted.items() if len(scores) >= rule.least]
    recovered = Windows.of(counted[key] for key in long).recovered(rule).tolist()
    results = {key: "recovered" if yes else "not recovered" for key, yes in zip(long, recovered, strict=True)}
    return {
        key: {
            "recovery": results.get(key, "too short" if key in counted else "not counted"),
            "windows": [list(own.starts), list(own.scores)],
            "windows reason": own.reason,
        }
        for key, own in windows.items()
    }


def _recorded(row: Row, ends: Sequence[int] | None) -> Reading | None:
    """Return the activations that the run recorded during generation."""
    done, record = row.completion, row.trial.record
    if done is None or done.activations is None or record is None or ends is None:
        return None
    return Reading(ends, record.latents, done.activations[done.prompt_tokens :])


class _Labels:
    """Labels and groups of recorded latents."""

    def __init__(self, shown: ShownRun) -> None:
        ledger = shown.run.ledger
        self._labels: dict[str, dict[int, str]] = {name: dict(labels) for name, labels in shown.labels.items()}
        self._groups: dict[str, dict[int, str]] = defaultdict(dict)
        for target, detector_set in ledger.targets_with(DETECTOR_SET).items():
            known = self._labels.setdefault(target, {})
            for detector in detector_set.detectors:
                self._groups[target][detector.latent] = DETECTORS
                if detector.label:
                    known.setdefault(detector.latent, detector.label)
        for target, groups in ledger.targets_with(RECORDED_LATENTS).items():
            for name in (BACKTRACKING, DETECTORS):
                self._groups[target] |= dict.fromkeys(groups.get(name, ()), name)

    def of(self, trial: Trial, latent: int) -> tuple[str, str]:
        """Return label and group of a latent."""
        if latent == trial.latent:
            return trial.label or "", "steered"
        return self._labels.get(trial.target, {}).get(latent, ""), self._groups[trial.target].get(latent, "")


def _detail(row: Row, verdicts: Sequence[Judgement], reading: Reading | None, labels: _Labels) -> dict[str, object]:
    trial, done = row.trial, row.completion
    detail: dict[str, object] = {
        "meta": trial.meta_prompt,
        "prefill": trial.lead,
        "interventions": [plain(i) for i in trial.interventions],
        "verdicts": [_verdict(v) for v in verdicts],
    }
    if done is None:
        return detail
    wanted = expected_positions(trial.interventions, done.prompt_tokens, len(done.token_ids), trial.prefix is not None)
    detail |= {
        "text": row.judged_text,
        "lead": len(row.judged_text) - len(done.text),
        "finish": done.finish,
        "reason": reason_of(row),
        "receipt": {
            "prompt": [done.receipt.prompt_positions, wanted[0], done.prompt_tokens],
            "generated": [done.receipt.generated_positions, wanted[1], len(done.token_ids)],
            "norm": done.receipt.added_norm,
            "continued": int(trial.prefix is not None),
            "valid": row.valid_receipt,
        },
    }
    if reading is not None:
        detail |= {"ends": list(reading.ends), "acts": _activations(trial, reading, labels)}
    return detail


def _verdict(judged: Judgement) -> dict[str, object]:
    gated = judged.gated_attempts()
    return {
        "judge": judged.judge,
        "rubric": judged.rubric,
        "status": judged.status,
        "reason": judged.reason,
        "raw": judged.raw,
        "attempts": [[a.start, a.end, a.score, a.phrase, a.gated] for a in judged.attempts],
        "gated": [[a.start, a.end, a.score] for a in gated],
        "ungated": len(judged.attempts) != len({(a.start, a.score) for a in gated}),
    }


def _activations(trial: Trial, reading: Reading, labels: _Labels) -> dict[str, object]:
    """Return the active latents, with values as 16-bit shares of the latent's peak, and the silent ones."""
    values = np.maximum(np.nan_to_num(np.asarray(reading.values, dtype=np.float64)), 0.0)
    peaks = values.max(axis=0, initial=0.0)
    active = np.flatnonzero(peaks > 0)
    shares = (
        np.rint(values[:, active] / peaks[active] * 65535).astype("<u2") if len(active) else np.zeros((0, 0), "<u2")
    )
    about = [(reading.latents[i], *labels.of(trial, reading.latents[i])) for i in range(len(reading.latents))]
    return {
        "tokens": len(values),
        "latents": [[*about[i], float(f"{peaks[i]:.5g}")] for i in active],
        "silent": [about[i] for i in range(len(about)) if peaks[i] <= 0],
        "values": base64.b64encode(np.ascontiguousarray(shares.T).tobytes()).decode("ascii"),
    }
