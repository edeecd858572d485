"""Experiment 6: activations of detectors and backtracking latents per token during self-corrections.

Episodes of the baseline are replayed with steering and recording; `analysis.traces` defines the lead time (Fig. 7).
"""

from __future__ import annotations

from pydantic import Field

from steerback.experiments.episodes import EpisodeExperiment, EpisodeOptions


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
    """Report detector onset, correction and recovery per token, and the lead time over all episodes."""

    name = "traces"
    title = "Activation traces of episodes and lead time (experiment 6)"
    options_type = TraceOptions
