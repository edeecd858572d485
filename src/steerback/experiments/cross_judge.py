"""Experiment 7, cross-judge validation (specification section "Experiment 7", Figs. A2 to A4).

Several judges score the same sample of finished responses. The experiment compares which restarts they report, the
direction of change, and the ranking of the models. Nothing is generated: `gather` copies responses into a new run,
judging adds each judge's verdicts, and the analysis uses only that run's ledger.

The sample takes multi-attempt trials first, so its rates are higher than those of the runs. `weighted` corrects this:
it weights each trial by the number of trials that it represents.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment
from steerback.store.facts import ENGINE, HUMAN, PROVENANCE, SAMPLE, JudgedSample, StratumWeights
from steerback.store.ledger import Row
from steerback.store.run import Run, fact_of, stored_config

SAMPLE_SIZE, MINIMUM, SEED = 1000, 100, 42


class CrossJudgeOptions(Settings):
    """Judges and responses of the cross-judge validation."""

    sources: list[str] = Field([])
    """Folders of the finished runs whose responses are judged."""
    judges: list[str] = Field([])
    """Names of the judges, at least two."""
    sample: int = Field(SAMPLE_SIZE, ge=1)
    """Number of responses that every judge reads."""
    minimum: int = Field(MINIMUM, ge=1)
    """Minimum number of responses per target."""


class CrossJudge(Experiment[CrossJudgeOptions]):
    """Measure the agreement of several judges on one sample of responses."""

    name = "cross-judge"
    title = "Cross-judge validation (experiment 7)"
    options_type = CrossJudgeOptions
    generates = False

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        """Maximum number of responses to judge."""
        return {"sample": max(self.options.sample, self.options.minimum * len(config.targets))}

    def judges(self, config: RunConfig) -> tuple[str, ...]:
        """The judges, at least two, without duplicates."""
        names = tuple(dict.fromkeys(self.options.judges))
        if len(names) < 2:
            raise SteerbackError("cross-judge needs at least two judges: name them with --judges A,B")
        return names

    def collect(self, run: Run) -> None:
        """Copy the sample from the source runs."""
        gather(run, [Path(s) for s in self.options.sources], self.options.sample, self.options.minimum)


def gather(opened: Run, sources: Sequence[Path], sample: int = SAMPLE_SIZE, minimum: int = MINIMUM) -> int:
    """Copy the sample with its references and existing verdicts into `opened`; return the number of trials. Idempotent.

    The sample is stratified by target: `sample` responses in total, at least `minimum` per target. Multi-attempt trials
    (by the source run's judge) come first. At least half of the minimum are single-attempt trials, so that agreement on
    the difference can be measured.
    """
    pools: dict[str, list[tuple[Row, str, Path]]] = defaultdict(list)
    kept: list[tuple[Row, str, Path]] = []
    for folder in sources:
        config = stored_config(folder)
        with Run.read(folder) as source:
            for row in source.ledger.rows(judge=config.judge):
                if row.completion is None:
                    continue
                if row.trial.stage == "reference":
                    kept.append((row, config.judge, folder))
                elif row.trial.stage == "measure" and row.attempts:
                    pools[row.trial.target].append((row, config.judge, folder))
    if not pools:
        raise SteerbackError(f"no judged trial in {', '.join(str(s) for s in sources) or 'no run at all'}")
    quota = max(minimum, sample // len(pools))
    chosen: list[tuple[Row, str, Path]] = []
    for target, pool in pools.items():
        strata = {
            "several": [entry for entry in pool if len(entry[0].attempts) > 1],
            "single": [entry for entry in pool if len(entry[0].attempts) == 1],
        }
        for stratum in strata.values():
            # A fixed seed draws the same sample again, so that a resumed run adds no trials.
            random.Random(SEED).shuffle(stratum)
        # Reserve places for single-attempt trials first, then fill up with the rest of the quota.
        several = strata["several"][: quota - min(len(strata["single"]), minimum // 2)]
        single = strata["single"][: quota - len(several)]
        chosen += several + single
        drawn = JudgedSample(
            available=len(pool),
            several=len(several),
            single=len(single),
            weights=StratumWeights(
                several=_weight(strata["several"], several), single=_weight(strata["single"], single)
            ),
            several_keys=[key for key, _ in _renamed(several)],
        )
        opened.ledger.put(target, SAMPLE, drawn)
        provenance = fact_of(pool[0][2], target, PROVENANCE)[0]
        if provenance is not None:
            opened.ledger.put(target, PROVENANCE, provenance)
    _copy(opened, [*kept, *chosen])
    _copy_labels(opened, sources, chosen)
    return len(chosen)


def _weight(stratum: Sequence[object], drawn: Sequence[object]) -> float:
    """Return the number of trials in a stratum per sampled trial."""
    return len(stratum) / len(drawn) if drawn else 0.0


def _copy(opened: Run, entries: Sequence[tuple[Row, str, Path]]) -> None:
    trials, completions, judgements = [], [], []
    asked = {(folder, row.trial.target) for row, _, folder in entries}
    engines = {key: fact_of(*key, ENGINE)[0] for key in asked}
    made_by = {key: "unknown" if engine is None else engine.fingerprint for key, engine in engines.items()}
    for key, (row, _, folder) in _renamed(entries):
        trials.append(replace(row.trial, key=key, record=None))
        if row.completion is not None:
            completions.append((key, replace(row.completion, activations=None), made_by[folder, row.trial.target]))
        if row.judgement is not None:
            judgements.append((key, row.judgement))
    opened.ledger.add_trials(trials)
    opened.ledger.add_completions(completions)
    opened.ledger.add_judgements(judgements)


def _copy_labels(opened: Run, sources: Sequence[Path], chosen: Sequence[tuple[Row, str, Path]]) -> None:
    """Copy the human labels of the sampled trials from the source runs."""
    for folder in sources:
        with Run.read(folder) as source:
            labellers = [name for name in source.ledger.judges() if name.startswith(HUMAN)]
            keys = [row.trial.key for row, _, origin in chosen if origin == folder]
            entries = [(r, "", folder) for name in labellers for r in source.ledger.rows(keys=keys, judge=name)]
        opened.ledger.add_judgements(
            (key, row.judgement) for key, (row, _, _) in _renamed(entries) if row.judgement is not None
        )


def _renamed(entries: Sequence[tuple[Row, str, Path]]) -> list[tuple[str, tuple[Row, str, Path]]]:
    """Return keys that contain the source run, because two runs may use the same key."""
    return [(f"{entry[0].trial.key}@{entry[2].name}", entry) for entry in entries]
