"""Recorded episodes: activations of responses with a self-correction, by region and group of latents.

Shared by `traces` and `episode_statistics`. The controls of an episode are steered responses that drift without a
restart, and unsteered responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from steerback.errors import SteerbackError
from steerback.metrics import cluster_code
from steerback.metrics.intervals import Floats
from steerback.metrics.regions import Sample
from steerback.records import LatentKey
from steerback.store.facts import (
    DRIFTS,
    EPISODES,
    RECORDED_LABELS,
    RECORDED_LATENTS,
    REPLAY,
    REREAD,
    REREAD_ACTIVITY,
    STEERED,
    TOKEN_ENDS,
    UNSTEERED,
    Boundaries,
    boundaries,
)
from steerback.store.ledger import Ledger, Row


@dataclass(frozen=True, eq=False)
class Trace:
    """One recorded response of T fed-back tokens.

    `pieces` are the tokens as text (T,); `sums` maps a group of latents to its summed activation per token (T,).
    Boundaries of an episode: `begin` is the first off-topic token (0 unless a judge marked boundaries), `start` the
    first token of the correction (the restart phrase), `resume` the first token after that phrase, and `stop` the end
    of the second attempt. For other responses, the last three are None.
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
        """Latent of the trial."""
        return self.row.trial.latent

    @property
    def cluster(self) -> int:
        """Code of the latent, used as cluster in the statistics."""
        return cluster_code(self.latent)

    def regions(self) -> dict[str, slice]:
        """Return an episode's tokens before the correction, in its restart phrase, and later in the second attempt."""
        if self.start is None or self.resume is None or self.stop is None:
            raise ValueError(f"{self.row.trial.key} is not an episode")
        return {
            "off-topic": slice(self.begin, self.start),
            "correction": slice(self.start, self.resume),
            "on-topic": slice(self.resume, self.stop),
        }


