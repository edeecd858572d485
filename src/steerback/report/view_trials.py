"""Trial data of the viewer: the sample of trials, the columns of their table, and the content of each trial's page.

Rows are read in batches, so memory does not grow with the number of responses.
"""

from __future__ import annotations

import base64
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.floor import rule_of
from steerback.analysis.forks import Forked
from steerback.figures.tables import Table
from steerback.metrics.outcomes import STATES, VALID, outcome_of
from steerback.metrics.recovery import Rule, recovered
from steerback.records import BoostPrior, Judgement, LatentKey, Trial, WindowScores, expected_positions
from steerback.report import pages
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
from steerback.store.processes import collector_paused
from steerback.store.rows import TrialRow
from steerback.store.run import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

STAGES = ("measure", REPLAY, CONTINUATION, FLOOR, FORK)
"""Stages whose trials are shown by default."""
CHUNK = 25
SEED = 42


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

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.folder.name


@dataclass(frozen=True, slots=True)
class Sample:
    """Trials on the page as (number of the run, trial key), and the total number they were drawn from."""

    keys: Sequence[tuple[int, str]]
    total: int
    why: str = ""


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


@collector_paused()
def draw(runs: Sequence[ShownRun], stages: Sequence[str], limit: int, why: str) -> Sample:
    """Draw at most `limit` trials of the runs, or take all.

    Trials of one latent, prompt and seed stay together. Each target and latent contributes the same share of its
    groups. Trials with activations recorded for the page come first, and so do forks and their parents.
    """
    groups: dict[Group, list[tuple[int, str]]] = defaultdict(list)
    order: dict[tuple[int, str], int] = {}
    for number, shown in enumerate(runs):
        for key, group in shown.run.ledger.groups(stages):
            groups[group].append((number, key))
            order[number, key] = len(order)
    if len(order) <= limit:
        return Sample(list(order), len(order))
    strata: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        strata[group[:2]].append(group)
    generator = random.Random(SEED)
    first = [{*r.readings, *_of_forks(r)} for r in runs]
    read = {group for group, members in groups.items() if any(key in first[n] for n, key in members)}
    ranked: list[tuple[float, Group]] = [(-1.0, group) for group in read]
    for members in strata.values():
        generator.shuffle(members)
        ranked += [
            ((n + generator.random()) / len(members), group) for n, group in enumerate(members) if group not in read
        ]
    chosen: list[tuple[int, str]] = []
    for _, group in sorted(ranked):
        if len(chosen) + len(groups[group]) > limit:
            break
        chosen += groups[group]
    return Sample(sorted(chosen, key=order.__getitem__), len(order), why)


def _of_forks(shown: ShownRun) -> Iterator[str]:
    """Yield the keys of a run's forked trials and of their continuations."""
    for forked in shown.forks:
        yield forked.fork.parent
        yield from (row.trial.key for arm in forked.arms for row in arm.rows)


def sampled(
    runs: Sequence[ShownRun], stages: Sequence[str], limit: int, room: int
) -> tuple[Sample, dict[str, object], list[str]]:
    """Return a sample, its table columns and its chunks; the sample shrinks until the chunks fit into `room` bytes."""
    why = f"the page holds at most {limit:,} trials"
    while True:
        sample = draw(runs, stages, limit, why)
        light, chunks = Light(), []
        size = fits = 0
        pending: list[dict[str, object]] = []
        for number, row, detail in _details(runs, sample):
            light.add(number, row, detail)
            pending.append(detail)
            if len(pending) == CHUNK:
                chunks.append(pages.packed(pending))
                size, pending = size + len(chunks[-1]), []
                if size > room:
                    break
                fits = len(chunks) * CHUNK
        else:
            return sample, light.columns(), [*chunks, *([pages.packed(pending)] if pending else [])]
        limit = max(min(int(fits * 0.9), int(limit * 0.9)), 1)
        why = f"the page holds at most {room / 1e6:.0f} MB of responses"


