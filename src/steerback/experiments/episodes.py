"""Recorded episodes: responses in which a model stops itself, replayed with the activations of watched latents.

Shared by `traces` and `episode-statistics`. Beside each episode stand two controls of the same grid: steered responses
that drift and never restart, and unsteered ones. Recording is of z before any addition or clamp, so the injected
vector itself is never measured. Knows the ledger's rows and arrays; statistics are made by the experiments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from steerback.config import RunConfig, parse_config
from steerback.errors import SteerbackError
from steerback.experiments.base import Experiment, settings
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, searched, targets_with
from steerback.latents.backtracking import find_backtracking
from steerback.metrics import cluster_code
from steerback.records import Attempt, LatentKey, Recording, Trial
from steerback.store.ledger import Ledger, Row
from steerback.study.pipeline import complete
from steerback.study.study import Study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

REPLAY = "replay"  # stage of the recorded trials: same prompts, seeds and boosts as the measured ones
EPISODES, DRIFTS, UNSTEERED = "episodes", "steered, no restart", "unsteered"
DETECTORS, BACKTRACKING, STEERED = "detectors", "backtracking", "steered"


class Options(SearchOptions):
    """Which episodes are recorded, and which latents beside the detectors."""

    max_episodes: int = Field(200, ge=1)
    """At most this many of each kind are recorded, spread evenly over the latents."""
    drift_below: float = Field(50.0, ge=0, le=100)
    """A single attempt that scores less has drifted."""
    backtracking: list[Annotated[int, Field(ge=0)]] | None = None
    """Own latents that accompany corrections; default: found by their labels ..."""
    most_backtracking: int = Field(50, ge=0)
    """... at most this many, those whose labels say it most clearly."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One recorded response of T fed-back tokens.

    `pieces` are the tokens as text (T,), `sums` maps a group of latents to its summed activation per token (T,).
    For an episode `begin` is the first token off the topic (0 unless a judge has marked boundaries), `start` is the
    first token of the correction (the restart phrase), `resume` the first token after it, `stop` the end of the second
    attempt; otherwise these three are None.
    """

    row: Row
    pieces: tuple[str, ...]
    sums: Mapping[str, Floats]
    start: int | None = None
    resume: int | None = None
    stop: int | None = None
    begin: int = 0

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def latent(self) -> LatentKey | None:
        return self.row.trial.latent

    @property
    def cluster(self) -> int:
        return cluster_code(self.latent)

    @cached_property
    def attempts(self) -> tuple[Attempt, ...]:
        judged = self.row.judgement
        return judged.gated_attempts() if judged is not None else ()

    @property
    def gain(self) -> float:
        """Last minus first score, in points."""
        return self.attempts[-1].score - self.attempts[0].score

    def regions(self) -> dict[str, slice]:
        """An episode's tokens before the correction, in its restart phrase, and after it in the second attempt."""
        if self.start is None or self.resume is None or self.stop is None:
            raise ValueError(f"{self.row.trial.key} is no episode")
        return {
            "off-topic": slice(self.begin, self.start),
            "correction": slice(self.start, self.resume),
            "on-topic": slice(self.resume, self.stop),
        }


class EpisodeExperiment(Experiment):
    """What the experiments about episodes share: baseline, then episodes and controls with recording."""

    needs_sae = True
    authors: Mapping[str, Any] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 1

    def further(self, config: RunConfig) -> dict[str, int]:
        chosen = settings(self, config)
        return searched(chosen) | {REPLAY: 3 * chosen["max_episodes"]}

    async def run(self, study: Study) -> None:
        """Baseline, then episodes and controls with recording."""
        await record(study, settings(self, study.config))


def options_of(experiment: Any, ledger: Ledger) -> dict[str, Any]:
    """The options a run was started with."""
    return settings(experiment, parse_config(ledger.fact("", "config")))


