"""Search for one latent's threshold: probabilistic bisection that keeps its rounds.

This module uses one latent's boosts and scores. `curves` fits a curve to them; `thresholds` reports the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from steerback.calibration.curves import FallingFit, fit_falling
from steerback.calibration.thresholds import Scores, Threshold, ThresholdStatus
from steerback.config import CalibrationConfig
from steerback.records import BoostPrior

DRAWS = 1000
"""Bootstrap draws for the interval of a threshold."""
GRID_POINTS = 10_000
"""Number of boosts in the posterior's grid."""


@dataclass(frozen=True, slots=True)
class Round:
    """One batch of trials at one boost: the scored trials, and the number of unscored ones."""

    boost: float
    scores: tuple[float, ...]
    unscored: int = 0

    @property
    def mean(self) -> float:
        """Mean score, 0-100; NaN if nothing was scored."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else math.nan


def probability_above(mean_score: float, target_score: float, weight: float) -> float:
    """Return P(true mean > target) under Beta(1/2 + w s, 1/2 + w (1 - s)), s = mean_score / 100, w = weight
    (pseudo-counts).

    This updates Jeffreys' prior as if the round were `weight` yes/no trials. Scores within 0-100 cannot vary more than
    that, so with weight = number of trials it never overstates the evidence of a round.
    """
    from scipy.special import betainc

    s = mean_score / 100.0
    return 1.0 - float(betainc(0.5 + weight * s, 0.5 + weight * (1.0 - s), target_score / 100.0))


class Calibrator:
    """Search for one latent's threshold. Scores are assumed to fall with boost."""

    def __init__(
        self,
        prior: BoostPrior,
        settings: CalibrationConfig | None = None,
        draws: int = DRAWS,
        grid_points: int = GRID_POINTS,
    ) -> None:
        self.prior = prior
        self.settings = settings or CalibrationConfig()
        self.draws = draws
        self.rounds: list[Round] = []
        self._grid = np.linspace(prior.low, prior.high, grid_points)
        self._log_density = -0.5 * ((self._grid - prior.mean) / prior.sd) ** 2  # up to a constant

    def replay(self, history: Iterable[tuple[float, Scores]]) -> Calibrator:
        """Add the rounds of `history`, for example when a run is resumed. The state is identical bit for bit."""
        for boost, scores in history:
            self.update(boost, scores)
        return self

    @property
    def done(self) -> bool:
        stopped = self.settings.stop == "tolerance" and bool(self.rounds) and self._near(self.rounds[-1].mean)
        return stopped or len(self.rounds) >= self.settings.max_iterations

    def next_boost(self) -> float | None:
        """Return the next boost to sample, which is the posterior median, or None when the search is over.

        If half of the rounds have not crossed the target, one round is spent on the bound in the direction of the
        search. The status "at bound" is then measured, not inferred.
        """
        if self.done:
            return None
        bound = self._heading() if self.settings.estimate == "fit" else None
        if bound is not None and len(self.rounds) >= (self.settings.max_iterations + 1) // 2:
            tested = {r.boost for r in self.rounds if r.scores}
            if bound not in tested:
                return bound
        return self._quantile(0.5)

    def update(self, boost: float, scores: Scores) -> None:
        """Add one round: first-attempt scores (0-100) at `boost`; None marks an unscored trial, which is skipped.

        Bayesian update on the grid: a threshold above `boost` is weighted by the probability p that the mean is above
        the target, one below by 1 - p, and one at `boost` by 1/2. (The authors' "probability that the sign is right,
        flipped if below one half" is the same update.) A round without scores does not change the posterior.
        """
        scored = tuple(float(s) for s in scores if s is not None)
        if not math.isfinite(boost):
            raise ValueError(f"boost {boost!r} is not finite")
        for score in scored:
            if not 0.0 <= score <= 100.0:
                raise ValueError(f"score {score!r} is not within 0-100; pass None for an unscored trial")
        this = Round(float(boost), scored, len(scores) - len(scored))
        self.rounds.append(this)
        if not scored:
            return
        weight = len(scored) if self.settings.weight is None else self.settings.weight
        above = probability_above(this.mean, self.settings.target_score, weight)
        likelihood = np.where(self._grid > boost, above, 1.0 - above)
        likelihood[self._grid == boost] = 0.5
        with np.errstate(divide="ignore"):
            self._log_density = self._log_density + np.log(likelihood)
        self._log_density -= self._log_density.max()

    def posterior(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the grid of boosts and their probabilities (sum 1), both of shape (grid_points,)."""
        density = np.exp(self._log_density - self._log_density.max())
        return self._grid, density / density.sum()

    def finish(self) -> Threshold:
        """Return the threshold from all rounds, always with a status."""
        scored = [r for r in self.rounds if r.scores]
        if not scored:
            return self._threshold(self._quantile(0.5), self.prior.low, self.prior.high, "no trial was scored")
        boosts = np.concatenate([np.full(len(r.scores), r.boost) for r in scored])
        scores, bounds = np.concatenate([r.scores for r in scored]), (self.prior.low, self.prior.high)
        fit = fit_falling(boosts, scores, self.settings.target_score, bounds, self.prior.sd, self.draws)
        if self.settings.stop == "tolerance":
            last = scored[-1]
            why = "" if self._near(last.mean) else "no round came within the tolerance"
            return self._threshold(last.boost, fit.low, fit.high, why, fit)
        if self.settings.estimate == "posterior":
            return self._threshold(self._quantile(0.5), fit.low, fit.high, "", fit)
        return self._from_fit(fit)

    # ---- status of a threshold

    def _from_fit(self, fit: FallingFit) -> Threshold:
        if fit.side is not None:
            return self._uncrossed(fit, fit.side)
        se = fit.score_se(fit.boost)
        left, right = fit.bracket(fit.boost)
        if se > 2 * self.settings.tolerance:
            why = f"standard error {se:.1f} of the score at the threshold exceeds twice the tolerance"
        elif right - left > self.prior.sd / 2:  # the curve between them is not supported by data, nor is its interval
            why = f"no boost was tried between {left:.3g} and {right:.3g}"
            return self._threshold(fit.boost, min(left, fit.low), max(right, fit.high), why, fit)
        else:
            why = ""
        return self._threshold(fit.boost, fit.low, fit.high, why, fit)

    def _uncrossed(self, fit: FallingFit, side: Literal["above", "below"]) -> Threshold:
        """Return the threshold if all tried boosts score on the same side of the target."""
        edge, bound = (fit.boosts[-1], self.prior.high) if side == "above" else (fit.boosts[0], self.prior.low)
        low, high = sorted((float(edge), bound))
        # At the bound the search is complete; before the bound, further rounds might still cross the target.
        if edge == bound:
            why = f"the score stays {side} {self.settings.target_score:g} up to the bound {bound:g}"
            return self._threshold(bound, low, high, why, fit, "at bound")
        why = f"the score stays {side} {self.settings.target_score:g} at every boost tried, the last {edge:g}"
        return self._threshold(self._quantile(0.5), low, high, why, fit)

    def _threshold(
        self,
        boost: float,
        low: float,
        high: float,
        why: str,
        fit: FallingFit | None = None,
        status: ThresholdStatus | None = None,
    ) -> Threshold:
        return Threshold(
            boost=boost,
            low=min(low, boost),
            high=max(high, boost),
            status=status or ("not converged" if why else "converged"),
            reason=why or "the fitted curve crosses the target",
            target_score=self.settings.target_score,
            tolerance=self.settings.tolerance,
            score=fit.score(boost) if fit else None,
            score_se=fit.score_se(boost) if fit else None,
            n_rounds=len(self.rounds),
            n_trials=sum(len(r.scores) for r in self.rounds),
            n_unscored=sum(r.unscored for r in self.rounds),
            posterior_median=self._quantile(0.5),
            posterior_low=self._quantile(0.025),
            posterior_high=self._quantile(0.975),
        )

    # ---- helpers

    def _heading(self) -> float | None:
        """Return the bound in the direction of a search whose rounds are all on one side of the target."""
        sides = {r.mean > self.settings.target_score for r in self.rounds if r.scores}
        return None if len(sides) != 1 else (self.prior.high if sides.pop() else self.prior.low)

    def _near(self, mean: float) -> bool:
        return abs(mean - self.settings.target_score) <= self.settings.tolerance

    def _quantile(self, q: float) -> float:
        grid, probabilities = self.posterior()
        return float(grid[min(int(np.searchsorted(np.cumsum(probabilities), q)), len(grid) - 1)])
