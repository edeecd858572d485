"""Appendix A.7: activity of detectors and backtracking latents before, during and after corrections (Figs. A5, A6).

Episodes are recorded as in `traces`; `analysis.episode_statistics` uses episodes of exactly two attempts. The authors'
baseline is recorded too: steered responses with a single on-topic attempt, read again without steering.
"""

from __future__ import annotations

from pydantic import Field

from steerback.experiments.episodes import EpisodeExperiment, EpisodeOptions, recorded_latents, spread
from steerback.store.facts import REREAD_ACTIVITY, RereadActivity
from steerback.study.study import Study


class EpisodeStatisticsOptions(EpisodeOptions):
    """Range of the aligned curves, and the minimum score of the authors' baseline."""

    reach: int = Field(40, ge=1)
    """Tokens before and after the correction in Fig. A5."""
    baseline_from: float = Field(50.0, ge=0, le=100)
    """Minimum score of the single-attempt steered responses that are read again without steering."""


class EpisodeStatistics(EpisodeExperiment[EpisodeStatisticsOptions]):
    """Report region means, tests and aligned curves of all episodes with two attempts."""

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