async def record(study: Study, options: Mapping[str, Any]) -> None:
    """Measures the baseline, picks episodes and controls from it, and replays them with recording."""
    groups = await watched(study, options)
    rows = await study.baseline()
    limit = options["max_episodes"]
    episodes = spread([r for r in rows if is_episode(r)], limit)
    drifts = spread([r for r in rows if is_drift(r, options["drift_below"])], limit)
    trials = [_replay(study, r.trial, EPISODES, groups) for r in episodes]
    trials += [_replay(study, r.trial, DRIFTS, groups) for r in drifts]
    trials += [_replay(study, r.trial, UNSTEERED, groups) for r in episodes]
    done = await complete(study.bench, trials, stage=f"{study.name}: episodes with recording")
    ends = {r.trial.key: study.engine.token_ends(r.completion) for r in done if r.completion is not None}
    study.run.ledger.set_fact(study.name, "token ends", ends)


def _replay(study: Study, trial: Trial, condition: str, groups: Mapping[str, Sequence[int]]) -> Trial:
    own = (trial.latent,) if isinstance(trial.latent, int) else ()
    latents = dict.fromkeys((*groups[DETECTORS], *groups[BACKTRACKING], *own))
    return study.trial(
        REPLAY,
        condition,
        trial.index,
        prompt=trial.prompt,
        seed=trial.seed,
        latent=trial.latent,
        label=trial.label,
        boost=0.0 if condition == UNSTEERED else trial.boost,
        interventions=() if condition == UNSTEERED else trial.interventions,
        record=Recording(tuple(latents)),
    )


def recorded_targets(ledger: Ledger) -> list[str]:
    """The run's targets with recorded episodes."""
    return targets_with(ledger, "token ends")


async def watched(study: Study, options: Mapping[str, Any]) -> dict[str, list[int]]:
    """The latents that are recorded beside the steered one: detectors, and those that accompany corrections."""
    stored = study.run.ledger.fact(study.name, "watched")
    if stored is None:
        detectors = await detectors_of(study, options)
        backtracking = options["backtracking"]
        if backtracking is None:
            backtracking = [
                found.latent for found in find_backtracking(study.target.labels(), limit=options["most_backtracking"])
            ]
        stored = {DETECTORS: list(detectors.latents), BACKTRACKING: backtracking}
        study.run.ledger.set_fact(study.name, "watched", stored)
    return dict(stored)


def is_episode(row: Row) -> bool:
    """Two attempts or more, the last better than the first."""
    attempts = _attempts(row)
    return len(attempts) >= 2 and attempts[-1].score > attempts[0].score


def is_drift(row: Row, below: float) -> bool:
    """A single attempt that scores less than `below`."""
    attempts = _attempts(row)
    return len(attempts) == 1 and attempts[0].score < below


