"""Trends along ordered conditions against numpy and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from steerback.metrics import Outcomes, compare, trend


def sweep(rates: list[float], latents: int, per: int = 8, seed: int = 0) -> list[Outcomes]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(latents), per)
    n = len(cluster)
    level = rng.normal(0, 0.1, latents)[cluster]
    out = []
    for rate in rates:
        multi = rng.random(n) < np.clip(rate + level, 0, 1)
        first = rng.uniform(20, 60, n)
        last = np.where(multi, first + rng.normal(10, 10, n), first)
        attempts = np.where(multi, 2, 1)
        zero = np.zeros(n, int)
        out.append(Outcomes(cluster, np.arange(n), zero, attempts, first, last, attempts, first, last, zero))
    return out


def test_slope_equals_numpy_polyfit_and_a_rise_is_found() -> None:
    levels = [0.0, 25.0, 50.0, 100.0]
    conditions = sweep([0.1, 0.2, 0.3, 0.5], 15)
    found = trend(levels, conditions, draws=2000)
    assert found.values == pytest.approx([np.mean(o.attempts > 1) for o in conditions])
    assert found.slope == pytest.approx(np.polyfit(levels, found.values, 1)[0])
    assert found.low <= 0.004 <= found.high
    assert found.low > 0
    assert found.p == pytest.approx(1 / 2001)
    back = trend(levels[::-1], conditions[::-1], draws=2000)
    assert back.slope == pytest.approx(found.slope)
    assert (back.low, back.high) == pytest.approx((found.low, found.high))


def test_trend_p_equals_enumerating_all_orders() -> None:
    conditions = sweep([0.3, 0.4, 0.5], 3, per=4, seed=7)
    levels = np.array([0.0, 1.0, 2.0])
    counts = np.array([np.bincount(o.cluster, o.attempts > 1) for o in conditions])  # (levels, latents)
    weights = levels - levels.mean()
    observed = abs(weights @ counts.sum(1))
    orders = list(itertools.permutations(range(3)))
    hits = [
        abs(weights @ sum(counts[list(o), c] for c, o in enumerate(choice))) >= observed - 1e-9
        for choice in itertools.product(orders, repeat=3)
    ]
    found = trend(levels, conditions, draws=20_000)
    assert found.p == pytest.approx(np.mean(hits), abs=0.015)


def test_trend_false_positive_rate() -> None:
    hits = [trend([0, 1, 2], sweep([0.3] * 3, 8, 4, seed=i), draws=200).p <= 0.05 for i in range(200)]
    assert np.mean(hits) <= 0.09


def test_two_levels_of_paired_trials_give_the_sign_flip_p_value() -> None:
    a, b = sweep([0.2, 0.4], 9, seed=3)
    found = trend([0, 1], [a, b], draws=20_000)
    t = compare(a, b)["multi_attempt_rate"]
    assert found.slope == pytest.approx(t.difference)
    assert found.p == pytest.approx(t.p, abs=0.01)


def test_trends_that_cannot_be_said() -> None:
    flat = sweep([-9.0, -9.0], 4)
    found = trend([0, 1], flat)
    assert (found.slope, found.p) == (0, 1.0)
    assert found.low < 0 < found.high
    assert trend([0, 1], flat, "improvement_rate").p is None
    assert trend([0, 1], [flat[0], Outcomes.from_rows([])]).slope is None
    for levels in ([1, 1], [1]):
        with pytest.raises(ValueError, match="two different levels"):
            trend(levels, flat[: len(levels)])
