"""Agreement of judges against published examples and the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.metrics import agreement, alpha, rank_correlation
from steerback.metrics.agreement import cohens_kappa, krippendorff_alpha, spearman

few = settings(deadline=None, max_examples=80)
NAN = float("nan")
# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), example C: four observers, twelve units.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def literal_alpha(ratings: np.ndarray, level: str) -> float | None:
    """1 - D_o / D_e from all pairs of ratings."""
    units = [[v for v in column if np.isfinite(v)] for column in ratings.T]
    units = [u for u in units if len(u) >= 2]

    def distance(x: float, y: float) -> float:
        return float(x != y) if level == "nominal" else (x - y) ** 2

    n = sum(map(len, units))
    within = sum(distance(x, y) / (len(u) - 1) for u in units for x, y in itertools.permutations(u, 2))
    values = [v for u in units for v in u]
    between = sum(distance(x, y) for x, y in itertools.permutations(values, 2))
    return 1 - (within / n) / (between / (n * (n - 1))) if between else None


def test_published_example() -> None:
    assert krippendorff_alpha(PUBLISHED, "nominal") == pytest.approx(0.743, abs=0.0005)
    assert krippendorff_alpha(PUBLISHED, "interval") == pytest.approx(0.849, abs=0.0005)


@few
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 7, NAN]), min_size=3, max_size=3), min_size=1, max_size=12))
def test_alpha_equals_its_definition(units) -> None:
    ratings = np.array(units, dtype=float).T
    for level in ("nominal", "interval"):
        ours, literal = krippendorff_alpha(ratings, level), literal_alpha(ratings, level)
        assert (ours is None) == (literal is None)
        assert ours is None or ours == pytest.approx(literal, abs=1e-9)


@few
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_kappa_equals_its_definition(pairs) -> None:
    a, b = (np.array(x) for x in zip(*pairs, strict=True))
    ours = cohens_kappa(a, b)
    chance = sum(np.mean(a == label) * np.mean(b == label) for label in range(4))
    if len(set(a) | set(b)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx((np.mean(a == b) - chance) / (1 - chance), abs=1e-12)


def test_published_kappa_and_rank_correlation() -> None:
    """Two readers of 50 grant proposals (20 both yes, 15 both no); ten people's IQ and hours of television."""
    table = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    assert cohens_kappa(*np.array(table).T) == pytest.approx(0.4)
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110.0])
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17.0])
    assert spearman(iq, hours) == pytest.approx(-29 / 165)


@few
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_spearman_is_the_correlation_of_mean_ranks(pairs) -> None:
    a, b = (np.array(x, float) for x in zip(*pairs, strict=True))
    ours = spearman(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert ours is None
    else:
        x, y = ([sum(v < u for v in side) + (1 + sum(v == u for v in side)) / 2 for u in side] for side in (a, b))
        dx, dy = np.array(x) - np.mean(x), np.array(y) - np.mean(y)
        assert ours == pytest.approx(sum(dx * dy) / np.sqrt(sum(dx**2) * sum(dy**2)), abs=1e-12)


def judges(seed: int = 0, latents: int = 12, per: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(latents), per)
    truth = rng.random(len(cluster)) < 0.4
    a, b = (truth ^ (rng.random(len(cluster)) < 0.05) for _ in range(2))
    return a.astype(float), b.astype(float), cluster


def test_intervals_hold_the_value_and_missing_verdicts_are_left_out() -> None:
    a, b, cluster = judges()
    found = agreement(a, b, cluster, draws=300)
    assert found.share.value == pytest.approx(np.mean(a == b))
    for e in (found.share, found.kappa, alpha([a, b], cluster, "nominal", draws=300)):
        assert -1 <= e.low < e.value < e.high <= 1
    gone = a.copy()
    gone[:7] = np.nan
    assert agreement(gone, b, cluster, draws=50).kappa.value == pytest.approx(cohens_kappa(a[7:], b[7:]))
    assert agreement(gone, b, cluster, draws=50).share.n == 113


def test_complete_agreement_is_not_certain_agreement() -> None:
    a, _, cluster = judges()
    found = agreement(a, a, cluster, draws=50)
    assert found.share.value == found.kappa.value == 1
    assert 0.8 < found.kappa.low < found.share.low < 1
    assert rank_correlation(a, a, cluster, draws=50).low is None


@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_to_agree_on(n) -> None:
    same, cluster = np.ones(n), np.arange(n)
    found = agreement(same, same, cluster, draws=20)
    assert found.kappa.value is None
    assert found.kappa.low is None
    assert alpha([same, same], cluster, "interval", draws=20).value is None
    assert rank_correlation(same, same, cluster, draws=20).value is None


def test_more_latents_narrow_the_interval_more_than_more_responses_of_the_same_latents() -> None:
    """Judges disagree about whole latents, so repeated responses add little."""
    rng = np.random.default_rng(3)

    def width(latents: int, per: int) -> float:
        cluster = np.repeat(np.arange(latents), per)
        truth = np.repeat(rng.random(latents) < 0.5, per).astype(float)
        other = np.where(np.repeat(rng.random(latents) < 0.2, per), 1 - truth, truth)
        e = agreement(truth, other, cluster, draws=300).kappa
        return e.high - e.low

    assert width(200, 2) < 0.6 * width(20, 20)


def test_interval_covers_for_clustered_disagreement() -> None:
    """Kappa of two judges that each err in 5 % of responses, clustered; 100 sets of 10 latents x 10."""
    rng = np.random.default_rng(4)

    def flips(latents: int) -> np.ndarray:
        rate = rng.beta(0.05 * 9, 0.95 * 9, (latents, 1))
        return rng.random((latents, 10)) < rate

    def pair(latents: int) -> tuple[np.ndarray, np.ndarray]:
        truth = rng.random((latents, 10)) < 0.5
        return (truth ^ flips(latents)).ravel(), (truth ^ flips(latents)).ravel()

    true = cohens_kappa(*pair(100_000))
    cluster = np.repeat(np.arange(10), 10)
    found = [agreement(*(x.astype(float) for x in pair(10)), cluster, draws=200, seed=i).kappa for i in range(100)]
    assert np.mean([e.low <= true <= e.high for e in found]) >= 0.9
