"""Experiment 6: activations of detectors and backtracking latents, token by token, while a model corrects itself.

Episodes of the baseline are replayed with recording, steering on; `analysis.traces` defines the lead time (Fig. 7).
"""

from __future__ import annotations

from pydantic import Field

from steerback.experiments.episodes import EpisodeExperiment, EpisodeOptions


class TraceOptions(EpisodeOptions):
    """The rule of the onset, and what the figure shows."""

    window: int = Field(3, ge=1)
    """Tokens in the running mean."""
    quantile: float = Field(0.95, ge=0, le=1)
    """Quantile, over the unsteered responses, of their largest running mean: what exceeds it is an onset."""
    show: int = Field(3, ge=1)
    """Number of episodes in the figure, those with the largest gain first."""
    trials: list[int] | None = None
    """Indices of the trials in the figure instead."""


class Traces(EpisodeExperiment[TraceOptions]):
    """Detector onset, correction and return, token by token, with the lead time over all episodes."""

    name = "traces"
    title = "Activation traces of episodes and lead time (experiment 6)"
    options_type = TraceOptions
