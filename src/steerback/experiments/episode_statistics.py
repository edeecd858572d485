"""Appendix A.7: activity of detectors and backtracking latents before, in and after corrections (Figs. A5, A6).

Episodes are recorded as in `traces`; `analysis.episode_statistics` uses those of exactly two attempts.
"""

from __future__ import annotations

from pydantic import Field

from steerback.experiments.episodes import EpisodeExperiment, EpisodeOptions


class EpisodeStatisticsOptions(EpisodeOptions):
    """What the figures show."""

    reach: int = Field(40, ge=1)
    """Tokens before and after the correction in Fig. A5."""


class EpisodeStatistics(EpisodeExperiment[EpisodeStatisticsOptions]):
    """Region means, tests and aligned curves of all episodes with two attempts."""

    name = "episode-statistics"
    title = "Activity around corrections (appendix A.7, Figs. A5, A6)"
    options_type = EpisodeStatisticsOptions
