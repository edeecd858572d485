"""Peak of a boost sweep: confidence interval of its position against known peaks."""

from __future__ import annotations

import numpy as np
import pytest

from steerback.metrics import Outcomes, find_peak


def outcomes_at(rates: list[float], latents: int = 40, trials: int = 25, seed: int = 0) -> list[Outcomes]:
    """One condition per rate; latents differ in their rate (ICC about 0.05)."""
    rng = np.random.default_rng(seed)
    found = []
    cluster = np.repeat(np.arange(latents), trials)
    shift = np.exp(rng.normal(0, 0.3, latents))[cluster]
    for rate in rates:
        multi = rng.random(latents * trials) < np.clip(rate * shift, 0, 1)
        n = len(multi)
        zero, last = np.full(n, 50.0), np.where(multi, 80.0, 50.0)
        attempts = np.where(multi, 2, 1)
        found.append(
            Outcomes(cluster, np.arange(n), np.zeros(n), attempts, zero, last, attempts, zero, last, np.zeros(n))
        )
    return found


def test_peak_intervals_cover_a_known_peak() -> None:
    levels, truth = np.linspace(-1.5, 3, 8), 0.3
    rates = 0.3 * np.exp(-0.5 * ((levels - truth) / 0.9) ** 2)
    covered = []
    for seed in range(40):
        peak = find_peak(list(levels), outcomes_at(list(rates), seed=seed), "multi_attempt_rate", draws=200)
        assert peak is not None
        covered.append(peak.low <= truth <= peak.high)
    assert np.mean(covered) >= 0.85  # 95 % nominal; the parabola through three levels is off by up to 0.05 itself


def test_peak_at_the_edge_on_a_plateau_and_nowhere() -> None:
    rising = find_peak([0, 1, 2], outcomes_at([0.1, 0.3, 0.6]), "multi_attempt_rate", 200)
    assert rising is not None
    assert (rising.at, rising.edge) == (2, 1)
    assert find_peak([0, 1, 2], outcomes_at([0.0, 0.0, 0.0]), "multi_attempt_rate", 200) is None
    assert find_peak([0, 1, 2], outcomes_at([0.0, 0.0, 0.0]), "improvement_rate", 200) is None
    flat = outcomes_at([0.0, 0.4])
    plateau = find_peak([0, 1, 2, 3, 4], [flat[0], flat[1], flat[1], flat[1], flat[0]], "msi", 400)
    assert plateau is not None
    assert plateau.low <= 1.5
    assert plateau.high >= 2.5


def test_a_parabola_is_found_exactly() -> None:
    """Rates on a parabola with its vertex between two levels, without noise."""
    cluster = np.repeat(np.arange(4), 250)
    found = []
    for rate in (0.2 - 0.04 * (x - 0.75) ** 2 for x in (-1, 0, 1, 2)):
        multi = np.tile(np.arange(250) < round(rate * 250), 4)
        n, first = len(multi), np.full(len(multi), 50.0)
        attempts = np.where(multi, 2, 1)
        found.append(
            Outcomes(cluster, np.arange(n), np.zeros(n), attempts, first, first, attempts, first, first, np.zeros(n))
        )
    peak = find_peak([-1, 0, 1, 2], found, "multi_attempt_rate", 100)
    assert peak is not None
    assert peak.at == pytest.approx(0.75, abs=0.05)
    assert peak.value == pytest.approx(0.2, abs=0.003)