def _attempts(row: Row) -> tuple[Attempt, ...]:
    if not row.valid_receipt or row.judgement is None or row.judgement.status != "scored":
        return ()
    return row.judgement.gated_attempts()


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` of the rows, evenly over their order (which is by latent)."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]


@dataclass(frozen=True, eq=False)
class Recorded:
    """The recorded responses of one target. `changed` counts replays whose text is not the measured one."""

    episodes: Sequence[Trace]
    drifts: Sequence[Trace]
    unsteered: Sequence[Trace]
    groups: Mapping[str, Sequence[int]]
    changed: int
    lost: int  # replays of episodes that are no episode any more
    unmarked: int = 0  # episodes left out because a judge was asked for boundaries and gave none that hold

    @property
    def counts(self) -> dict[str, int]:
        return {
            "episodes": len(self.episodes),
            "episodes with two attempts": len(self.twice),
            "steered without restart": len(self.drifts),
            "unsteered": len(self.unsteered),
            "latents": len({t.cluster for t in self.episodes}),
            "replays with another text": self.changed,
            "replays that are no episode": self.lost,
            "replays without verified boundaries": self.unmarked,
        }

    @property
    def watched(self) -> str:
        """Sizes of the groups, in words."""
        many = {name: len(latents) for name, latents in self.groups.items()}
        detectors = f"{many[DETECTORS]} detector{'s' * (many[DETECTORS] != 1)}"
        return f"{detectors}, {many[BACKTRACKING] or 'no'} backtracking latent{'s' * (many[BACKTRACKING] != 1)}"

    @property
    def told(self) -> str:
        """The counts, in words; replays that went differently only where there are any."""
        return ", ".join(f"{n:,} {name}" for name, n in self.counts.items() if n or not name.startswith("replays"))

    @property
    def twice(self) -> list[Trace]:
        """Episodes of exactly two attempts."""
        return [t for t in self.episodes if len(t.attempts) == 2]


def beside(trace: Trace, controls: Sequence[Trace]) -> list[Trace]:
    """Controls of an episode that reach the position of its correction: of its latent where there are any, else all."""
    if trace.start is None:
        raise ValueError(f"{trace.row.trial.key} is no episode")
    same = [c for c in controls if c.cluster == trace.cluster and len(c) >= trace.start]
    return same or [c for c in controls if len(c) >= trace.start]


def recorded(ledger: Ledger, target: str, judge: str, below: float) -> Recorded:
    """Reads back what `record` wrote; controls that turned out to restart are left out."""
    groups = ledger.fact(target, "watched")
    ends = ledger.fact(target, "token ends")
    if groups is None or ends is None:
        raise SteerbackError(f"{ledger.path}: {target} has no recorded episodes yet; resume the run")
    texts = {r.trial.index: r.completion.text for r in ledger.rows(target, "measure") if r.completion is not None}
    traces: dict[str, list[Trace]] = {EPISODES: [], DRIFTS: [], UNSTEERED: []}
    marks = ledger.fact(target, boundaries_fact(judge))
    changed = lost = unmarked = 0
    for row in ledger.rows(target, REPLAY, judge=judge, activations=True):
        condition = row.trial.condition
        if row.completion is None or row.completion.activations is None or not row.valid_receipt:
            continue
        changed += condition != UNSTEERED and row.completion.text != texts.get(row.trial.index)
        if condition == EPISODES and not is_episode(row):
            lost += 1
        elif condition == EPISODES or is_drift(row, below if condition == DRIFTS else math.inf):
            found = trace(row, ends[row.trial.key], groups)
            if condition == EPISODES and marks is not None:
                marked = bounded(found, ends[row.trial.key], marks.get(row.trial.key, {}))
                unmarked += marked is None
                found = marked or found
                if marked is None:
                    continue
            traces[condition].append(found)
    return Recorded(traces[EPISODES], traces[DRIFTS], traces[UNSTEERED], groups, changed, lost, unmarked)


def boundaries_fact(judge: str) -> str:
    """Name of the fact that holds the boundaries a judge has marked."""
    return f"boundaries by {judge}"


def bounded(trace: Trace, ends: Sequence[int], marks: Mapping[str, Any]) -> Trace | None:
    """The episode with regions from marked boundaries (characters); None where one of the three is missing."""
    places = [marks.get(name) for name in ("off_topic", "correction", "on_topic")]
    if None in places or trace.stop is None:
        return None
    begin, start, resume = (min(token_at(ends, int(p)), len(trace)) for p in places if p is not None)
    resume = max(resume, start + 1)
    return replace(trace, begin=min(begin, start), start=start, resume=resume, stop=max(trace.stop, resume))


def trace(row: Row, ends: Sequence[int], groups: Mapping[str, Sequence[int]]) -> Trace:
    """A row's generated tokens with the summed activations of each group; regions where it is an episode."""
    done, planned = row.completion, row.trial.record
    if done is None or planned is None:
        raise ValueError(f"{row.trial.key} was not recorded")
    z = np.asarray(done.activations, dtype=np.float64)[done.prompt_tokens :]
    column = {latent: i for i, latent in enumerate(planned.latents)}
    of_group = {**groups, STEERED: [row.trial.latent] if row.trial.latent in column else []}
    sums = {name: z[:, [column[k] for k in latents]].sum(axis=1) for name, latents in of_group.items()}
    starts = [0, *ends[:-1]]
    pieces = tuple(done.text[a:b] for a, b in zip(starts, ends, strict=True))[: len(z)]
    attempts = _attempts(row)
    if len(attempts) < 2:
        return Trace(row, pieces, sums)
    second = attempts[1]
    after = token_at(ends, second.start + len(second.phrase))
    places = [token_at(ends, second.start), after, token_at(ends, second.end)]
    start, resume, stop = (min(p, len(pieces)) for p in places)
    return Trace(row, pieces, sums, start, max(resume, start + 1), max(stop, resume))


def token_at(ends: Sequence[int], character: int) -> int:
    """Index of the token that holds a character of the text (the number of tokens if it is past the end)."""
    return int(np.searchsorted(np.asarray(ends), character, side="right"))