class Light:
    """Columns of the trial table, which filters and sorting need."""

    def __init__(self) -> None:
        self._texts: dict[str, dict[str, int]] = {}
        self._columns: dict[str, list[object]] = defaultdict(list)
        self._groups: dict[Group, int] = {}

    def add(self, run: int, row: Row, detail: Mapping[str, object]) -> None:
        """Add a trial with the content of its page."""
        trial, attempts = row.trial, row.attempts
        for name, text in (
            ("target", trial.target),
            ("stage", trial.stage),
            ("condition", trial.condition),
            ("latent", "" if trial.latent is None else str(trial.latent)),
            ("label", trial.label or ""),
            ("prompt", trial.prompt),
            ("flags", ", ".join(flags_of(row)) or "sound"),
            ("recovery", str(detail.get("recovery", ""))),
            ("activations", "yes" if "acts" in detail else "no"),
        ):
            known = self._texts.setdefault(name, {})
            self._columns[name].append(known.setdefault(text, len(known)))
        columns = self._columns
        columns["run"].append(run)
        columns["key"].append(trial.key)
        columns["seed"].append(trial.seed)
        columns["boost"].append(trial.boost)
        columns["attempts"].append(len(attempts) or None)
        columns["first"].append(attempts[0].score if attempts else None)
        columns["last"].append(attempts[-1].score if attempts else None)
        columns["gain"].append(row.gain if attempts else None)
        columns["group"].append(self._groups.setdefault(group_of(trial), len(self._groups)))

    def columns(self) -> dict[str, object]:
        """Return the columns; repeated texts are indices into `texts`."""
        return {"columns": dict(self._columns), "texts": {name: [*known] for name, known in self._texts.items()}}


def _details(runs: Sequence[ShownRun], sample: Sample) -> Iterator[tuple[int, Row, dict[str, object]]]:
    """Yield each sampled trial with the number of its run and the content of its page."""
    for number, shown in enumerate(runs):
        ledger, keys = shown.run.ledger, [key for n, key in sample.keys if n == number]
        ends = ledger.targets_with(TOKEN_ENDS)
        labels, rule = _Labels(shown), rule_of(ledger)
        judges = [judge for judge in ledger.judges() if judge != shown.judge]
        for first in range(0, len(keys), BATCH):
            part = keys[first : first + BATCH]
            rows = list(ledger.stream(part, shown.judge, activations=True))
            verdicts = {row.trial.key: [row.judgement] if row.judgement else [] for row in rows}
            for judge in judges:
                for row in ledger.rows(keys=part, judge=judge):
                    if row.judgement is not None:
                        verdicts[row.trial.key].append(row.judgement)
            windows = ledger.windows(shown.judge, keys=part)
            for row in rows:
                key = row.trial.key
                reading = shown.readings.get(key) or _recorded(row, ends.get(row.trial.target, {}).get(key))
                detail = _detail(row, verdicts[key], reading, labels)
                yield number, row, detail | _recovery(row, windows.get(key), rule)


def _recovery(row: Row, windows: WindowScores | None, rule: Rule) -> dict[str, object]:
    """Return whether the response recovered, with the scores of its windows; empty without windows."""
    if windows is None:
        return {}
    shown = {"windows": [list(windows.starts), list(windows.scores)], "windows reason": windows.reason}
    scores = np.array(windows.scores, dtype=np.float64)
    if not len(scores) or not row.attempts or row.degraded:
        return {"recovery": "not counted", **shown}
    if len(scores) < rule.least:
        return {"recovery": "too short", **shown}
    return {"recovery": "recovered" if recovered([scores], rule)[0] else "not recovered", **shown}


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
        "interventions": [asdict(i) for i in trial.interventions],
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
    counted = {(a.start, a.score) for a in judged.gated_attempts()}
    return {
        "judge": judged.judge,
        "rubric": judged.rubric,
        "status": judged.status,
        "reason": judged.reason,
        "raw": judged.raw,
        "attempts": [[a.start, a.end, a.score, a.phrase, a.gated] for a in judged.attempts],
        "gated": [[a.start, a.end, a.score] for a in judged.gated_attempts()],
        "ungated": len(judged.attempts) != len(counted),
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
