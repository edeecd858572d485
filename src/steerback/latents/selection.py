"""Select the latents of a run: drop dead, relevant and abstract latents, then draw a stratified sample.

Each dropped latent is counted under the filter that dropped it.

    chosen = select(n_latents=1024, n=50, labels=labels, dead=dead, peaks=peaks, settings=config.selection, seed=42)
    chosen.chosen    # (17, 45, ...)
    chosen.counts    # {"all": 1024, "dropped: dead": 3, ..., "candidates": 402, "without label": 7, "chosen": 50}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from steerback.config import RunConfig, SelectionConfig
from steerback.errors import SteerbackError
from steerback.judging import model_string
from steerback.latents.concreteness import LOCAL_RATERS, OfflineRater, Rater, abstract_labels
from steerback.latents.sampling import sample_latents

TOP = 100
"""Latents dropped per prompt (specification, "Latent Filtering")."""
REFERENCE_SIZE = 65_536
"""Number of latents of the SAEs that `TOP` was chosen for; a smaller SAE drops the same fraction."""


@dataclass(frozen=True, slots=True)
class LatentSelection:
    """Latents to steer with, ascending, and the number of latents that each filter dropped."""

    chosen: tuple[int, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    ratings: Mapping[int, float] = field(default_factory=dict)
    """Concreteness rating (0-100) of every rated label, by latent."""


def select(
    *,
    n_latents: int,
    n: int,
    labels: Mapping[int, str],
    dead: Collection[int],
    peaks: NDArray[np.floating] | None,
    settings: SelectionConfig,
    seed: int = 42,
    rater: Rater | None = None,
    rate_at_most: int | None = None,
    labelled_only: bool = False,
) -> LatentSelection:
    """Filter all latents of an SAE and draw `n`, stratified over index.

    `peaks` (n prompts, n_latents): for each prompt, the maximum activation over the tokens of its unsteered responses,
    without special and template tokens; needed unless the relevance filter is off. A latent that is silent in `peaks`
    is not dead: it may be exactly the off-topic latent wanted, so `dead` is a separate argument. Latents without a
    label cannot be rated; they are counted and stay unless `labelled_only`. `rate_at_most` limits the labels sent to a
    paid rater: a sample is drawn with `seed`, the other latents are dropped, and the median is that of the sample.
    Returns fewer than `n` latents if fewer are left. Raises SteerbackError, with the counts, if none is left.
    """
    counts = {"all": n_latents}
    keep = np.ones(n_latents, dtype=bool)
    keep[[k for k in dead if 0 <= k < n_latents]] = False
    counts["dropped: dead"] = int((~keep).sum())
    if labelled_only:
        unlabelled = keep & ~np.isin(np.arange(n_latents), list(labels))
        counts["dropped: no label"] = int(unlabelled.sum())
        keep &= ~unlabelled
    if settings.relevance != "off":
        _drop_relevant(keep, peaks, settings.relevance, counts)
    candidates = np.flatnonzero(keep).tolist()
    ratings: dict[int, float] = {}
    if settings.concreteness != "off" and labels:
        candidates, ratings = _drop_abstract(candidates, labels, settings, rater, rate_at_most, seed, counts)
    counts["candidates"] = len(candidates)
    counts["without label"] = sum(k not in labels for k in candidates)  # unrated, and the judge gets no label
    if not candidates:
        left_out = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise SteerbackError(
            f"no latent is left to steer with ({left_out}); loosen selection.* or name some with --latents"
        )
    chosen = sample_latents(candidates, n, seed)
    counts["chosen"] = len(chosen)
    return LatentSelection(chosen, counts, ratings)


def rater_of(config: RunConfig) -> str:
    """Return the name of the run's rater; `auto` is the run's judge if that is a language model, else `offline`."""
    if config.selection.rater != "auto":
        return config.selection.rater
    return "offline" if model_string(config.judge) is None else config.judge


def rating_model(config: RunConfig) -> str | None:
    """Return the language model that rates the labels of a run; None if no language model does."""
    rater = rater_of(config)
    chooses = config.latents is None and config.from_run is None and config.selection.concreteness != "off"
    return rater if chooses and rater not in LOCAL_RATERS else None


def rating_sample(config: RunConfig) -> int:
    """Return the number of labels that a language model rates: a sample of the SAE's labels, to limit the cost."""
    return config.selection.rated or max(10 * config.n_latents, 500)


def top_count(n_latents: int) -> int:
    """Return how many latents a prompt excludes: 100, or 100 / 65,536 of a smaller SAE (rounded, at least 1)."""
    if n_latents >= REFERENCE_SIZE:
        return TOP
    return max(1, (2 * TOP * n_latents + REFERENCE_SIZE) // (2 * REFERENCE_SIZE))


def most_active(peaks: NDArray[np.floating], top: int | None = None) -> NDArray[np.bool_]:
    """Return the mask (n latents,) of latents that are among the `top` most active of any prompt.

    Silent latents are never included; ties are broken by index.
    """
    peaks = _checked(peaks)
    count = top_count(peaks.shape[1]) if top is None else top
    order = np.argsort(-peaks, axis=1, kind="stable")[:, :count]
    mask = np.zeros(peaks.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    dropped: NDArray[np.bool_] = np.any(mask & (peaks > 0), axis=0)
    return dropped


def ever_active(peaks: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return the mask (n latents,) of latents with a non-zero activation on any prompt."""
    active: NDArray[np.bool_] = np.any(_checked(peaks) != 0, axis=0)
    return active


def _checked(peaks: NDArray[np.floating]) -> NDArray[np.floating]:
    if peaks.ndim != 2 or 0 in peaks.shape:
        raise ValueError(f"peaks must have shape (n prompts, n latents), not {peaks.shape}")
    if not np.isfinite(peaks).all():
        bad = np.argwhere(~np.isfinite(peaks))[0]
        raise ValueError(f"peak activation of prompt {bad[0]}, latent {bad[1]} is not finite")
    return peaks


def _drop_relevant(
    keep: NDArray[np.bool_], peaks: NDArray[np.floating] | None, rule: str, counts: dict[str, int]
) -> None:
    if peaks is None or peaks.shape[1] != len(keep):
        shape = None if peaks is None else peaks.shape
        raise ValueError(f"relevance filter {rule!r} needs peaks of shape (n prompts, {len(keep)}), not {shape}")
    relevant = ever_active(peaks) if rule == "zero" else most_active(peaks)
    counts["dropped: relevant to a prompt"] = int((keep & relevant).sum())
    keep &= ~relevant


def _drop_abstract(
    candidates: list[int],
    labels: Mapping[int, str],
    settings: SelectionConfig,
    rater: Rater | None,
    rate_at_most: int | None,
    seed: int,
    counts: dict[str, int],
) -> tuple[list[int], dict[int, float]]:
    labelled = [k for k in candidates if k in labels]
    if rate_at_most is not None and len(labelled) > rate_at_most:
        counts["dropped: not rated"] = len(labelled) - rate_at_most
        drawn = sample_latents(labelled, rate_at_most, seed)
        left_out = set(labelled) - set(drawn)
        labelled, candidates = [*drawn], [k for k in candidates if k not in left_out]
    rated = (rater or OfflineRater()).rate([labels[k] for k in labelled])
    ratings = {k: r for k, r in zip(labelled, rated, strict=True) if r is not None}
    counts["rating failed"] = len(labelled) - len(ratings)
    threshold = settings.concreteness_threshold if settings.concreteness == "threshold" else None
    abstract = abstract_labels(ratings, threshold)
    counts["dropped: abstract label"] = len(abstract)
    return [k for k in candidates if k not in abstract], ratings
