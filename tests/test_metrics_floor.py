"""Test of a rate against the judge's floor."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerback.metrics.between import above, joined
from steerback.metrics.intervals import Floats

sums = st.lists(st.tuples(st.integers(0, 4), st.just(4)), min_size=2, max_size=9).map(
    lambda rows: np.array(rows, dtype=np.float64)
)


def clusters(rng: np.random.Generator, rate: float, icc: float, count: int, size: int) -> Floats:
    rates = np.full(count, rate)
    if icc:
        rates = rng.beta(rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc, count)
    return np.stack([rng.binomial(size, rates), np.full(count, size)], axis=1).astype(np.float64)


def test_p_is_the_share_of_all_exchanges_that_give_as_much() -> None:
    a = np.array([[2, 4], [3, 4], [1, 4]], dtype=np.float64)
    b = np.array([[0, 4], [1, 4], [0, 4], [2, 4]], dtype=np.float64)
    together = np.concatenate([a, b])
    observed = a[:, 0].sum() / 12 - b[:, 0].sum() / 16
    every = []
    for chosen in combinations(range(7), 3):
        first = together[list(chosen), 0].sum()
        every.append(first / 12 - (together[:, 0].sum() - first) / 16)
    exact = np.mean(np.array(every) >= observed - 1e-12)
    assert above(a, b, draws=40_000) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("latents", "size", "icc"), [(50, 10, 0.0), (12, 20, 0.0), (50, 10, 0.1)])
def test_equal_rates_are_called_different_in_about_a_twentieth_of_the_runs(latents: int, size: int, icc: float) -> None:
    rng = np.random.default_rng(0)
    p = [above(clusters(rng, 0.05, icc, latents, size), clusters(rng, 0.05, 0.1, 38, 4), draws=300) for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) <= 0.1


def test_a_rate_of_a_fifth_is_told_from_a_floor_of_two_per_cent() -> None:
    rng = np.random.default_rng(1)
    p = [above(clusters(rng, 0.2, 0.1, 50, 10), clusters(rng, 0.02, 0.0, 38, 4), draws=300) for _ in range(100)]
    assert np.mean(np.array(p) <= 0.05) >= 0.95


@given(sums, sums, st.randoms())
def test_the_order_of_clusters_does_not_matter_where_all_have_one_size(a: Floats, b: Floats, random: object) -> None:
    assert above(a, b, draws=500) == pytest.approx(above(a[::-1], b[::-1], draws=500), abs=0.12)
    assert 0 < above(a, b, draws=50) <= 1


def test_without_any_event_nothing_is_told_apart() -> None:
    none = np.array([[0, 10], [0, 10]], dtype=np.float64)
    assert above(none, none) == 1.0


def test_joined_clusters_keep_every_trial() -> None:
    prompts = np.stack([np.arange(38) % 3, np.full(38, 4)], axis=1).astype(np.float64)
    large = joined(prompts, 20.0)
    assert large.sum(axis=0).tolist() == prompts.sum(axis=0).tolist()
    assert 6 <= len(large) <= 9
