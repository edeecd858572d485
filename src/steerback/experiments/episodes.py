"""Recording of episodes: replays of responses with a self-correction, with activations of selected latents.

Shared by `traces` and `episode-statistics`. Two kinds of controls are recorded too: steered responses that drift
without a restart, and unsteered responses. Activations are recorded before any addition or clamp, so the steering
vector itself is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeVar

import numpy as np
from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.detectors import SearchOptions, UsesDetectors, detectors_of
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
    REREAD_ACTIVITY,
    TOKEN_ENDS,
    UNSTEERED,
    RereadActivity,
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


class EpisodeExperiment(UsesDetectors[EpisodeOptionsType]):
    """Base class of the experiments about episodes: baseline, then recording of episodes and controls."""

    reports_rates = False

    def conditions(self, config: RunConfig) -> int:
        return 1

    def further(self, config: RunConfig) -> dict[str, int]:
        return super().further(config) | {REPLAY: 3 * self.options.max_episodes}

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


class TraceOptions(EpisodeOptions):
    """Onset rule, and selection of episodes for the figure."""

    window: int = Field(3, ge=1)
    """Number of tokens in the running mean."""
    quantile: float = Field(0.95, ge=0, le=1)
    """Quantile of the maximum running mean over the unsteered responses; a higher running mean is an onset."""
    show: int = Field(3, ge=1)
    """Number of episodes in the figure, those with the largest gain first."""
    trials: list[int] | None = None
    """Indices of the trials in the figure, instead of `show`."""


class Traces(EpisodeExperiment[TraceOptions]):
    """Report detector onset, correction and recovery per token, and the lead time over all episodes.

    Experiment 6, Fig. 7; `analysis.traces` defines the lead time.
    """

    name = "traces"
    title = "Activation traces of episodes and lead time (experiment 6)"
    options_type = TraceOptions


class EpisodeStatisticsOptions(EpisodeOptions):
    """Range of the aligned curves, and the minimum score of the authors' baseline."""

    reach: int = Field(40, ge=1)
    """Tokens before and after the correction in Fig. A5."""
    baseline_from: float = Field(50.0, ge=0, le=100)
    """Minimum score of the single-attempt steered responses that are read again without steering."""


class EpisodeStatistics(EpisodeExperiment[EpisodeStatisticsOptions]):
    """Report region means, tests and aligned curves of all episodes with two attempts.

    The authors' baseline is recorded too: steered responses with a single on-topic attempt, read again without
    steering.
    """

    name = "episode-statistics"
    title = "Activity around corrections (appendix A.7, Figs. A5, A6)"
    options_type = EpisodeStatisticsOptions

    async def run(self, study: Study) -> None:
        """Record episodes and controls, then read the on-topic steered responses without steering."""
        await super().run(study)
        if study.run.ledger.get(study.name, REREAD_ACTIVITY) is not None:
            return
        groups = await recorded_latents(study, self.options)
        latents = list(dict.fromkeys(k for group in groups.values() for k in group))
        rows = [r for r in await study.baseline_rows() if r.is_on_topic(self.options.baseline_from)]
        texts = {
            r.trial.key: (r.trial.prompt, r.completion.text)
            for r in spread(rows, self.options.max_episodes)
            if r.completion is not None
        }
        prompts, responses = zip(*texts.values(), strict=True) if texts else ((), ())
        means = study.engine.activations(prompts, responses, latents=latents, pool="mean").tolist() if texts else []
        activity = RereadActivity(latents=latents, means=dict(zip(texts, means, strict=True)))
        study.run.ledger.put(study.name, REREAD_ACTIVITY, activity)
