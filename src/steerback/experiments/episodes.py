"""Recording of episodes: replays of responses with a self-correction, with activations of selected latents.

Shared by `traces` and `episode-statistics`. Two kinds of controls are recorded too: steered responses that drift
without a restart, and unsteered responses. Activations are recorded before any addition or clamp, so the steering
vector itself is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, TypeVar

import numpy as np
from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.base import Experiment
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, search_responses
from steerback.latents.backtracking import find_backtracking
from steerback.records import Recording, Trial
from steerback.store.facts import (
    BACKTRACKING,
    DETECTORS,
    DRIFTS,
    EPISODES,
    RECORDED_LABELS,
    RECORDED_LATENTS,
    REPLAY,
    TOKEN_ENDS,
    UNSTEERED,
)
from steerback.store.ledger import Row
from steerback.study.pipeline import complete
from steerback.study.study import Study


class EpisodeOptions(SearchOptions):
    """Selection of episodes, and of recorded latents besides the detectors."""

    max_episodes: int = Field(200, ge=1)
    """Maximum number of recorded responses of each kind, spread evenly over the latents."""
    drift_below: float = Field(50.0, ge=0, le=100)
    """A single attempt with a lower score counts as drifted."""
    backtracking: list[Annotated[int, Field(ge=0)]] | None = None
    """Latents that accompany corrections; default: those with a matching label, at most `most_backtracking`."""
    most_backtracking: int = Field(50, ge=0)
    """Maximum number of backtracking latents selected by label, best match first."""


EpisodeOptionsType = TypeVar("EpisodeOptionsType", bound=EpisodeOptions)


class EpisodeExperiment(Experiment[EpisodeOptionsType]):
    """Base class of the experiments about episodes: baseline, then recording of episodes and controls."""

    needs_sae = True
    reports_rates = False
    authors: ClassVar[Mapping[str, object]] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 1

    def further(self, config: RunConfig) -> dict[str, int]:
        return search_responses(self.options) | {REPLAY: 3 * self.options.max_episodes}

    async def run(self, study: Study) -> None:
        """Measure the baseline, select episodes and controls from it, and replay them with recording."""
        latents = await recorded_latents(study, self.options)
        rows = await study.baseline_rows()
        limit, below = self.options.max_episodes, self.options.drift_below
        episodes = spread([r for r in rows if r.is_episode], limit)
        drifts = spread([r for r in rows if r.is_drift(below)], limit)
        trials = [_replay(study, r.trial, EPISODES, latents) for r in episodes]
        trials += [_replay(study, r.trial, DRIFTS, latents) for r in drifts]
        trials += [_replay(study, r.trial, UNSTEERED, latents) for r in episodes]
        replays = await complete(study.bench, trials, stage=f"{study.name}: episodes with recording")
        ends = {r.trial.key: study.engine.token_ends(r.completion) for r in replays if r.completion is not None}
        study.run.ledger.put(study.name, TOKEN_ENDS, ends)


async def recorded_latents(study: Study, options: EpisodeOptions) -> dict[str, list[int]]:
    """Return the recorded latents besides the steered one, by group; they are chosen once and stored."""
    groups = study.run.ledger.get(study.name, RECORDED_LATENTS)
    if groups is None:
        detectors = await detectors_of(study, options)
        backtracking = options.backtracking
        if backtracking is None:
            matches = find_backtracking(study.target.labels(), limit=options.most_backtracking)
            backtracking = [match.latent for match in matches]
        groups = {DETECTORS: list(detectors.latents), BACKTRACKING: backtracking}
        study.run.ledger.put(study.name, RECORDED_LATENTS, groups)
        labels = {k: label for latents in groups.values() for k in latents if (label := study.label(k)) is not None}
        study.run.ledger.put(study.name, RECORDED_LABELS, labels)
    return groups


def _replay(study: Study, trial: Trial, condition: str, groups: Mapping[str, Sequence[int]]) -> Trial:
    """Return the trial with a recording of the groups' latents and of its steered latent."""
    steered = (trial.latent,) if isinstance(trial.latent, int) else ()
    latents = dict.fromkeys((*groups[DETECTORS], *groups[BACKTRACKING], *steered))
    return study.trial(
        REPLAY,
        condition,
        trial.index,
        prompt=trial.prompt,
        seed=trial.seed,
        latent=trial.latent,
        label=trial.label,
        interventions=() if condition == UNSTEERED else trial.interventions,
        record=Recording(tuple(latents)),
    )


def spread(rows: Sequence[Row], limit: int) -> list[Row]:
    """Return at most `limit` rows, spread evenly over their order (sorted by latent)."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i] for i in np.linspace(0, len(rows) - 1, limit).round().astype(int)]
