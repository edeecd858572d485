"""Separation of two arms of texts by each latent, and its null distribution.

The functions map arrays of activations to arrays of statistics; columns are latents. Ranks are computed once, so that
a permutation of labels costs one matrix product for all latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Floats = NDArray[np.float64]
CHUNK = 4096  # latents ranked at a time, to bound memory for large SAEs


@dataclass(frozen=True, slots=True, eq=False)
class Separation:
    """Statistics of k latents, each array (k,).

    `auc` is P(a mismatched text is more active than a matched one); ties count one half. `effect` is Cohen's d with the
    pooled sd: 0 if the means are equal, infinite if both arms are constant and differ.
    """

    auc: Floats
    effect: Floats
    matched_mean: Floats
    matched_sd: Floats
    matched_median: Floats
    matched_frequency: Floats  # share of texts with a non-zero activation
    mismatched_mean: Floats
    mismatched_sd: Floats
    mismatched_median: Floats
    mismatched_frequency: Floats

    def to_json(self) -> dict[str, list[float | None]]:
        """Return lists of plain numbers; infinite numbers become None."""
        return {
            f.name: [float(v) if np.isfinite(v) else None for v in getattr(self, f.name)] for f in fields(Separation)
        }


@dataclass(frozen=True, slots=True, eq=False)
class NullDraws:
    """Null distribution: `counts` (levels, draws) of latents at or above each AUC level, `largest` AUC (draws,)."""

    counts: NDArray[np.int64]
    largest: Floats


def separation(matched: Array, mismatched: Array) -> Separation:
    """Return the statistics of both arms, (n, k) and (m, k)."""
    arms: dict[str, Floats] = {}
    for name, arm in (("matched", matched), ("mismatched", mismatched)):
        x = np.asarray(arm, dtype=np.float64)
        arms |= {
            f"{name}_mean": x.mean(axis=0),
            f"{name}_sd": x.std(axis=0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1]),
            f"{name}_median": np.median(x, axis=0),
            f"{name}_frequency": (x != 0).mean(axis=0),
        }
    n, m = len(matched), len(mismatched)
    pooled = np.sqrt(((n - 1) * arms["matched_sd"] ** 2 + (m - 1) * arms["mismatched_sd"] ** 2) / max(n + m - 2, 1))
    gap = arms["mismatched_mean"] - arms["matched_mean"]
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(gap == 0, 0.0, gap / pooled)
    return Separation(auc=auc_of(ranks_of(matched, mismatched), n), effect=effect, **arms)


def ranks_of(matched: Array, mismatched: Array) -> Floats:
    """Return the mid-ranks (1 to n + m) of both arms pooled, per latent: (n + m, k), matched texts first."""
    from scipy.stats import rankdata

    pooled = np.concatenate([matched, mismatched])
    if not np.isfinite(pooled).all():
        raise ValueError("activations are not all finite")
    out = np.empty(pooled.shape)
    for start in range(0, pooled.shape[1], CHUNK):
        out[:, start : start + CHUNK] = rankdata(pooled[:, start : start + CHUNK], axis=0)
    return out


def auc_of(ranks: Floats, n: int) -> Floats:
    """Return the exact AUC per latent from `ranks_of` (n + m, k) with n matched texts; 1 if the arms do not overlap."""
    m = len(ranks) - n
    auc: Floats = (ranks[n:].sum(axis=0) - m * (m + 1) / 2) / (n * m)
    return auc


def null_counts(
    ranks: Floats, clusters: NDArray[np.int64], levels: Sequence[float], draws: int, seed: int
) -> NullDraws:
    """Count latents at or above AUC `levels` when the labels of all texts of a cluster are swapped at random.

    `ranks`: (2n, k) from `ranks_of` with arms of n texts each; `clusters`: (n,), the prompt of each text. Both arms of
    a cluster contain the same responses, so swapping its labels changes nothing but the match.
    """
    n = len(clusters)
    numbers = np.unique(clusters, return_inverse=True)[1]
    generator = np.random.default_rng(seed)
    counts = np.zeros((len(levels), draws), dtype=np.int64)
    largest = np.zeros(draws)
    if ranks.shape[1] == 0:
        return NullDraws(counts, largest)
    for start in range(0, draws, 64):
        many = min(64, draws - start)
        swapped = generator.integers(0, 2, (many, numbers.max() + 1)).astype(bool)[:, numbers]
        high = np.concatenate([swapped, ~swapped], axis=1).astype(np.float64)  # (many, 2n): labelled mismatched
        auc = (high @ ranks - n * (n + 1) / 2) / n**2
        largest[start : start + many] = auc.max(axis=1)
        for i, level in enumerate(levels):
            counts[i, start : start + many] = (auc >= level).sum(axis=1)
    return NullDraws(counts, largest)
