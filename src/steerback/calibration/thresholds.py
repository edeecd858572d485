"""Results of a calibration: thresholds, their verification on fresh trials, and a report over all latents.

This module does not know how a threshold was searched for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from steerback.calibration.curves import mean_interval
from steerback.records import LatentKey
from steerback.store.facts import Fact

Scores = Sequence[float | None]
ThresholdStatus = Literal["converged", "at bound", "not converged"]


@dataclass(frozen=True, slots=True)
class Verification:
    """Mean first-attempt score of fresh trials at a threshold, with a 95 % interval (points)."""

    score: float
    low: float
    high: float
    n_trials: int
    n_unscored: int = 0


@dataclass(frozen=True, slots=True)
class Threshold:
    """A calibrated boost with its status. `low`, `high`: 95 % interval, in boost units."""

    boost: float
    low: float
    high: float
    status: ThresholdStatus
    reason: str
    """Explanation of the status, one clause."""
    target_score: float
    tolerance: float
    score: float | None
    """Mean first-attempt score of the fitted curve at `boost`; None if nothing was scored."""
    score_se: float | None
    """Standard error of `score`, points."""
    n_rounds: int
    n_trials: int
    n_unscored: int
    posterior_median: float
    posterior_low: float
    posterior_high: float
    """Median and central 95 % of the bisection posterior (authors' estimate); not a calibrated interval."""
    verification: Verification | None = None
    contradicted: bool = False
    """True if the curve converged but fresh trials are outside the tolerance, so that the threshold lost its status."""

    @property
    def usable(self) -> bool:
        """Return True if the boost may be used for the target score."""
        return self.status == "converged"

    @property
    def mean_first_score(self) -> float | None:
        """Verified mean score if there is one, else the fitted one."""
        return self.verification.score if self.verification else self.score


def verified(threshold: Threshold, scores: Scores) -> Threshold:
    """Return `threshold` with the mean of fresh first-attempt scores at its boost (None: unscored).

    A converged threshold loses that status if its verification interval is entirely outside target +- tolerance.
    """
    scored = [float(s) for s in scores if s is not None]
    if not scored:
        return threshold
    mean = math.fsum(scored) / len(scored)
    low, high = mean_interval(scored)
    check = Verification(mean, low, high, len(scored), len(scores) - len(scored))
    missed = low > threshold.target_score + threshold.tolerance or high < threshold.target_score - threshold.tolerance
    if threshold.status == "converged" and missed:
        why = f"fresh trials score {mean:.0f} [{low:.0f}, {high:.0f}], outside the tolerance"
        return replace(threshold, verification=check, status="not converged", reason=why, contradicted=True)
    return replace(threshold, verification=check)


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """Calibration of all latents of a target. The tolerance applies to the average over latents."""

    n: int
    statuses: Mapping[ThresholdStatus, int] = field(default_factory=dict)
    n_judged: int = 0
    """Converged thresholds with a score, which is the verified one if fresh trials exist. The numbers below cover
    these."""
    n_verified: int = 0
    mean_score: float | None = None
    mean_low: float | None = None
    mean_high: float | None = None
    """Average over latents of the mean first-attempt score, with a 95 % t interval over latents."""
    within_tolerance: bool | None = None
    share_outside: float | None = None
    """Share of latents whose mean differs by more than the tolerance; includes the noise of few fresh trials."""
    share_clearly_outside: float | None = None
    """Share of latents whose 95 % verification interval is entirely outside target +- tolerance (all verified
    latents)."""
    spread: float | None = None
    """Estimated sd across latents of the true mean score, without the noise of the verification (points)."""
    boost_mean: float | None = None
    boost_sd: float | None = None
    """Standard deviation of the converged thresholds, the unit of the boost sweep. None if fewer than two converged."""
    n_trials: int = 0
    n_unscored: int = 0


def assess(thresholds: Sequence[Threshold]) -> CalibrationReport:
    """Return the report on the calibration of a set of latents."""
    counts = Counter(t.status for t in thresholds)
    checks = [t.verification for t in thresholds if t.verification]
    report = CalibrationReport(
        n=len(thresholds),
        statuses={s: counts.get(s, 0) for s in get_args(ThresholdStatus)},
        n_verified=len(checks),
        n_trials=sum(t.n_trials + (t.verification.n_trials if t.verification else 0) for t in thresholds),
        n_unscored=sum(t.n_unscored + (t.verification.n_unscored if t.verification else 0) for t in thresholds),
    )
    # A contradicted threshold stays in the average, because dropping it would hide the error that its verification
    # shows.
    judged = [t for t in thresholds if t.mean_first_score is not None and (t.usable or t.contradicted)]
    if not judged:
        return report
    scores = np.array([t.mean_first_score for t in judged], dtype=float)
    off = np.array([abs(s - t.target_score) > t.tolerance for s, t in zip(scores, judged, strict=True)])
    mean = float(scores.mean())
    half = _t_half_width(scores)
    usable = np.array([t.boost for t in thresholds if t.usable])
    contradicted = sum(t.contradicted for t in judged)
    noise = [((t.verification.high - t.verification.low) / 3.92) ** 2 for t in judged if t.verification]
    n_checked = len(noise)
    return replace(
        report,
        n_judged=len(judged),
        mean_score=mean,
        mean_low=None if half is None else max(mean - half, 0.0),
        mean_high=None if half is None else min(mean + half, 100.0),
        within_tolerance=abs(mean - judged[0].target_score) <= judged[0].tolerance,
        share_outside=float(off.mean()),
        share_clearly_outside=contradicted / n_checked if n_checked else None,
        spread=math.sqrt(max(float(scores.var(ddof=1)) - float(np.mean(noise)), 0.0)) if n_checked > 1 else None,
        boost_mean=float(usable.mean()) if usable.size else None,
        boost_sd=float(usable.std(ddof=1)) if usable.size > 1 else None,
    )


def _t_half_width(values: NDArray[np.float64]) -> float | None:
    if values.size < 2:
        return None
    from scipy.special import stdtrit

    return float(stdtrit(values.size - 1, 0.975) * values.std(ddof=1) / math.sqrt(values.size))


class LatentThreshold(BaseModel):
    """Threshold of one latent as stored in the ledger: the fields of the threshold and `latent`."""

    model_config = ConfigDict(frozen=True)

    latent: LatentKey
    threshold: Threshold

    @classmethod
    def of(cls, latent: LatentKey, threshold: Threshold) -> LatentThreshold:
        """Combine a latent with its threshold."""
        return cls(latent=latent, threshold=threshold)

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, stored: object) -> object:
        if not isinstance(stored, Mapping) or "threshold" in stored:
            return stored
        threshold = {k: v for k, v in stored.items() if k != "latent"}
        if threshold.get("verification") is not None:
            # ledgers of version 0.1 lack this field, but only converged thresholds are verified
            threshold.setdefault("contradicted", threshold.get("status") == "not converged")
        return {"latent": stored.get("latent"), "threshold": threshold}

    @model_serializer
    def _flat(self) -> dict[str, object]:
        return {"latent": self.latent, **asdict(self.threshold)}


THRESHOLDS = Fact.of("thresholds", list[LatentThreshold])