@dataclass(frozen=True, eq=False)
class Recorded:
    """Recorded responses of one target.

    `changed` counts replays whose text differs from the measured one, `lost` counts replays that are no longer
    episodes, and `unmarked` counts episodes excluded because the judge gave no valid boundaries.
    """

    episodes: Sequence[Trace]
    drifts: Sequence[Trace]
    unsteered: Sequence[Trace]
    groups: Mapping[str, Sequence[int]]
    changed: int
    lost: int
    unmarked: int = 0
    reread: Mapping[str, Sample] = field(default_factory=dict)
    """By group, the summed activation per token of steered responses that were read again without steering."""
    labels: Mapping[int, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of responses by type; replays with another result come last."""
        return {
            "episodes": len(self.episodes),
            "episodes with two attempts": len(self.twice),
            "steered without restart": len(self.drifts),
            "unsteered": len(self.unsteered),
            **({REREAD: len(next(iter(self.reread.values()))[0])} if self.reread else {}),
            "latents": len({t.cluster for t in self.episodes}),
            "replays with another text": self.changed,
            "replays that are no episode": self.lost,
            "replays without verified boundaries": self.unmarked,
        }

    @property
    def twice(self) -> list[Trace]:
        """Episodes of exactly two attempts."""
        return [t for t in self.episodes if len(t.row.attempts) == 2]


def recorded_targets(ledger: Ledger, judge: str, below: float, least: float = 0.0) -> dict[str, Recorded]:
    """Return the recorded responses of every target that has any."""
    return {target: recorded(ledger, target, judge, below, least) for target in ledger.targets_with(TOKEN_ENDS)}


def recorded(ledger: Ledger, target: str, judge: str, below: float, least: float = 0.0) -> Recorded:
    """Return the recorded responses of a target, without controls that contain a restart.

    A drift is a single attempt that scores below `below`; a response that was read again scores at least `least`.
    """
    groups, ends = ledger.get(target, RECORDED_LATENTS), ledger.get(target, TOKEN_ENDS)
    if groups is None or ends is None:
        raise SteerbackError(f"{ledger.path}: {target} has no recorded episodes yet; resume the run")
    replays = ledger.rows(target, REPLAY, judge=judge, activations=True)
    indices = {row.trial.index for row in replays}
    keys = [row.trial.key for row in ledger.outlines(target, "measure") if row.trial.index in indices]
    texts = {r.trial.index: r.completion.text for r in ledger.stream(keys) if r.completion is not None}
    traces: dict[str, list[Trace]] = {EPISODES: [], DRIFTS: [], UNSTEERED: []}
    marks = ledger.get(target, boundaries(judge))
    labels = ledger.get(target, RECORDED_LABELS)
    changed = lost = unmarked = 0
    for row in replays:
        condition, key = row.trial.condition, row.trial.key
        if row.completion is None or row.completion.activations is None or not row.valid_receipt:
            continue
        # A replay may differ in text, for example on other hardware; such replays are counted and kept.
        changed += condition != UNSTEERED and row.completion.text != texts.get(row.trial.index)
        if condition != EPISODES:
            if row.is_drift(below if condition == DRIFTS else math.inf):
                traces[condition].append(trace(row, ends[key], groups))
            continue
        if not row.is_episode:
            lost += 1
            continue
        episode: Trace | None = trace(row, ends[key], groups)
        if marks is not None and episode is not None:
            episode = bounded(episode, ends[key], marks.get(key, Boundaries()))
        if episode is None:
            unmarked += 1
        else:
            traces[EPISODES].append(episode)
    return Recorded(
        traces[EPISODES],
        traces[DRIFTS],
        traces[UNSTEERED],
        groups,
        changed,
        lost,
        unmarked,
        _reread(ledger, target, judge, groups, least),
        labels or {},
    )


def _reread(
    ledger: Ledger, target: str, judge: str, groups: Mapping[str, Sequence[int]], least: float
) -> dict[str, Sample]:
    """Return each group's activity in the responses that were read again and that are on-topic by the judge's score."""
    stored = ledger.get(target, REREAD_ACTIVITY)
    if stored is None:
        return {}
    outlines = ledger.outlines(target, judge=judge, keys=list(stored.means))
    rows = [row for row in outlines if row.is_on_topic(least)]
    if not rows:
        return {}
    column = {latent: i for i, latent in enumerate(stored.latents)}
    means = np.array([stored.means[row.trial.key] for row in rows], dtype=np.float64)
    codes = np.array([cluster_code(row.trial.latent) for row in rows], dtype=np.int64)
    return {name: (means[:, [column[k] for k in latents]].sum(axis=1), codes) for name, latents in groups.items()}


def trace(row: Row, ends: Sequence[int], groups: Mapping[str, Sequence[int]]) -> Trace:
    """Return a row's generated tokens with each group's summed activations; an episode also gets its regions."""
    done, record = row.completion, row.trial.record
    if done is None or record is None:
        raise ValueError(f"{row.trial.key} was not recorded")
    z = np.asarray(done.activations, dtype=np.float64)[done.prompt_tokens :]
    column = {latent: i for i, latent in enumerate(record.latents)}
    steered = [row.trial.latent] if isinstance(row.trial.latent, int) and row.trial.latent in column else []
    of_group: dict[str, Sequence[int]] = {**groups, STEERED: steered}
    sums = {name: z[:, [column[k] for k in latents]].sum(axis=1) for name, latents in of_group.items()}
    starts = [0, *ends[:-1]]
    pieces = tuple(done.text[a:b] for a, b in zip(starts, ends, strict=True))[: len(z)]
    if len(row.attempts) < 2:
        return Trace(row, pieces, sums)
    second = row.attempts[1]
    after = token_at(ends, second.start + len(second.phrase))
    places = [token_at(ends, second.start), after, token_at(ends, second.end)]
    start, resume, stop = (min(p, len(pieces)) for p in places)
    return Trace(row, pieces, sums, start, max(resume, start + 1), max(stop, resume))


def bounded(episode: Trace, ends: Sequence[int], marks: Boundaries) -> Trace | None:
    """Return the episode with regions from marked boundaries (characters), or None if one of the three is missing."""
    if marks.off_topic is None or marks.correction is None or marks.on_topic is None or episode.stop is None:
        return None
    places = (marks.off_topic, marks.correction, marks.on_topic)
    begin, start, resume = (min(token_at(ends, place), len(episode)) for place in places)
    resume = max(resume, start + 1)
    return replace(episode, begin=min(begin, start), start=start, resume=resume, stop=max(episode.stop, resume))


def token_at(ends: Sequence[int], character: int) -> int:
    """Return the index of the token that contains a character of the text; past the end, the number of tokens."""
    return int(np.searchsorted(np.asarray(ends), character, side="right"))


def controls_of(episode: Trace, controls: Sequence[Trace]) -> list[Trace]:
    """Return the episode's controls that reach its correction: those of its latent if there are any, else all."""
    start = episode.start
    if start is None:
        raise ValueError(f"{episode.row.trial.key} is not an episode")
    same = [c for c in controls if c.cluster == episode.cluster and len(c) >= start]
    return same or [c for c in controls if len(c) >= start]
