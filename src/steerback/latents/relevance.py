"""Leave out latents that the prompts evoke by themselves: steering with those would not be off topic.

Works on an array of peak activations, (n prompts, n latents): for each prompt the maximum over the tokens of its
unsteered responses, special and template tokens excluded (`Engine.activations`). Which latents are dead is no question
for this array: a latent that stays silent here may be exactly the off-topic one wanted.

    dropped = most_active(peaks)          # the specification: each prompt's 100 most active latents, union
    dropped = ever_active(prompt_peaks)   # the authors' code: anything but exactly 0 on all prompts, prompt tokens only
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

TOP = 100
"""Latents dropped per prompt (specification, "Latent Filtering")."""
REFERENCE_SIZE = 65_536
"""Number of latents of the SAEs that `TOP` was chosen for; a smaller SAE loses the same fraction."""


def top_count(n_latents: int) -> int:
    """How many latents a prompt excludes: 100, or 100 / 65,536 of a smaller SAE to the nearest integer, at least 1."""
    if n_latents >= REFERENCE_SIZE:
        return TOP
    return max(1, (2 * TOP * n_latents + REFERENCE_SIZE) // (2 * REFERENCE_SIZE))


def most_active(peaks: NDArray[np.floating[Any]], top: int | None = None) -> NDArray[np.bool_]:
    """Mask (n latents,) of those among the `top` most active of any prompt. Silent latents are never among them.

    Equal activations are taken in index order.
    """
    peaks = _checked(peaks)
    count = top_count(peaks.shape[1]) if top is None else top
    order = np.argsort(-peaks, axis=1, kind="stable")[:, :count]
    mask = np.zeros(peaks.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    dropped: NDArray[np.bool_] = np.any(mask & (peaks > 0), axis=0)
    return dropped


def ever_active(peaks: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Mask (n latents,) of those that are not exactly 0 on every prompt."""
    active: NDArray[np.bool_] = np.any(_checked(peaks) != 0, axis=0)
    return active


def _checked(peaks: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    if peaks.ndim != 2 or 0 in peaks.shape:
        raise ValueError(f"peaks should be (n prompts, n latents), not {peaks.shape}")
    if not np.isfinite(peaks).all():
        bad = np.argwhere(~np.isfinite(peaks))[0]
        raise ValueError(f"peak activation of prompt {bad[0]}, latent {bad[1]} is not finite")
    return peaks
