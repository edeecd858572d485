"""Regions of episodes by latent (appendix A.7): mean activation, and off-topic minus on-topic difference.

The value of a latent in a region of an episode is its mean activation over the region's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.episodes import Recorded
from steerback.metrics.regions import RegionTest, correct_regions, paired_regions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

REGIONS = ("off-topic", "correction", "on-topic")
DRAWS = 2000


@dataclass(frozen=True)
class RegionValues:
    """Mean and sd of a latent in one region over the episodes, and the share of episodes in which it is active."""

    mean: float | None
    sd: float | None
    active: float | None
    n: int


@dataclass(frozen=True)
class LatentRegions:
    """Regions of one latent, and the paired test of off-topic minus on-topic, Holm-corrected over latents."""

    group: str
    latent: int
    label: str | None
    regions: Mapping[str, RegionValues]
    test: RegionTest


def latent_regions(recorded: Recorded) -> list[LatentRegions]:
    """Return every latent of every group over the episodes with two attempts, largest effect first in each group."""
    if not recorded.twice:
        return []
    latents = list(dict.fromkeys(k for group in recorded.groups.values() for k in group))
    cluster = np.array([t.cluster for t in recorded.twice], dtype=np.int64)
    values = _values(recorded, latents)
    off, on = values["off-topic"], values["on-topic"]
    tests = {str(k): paired_regions(on[:, i], off[:, i], cluster, DRAWS) for i, k in enumerate(latents)}
    tests = correct_regions(tests)
    column = {k: i for i, k in enumerate(latents)}
    rows = [
        LatentRegions(
            group=group,
            latent=k,
            label=recorded.labels.get(k),
            regions={name: _summary(v[:, column[k]]) for name, v in values.items()},
            test=tests[str(k)],
        )
        for group, members in recorded.groups.items()
        for k in members
    ]
    order = {group: n for n, group in enumerate(recorded.groups)}
    return sorted(rows, key=lambda x: (order[x.group], -np.inf if x.test.cohens_d is None else -x.test.cohens_d))


def _values(recorded: Recorded, latents: list[int]) -> dict[str, Floats]:
    """Return by region (episodes, latents): mean activation over the region's tokens, nan without tokens."""
    values: dict[str, list[Floats]] = {name: [] for name in REGIONS}
    for trace in recorded.twice:
        done, record = trace.row.completion, trace.row.trial.record
        if done is None or done.activations is None or record is None:
            raise ValueError(f"{trace.row.trial.key} was not recorded")
        columns = [record.latents.index(k) for k in latents]
        z = np.asarray(done.activations[done.prompt_tokens :][:, columns], dtype=np.float64)
        for name, part in trace.regions().items():
            values[name].append(z[part].mean(axis=0) if len(z[part]) else np.full(len(latents), np.nan))
    return {name: np.array(rows) for name, rows in values.items()}


def _summary(values: Floats) -> RegionValues:
    values = values[np.isfinite(values)]
    if not len(values):
        return RegionValues(None, None, None, 0)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return RegionValues(float(values.mean()), sd, float((values > 0).mean()), len(values))
