"""Power by simulation: how often a study of some size detects a rate above the judge's floor, or a drop of the rate.

Latents are clusters; their rates are Beta with a chosen mean and intra-cluster correlation (ICC). The tests are those
of the package, in faster forms for equal numbers of trials per latent: `sign_flip_p` is the exact limit of
`paired.swap_test`; `exchange_p` is the one-sided exchange of whole clusters between steered and unsteered responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from steerback.metrics.intervals import ALPHA, ICC, PRIOR_EVENTS, Codes, Floats

Item = TypeVar("Item")
SIMULATIONS = 1000
EXCHANGES = 999
LATENTS = tuple(sorted({int(round(n, -1 if n > 100 else 0)) for n in np.geomspace(5, 3000, 60).tolist()}))
"""Numbers of latents that `smallest_size` searches."""
RATES = tuple(round(float(x), 4) for x in np.geomspace(0.002, 0.5, 25))
DROPS = tuple(round(x / 20, 2) for x in range(1, 21))


@dataclass(frozen=True)
class Effect:
    """Effect to detect: a multi-attempt `rate` above `floor`, or a relative `drop` of the rate in a paired condition.

    The two responses of a pair share their latent's rate and are otherwise independent. Unsteered responses are
    independent.
    """

    rate: float
    drop: float = 0.5
    icc: float = ICC
    floor: float = 0.0


@dataclass(frozen=True)
class Design:
    """Size of a study: latents, trials per latent, and unsteered responses judged for the floor."""

    latents: int
    trials: int
    floor_responses: int = 0

    @property
    def measured(self) -> int:
        """Number of measured responses per condition."""
        return self.latents * self.trials


Question = Callable[[Design, Effect, int, int], float]
"""Maps (design, effect, simulations, seed) to the power."""


def power_of_rate(design: Design, effect: Effect, simulations: int = SIMULATIONS, seed: int = 0) -> float:
    """Return how often the test finds the rate above the judge's floor (one-sided p <= 0.05)."""
    rng = np.random.default_rng(seed)
    steered = rng.binomial(design.trials, _rates(rng, effect, (simulations, design.latents)))
    groups = max(round(design.floor_responses / design.trials), 1)
    unsteered = rng.binomial(design.trials, effect.floor, (simulations, groups))
    return float(np.mean([exchange_p(a, b, rng) <= ALPHA for a, b in zip(steered, unsteered, strict=True)]))


def power_of_drop(design: Design, effect: Effect, simulations: int = SIMULATIONS, seed: int = 0) -> float:
    """Return how often a paired comparison detects the drop (two-sided p <= 0.05)."""
    rng = np.random.default_rng(seed)
    rates = _rates(rng, effect, (simulations, design.latents))
    before, after = rng.binomial(design.trials, rates), rng.binomial(design.trials, rates * (1 - effect.drop))
    return float(np.mean([sign_flip_p(row) <= ALPHA for row in after - before]))


def smallest_size(
    question: Question,
    effect: Effect,
    trials: int,
    power: float,
    floor_responses: Callable[[int], int] = lambda measured: 0,
    simulations: int = SIMULATIONS,
) -> tuple[Design, float] | None:
    """Return the design with fewest latents (of `LATENTS`) that reaches `power`, and its power; None if none does."""
    designs = [Design(n, trials, floor_responses(n * trials)) for n in LATENTS]
    return _first(designs, power, lambda design: question(design, effect, simulations, 0))


def smallest_rate(design: Design, effect: Effect, power: float, simulations: int = SIMULATIONS) -> float | None:
    """Return the smallest of `RATES` that this design detects with `power`; None if it detects none."""
    rates = [rate for rate in RATES if rate > effect.floor]
    reached = _first(rates, power, lambda rate: power_of_rate(design, replace(effect, rate=rate), simulations, 0))
    return None if reached is None else reached[0]


def smallest_drop(design: Design, effect: Effect, power: float, simulations: int = SIMULATIONS) -> float | None:
    """Return the smallest of `DROPS` of the rate that this design detects with `power`; None if it detects none."""
    reached = _first(DROPS, power, lambda drop: power_of_drop(design, replace(effect, drop=drop), simulations, 0))
    return None if reached is None else reached[0]


def sign_flip_p(differences: Codes) -> float:
    """Return the exact two-sided p over all swaps of two conditions; `differences` of counts, one per cluster."""
    values, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    sizes = tuple(zip(values.tolist(), counts.tolist(), strict=True))
    return _flips(sizes)[abs(int(differences.sum()))]


@lru_cache(maxsize=20_000)
def _flips(sizes: tuple[tuple[int, int], ...]) -> list[float]:
    """Return P(|sum| >= s), s = 0, 1, ..., of the sum of randomly signed values; `sizes` lists (value, count)."""
    from scipy.stats import binom

    positive = np.ones(1)  # distribution of the sum of the values with a positive sign
    for value, count in sizes:
        part = np.zeros(value * count + 1)
        part[::value] = binom.pmf(np.arange(count + 1), count, 0.5)
        positive = np.convolve(positive, part)
    total = len(positive) - 1
    sums = np.abs(2 * np.arange(total + 1) - total)
    tails: list[float] = np.cumsum(np.bincount(sums, weights=positive, minlength=total + 1)[::-1])[::-1].tolist()
    return tails


def exchange_p(steered: Codes, unsteered: Codes, rng: np.random.Generator, draws: int = EXCHANGES) -> float:
    """Return the one-sided p of the null "steered responses have no higher rate", counts of equal-sized clusters."""
    together = np.concatenate([steered, unsteered])
    histogram = np.bincount(together)
    # clusters of one size differ in their count alone, so dealing them means dealing the histogram of counts
    dealt = rng.multivariate_hypergeometric(histogram, len(unsteered), size=draws) @ np.arange(len(histogram))
    return (1 + int(np.sum(dealt <= unsteered.sum()))) / (1 + draws)


def beta_binomial(events: Codes, trials: Codes) -> tuple[float, float, bool]:
    """Return mean and ICC of clustered rates by maximum likelihood, and whether the ICC could be estimated.

    The assumed ICC is returned if there are fewer than five events or non-events, or fewer than three clusters with
    several trials.
    """
    from scipy.optimize import minimize_scalar
    from scipy.stats import betabinom

    mean = float(events.sum() / trials.sum())
    if not PRIOR_EVENTS <= events.sum() <= trials.sum() - PRIOR_EVENTS or np.sum(trials > 1) < 3:
        return mean, ICC, False

    def cost(log_icc: float) -> float:
        scale = np.expm1(-log_icc)  # (1 - icc) / icc
        return -float(np.sum(betabinom.logpmf(events, trials, mean * scale, (1 - mean) * scale)))

    best = minimize_scalar(cost, bounds=(np.log(1e-4), np.log(0.9)), method="bounded")
    return mean, float(np.exp(best.x)), True


def _rates(rng: np.random.Generator, effect: Effect, shape: tuple[int, int]) -> Floats:
    if not 0 < effect.icc < 1 or not 0 < effect.rate < 1:
        return np.full(shape, effect.rate)
    scale = (1 - effect.icc) / effect.icc
    return rng.beta(effect.rate * scale, (1 - effect.rate) * scale, shape)


def _first(items: Sequence[Item], power: float, of: Callable[[Item], float]) -> tuple[Item, float] | None:
    """Return the first item that reaches `power`, with its power, by bisection; power must grow along the items."""
    low, high, best = 0, len(items), None
    while low < high:
        middle = (low + high) // 2
        reached = of(items[middle])
        if reached >= power:
            best, high = (items[middle], reached), middle
        else:
            low = middle + 1
    return best
