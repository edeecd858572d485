"""Does a metric rise or fall along ordered conditions (doses, mixes, boosts)? Clustered by latent; arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from steerback.metrics import intervals as iv
from steerback.metrics.outcomes import VALID, Outcomes
from steerback.metrics.rates import METRICS, influence, view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trend:
    """Least-squares slope of a metric's values over the levels (each level weighs the same), per unit of the level.

    `p` is two-sided, from permuting the levels within latents. None where a level has no trial of the metric.
    """

    metric: str
    levels: tuple[float, ...]
    values: tuple[float | None, ...]
    slope: float | None
    low: float | None
    high: float | None
    method: str
    p: float | None
    p_method: str
    clusters: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def trend(
    levels: Sequence[float],
    outcomes: Sequence[Outcomes],
    metric: str = "multi_attempt_rate",
    draws: int = 10_000,
    seed: int = 0,
    gated: bool = True,
    include_degraded: bool = False,
    icc: float = iv.ICC,
) -> Trend:
    """Trend of `metric` over conditions measured at `levels`, one outcomes each, with the same latents in all.

    Under the null the conditions of one latent are exchangeable. Raises ValueError unless there are at least two
    different levels.
    """
    x = np.asarray(levels, dtype=np.float64)
    if len(x) != len(outcomes) or len(np.unique(x)) < 2:
        raise ValueError(f"a trend needs one condition a level and two different levels, got {list(levels)}")
    m = METRICS[metric]
    views = [view(o, gated=gated, include_degraded=include_degraded) for o in outcomes]
    codes = [_codes(o, include_degraded) for o in outcomes]
    latents = np.unique(np.concatenate(codes))
    parts = [(np.searchsorted(latents, c), *m.parts(v)) for c, v in zip(codes, views, strict=True)]
    sums = np.stack(
        [np.stack([iv.cluster_sums(c, part, len(latents)) for part in nd], axis=1) for c, *nd in parts], axis=1
    )  # (latents, levels, 2)
    totals = sums.sum(axis=0)
    values = tuple(float(n / d) if d > 0 else None for n, d in totals)
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    if any(v is None for v in values):
        why = "no trials at one of the levels"
        return Trend(metric, tuple(x.tolist()), values, None, None, None, why, None, why, len(latents))
    slope = float(weights @ np.array(values, dtype=np.float64))
    cluster = np.concatenate([c for c, *_ in parts])
    effect = np.concatenate([w * influence(num, den) for w, (_, num, den) in zip(weights, parts, strict=True)])
    member = np.concatenate([den > 0 for _, _, den in parts])
    rest = np.nan if m.rest is None else m.rest
    event = member & np.concatenate([num != rest for _, num, _ in parts])
    reach = float(np.sum(np.abs(weights)) * (m.limits[1] - m.limits[0]))
    bounds = iv.mean_interval(
        slope,
        iv.cluster_sums(cluster, member.astype(np.float64)),
        iv.influence_variance(effect, cluster, member),
        int(event.sum()),
        len(np.unique(cluster[event])),
        (-reach, reach),
        icc,
    )
    p, p_method = _permute(sums, weights, slope, draws, seed)
    return Trend(metric, tuple(x.tolist()), values, slope, *bounds, p, p_method, len(latents))


def _codes(outcomes: Outcomes, include_degraded: bool) -> NDArray[np.int64]:
    keep = outcomes.state == VALID
    if not include_degraded:
        keep = keep & ~outcomes.degraded
    return np.asarray(outcomes.cluster[keep], dtype=np.int64)


def _permute(sums: Floats, weights: Floats, slope: float, draws: int, seed: int) -> tuple[float, str]:
    """(1 + hits) / (1 + draws) over random orders of each latent's conditions; an undefined slope is a hit."""
    moving = np.any(sums != sums[:, :1], axis=(1, 2))
    if not np.any(moving):
        return 1.0, "no latent differs between levels"
    still, sums = sums[~moving].sum(axis=0), sums[moving]
    rng = np.random.default_rng(seed)
    block = max(1, iv.CELLS // (2 * sums.shape[0] * sums.shape[1]))
    hits = 0
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        order = np.argsort(rng.random((rows, *sums.shape[:2])), axis=2)
        totals = still + np.take_along_axis(sums[None], order[..., None], axis=2).sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = np.abs((totals[..., 0] / totals[..., 1]) @ weights)
        hits += int(np.sum(~(slopes < abs(slope) * (1 - 1e-9) - 1e-15)))
    return (1 + hits) / (1 + draws), f"levels permuted within latents, {draws} drawn"
