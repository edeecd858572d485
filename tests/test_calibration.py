"""Calibration: the bisection against exact Bayes, the fit against other solvers, and the reported status."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import minimize
from scipy.stats import beta
from sklearn.isotonic import IsotonicRegression

from steerback.calibration import Calibrator, Threshold, assess, verified
from steerback.calibration.bisection import probability_above
from steerback.calibration.curves import RIDGE, falling_means, fit_falling, mean_interval
from steerback.calibration.thresholds import THRESHOLDS, LatentThreshold
from steerback.config import CalibrationConfig
from steerback.records import BoostPrior

PRIOR = BoostPrior(150, 75, 0, 300)
USUAL = CalibrationConfig()
DRAWS = 200
history_of_scores = st.lists(
    st.tuples(st.floats(0, 300), st.lists(st.one_of(st.none(), st.floats(0, 100)), min_size=1, max_size=6)),
    min_size=1,
    max_size=8,
)


def search(
    curve: Callable[[float], float],
    config: CalibrationConfig = USUAL,
    prior: BoostPrior = PRIOR,
    concentration: float = 1.0,
    seed: int = 0,
) -> Calibrator:
    """Calibrates against scores drawn from a beta distribution with mean `curve(boost)`."""
    generator = np.random.default_rng(seed)
    calibrator = Calibrator(prior, config, DRAWS)
    while (boost := calibrator.next_boost()) is not None:
        mean = min(max(curve(boost) / 100, 1e-3), 1 - 1e-3)
        shape = concentration * mean, concentration * (1 - mean)
        calibrator.update(boost, (100 * generator.beta(*shape, size=config.trials_per_iteration)).tolist())
    return calibrator


def falling(middle: float, width: float = 20.0, top: float = 95.0) -> Callable[[float], float]:
    return lambda boost: top / (1 + math.exp(min((boost - middle) / width, 700)))


# -- the update -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(history_of_scores, st.sampled_from([30.0, 50.0]), st.sampled_from([None, 5.0]))
def test_posterior_is_literal_bayes(history: list, target: float, weight: float | None) -> None:  # type: ignore[type-arg]
    grid = np.linspace(0, 300, 13)
    expected = np.exp(-0.5 * ((grid - 150) / 75) ** 2)
    expected /= expected.sum()
    for boost, scores in history:
        scored = [s for s in scores if s is not None]
        if not scored:
            continue
        s, w = float(np.mean(scored)) / 100, weight or len(scored)
        belief = beta(0.5 + w * s, 0.5 + w * (1 - s))  # of the true mean at this boost
        for i, threshold in enumerate(grid):  # the mean is above target if and only if the threshold is further right
            above = belief.sf(target / 100)
            expected[i] *= above if threshold > boost else 1 - above if threshold < boost else 0.5
        expected /= expected.sum()
    config = CalibrationConfig(target_score=target, weight=weight)
    calibrator = Calibrator(PRIOR, config, grid_points=13).replay(history)
    found_grid, found = calibrator.posterior()
    np.testing.assert_allclose(found_grid, grid)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    cdf = np.cumsum(expected)
    median = calibrator.next_boost()
    assert median is not None
    at = int(np.searchsorted(grid, median))
    if median not in (PRIOR.low, PRIOR.high):
        assert cdf[at] >= 0.5 - 1e-9
        assert at == 0 or cdf[at - 1] <= 0.5 + 1e-9


def test_probability_against_draws_and_the_authors_form() -> None:
    draws = np.random.default_rng(0).beta(0.5 + 5 * 0.6, 0.5 + 5 * 0.4, size=400_000)
    assert probability_above(60, 50, 5) == pytest.approx((draws > 0.5).mean(), abs=0.003)
    # "the probability that the sign is right; below one half the sign flips" = the same update
    for mean in (0.0, 20.0, 49.0, 50.0, 51.0, 100.0):
        p = probability_above(mean, 50, 5)
        assert probability_above(100 - mean, 50, 5) == pytest.approx(1 - p)
        assert (p > 0.5) == (mean > 50)


@settings(deadline=None, max_examples=25)
@given(history_of_scores)
def test_replay_is_bitwise(history: list) -> None:  # type: ignore[type-arg]
    one, two = Calibrator(PRIOR, draws=DRAWS), Calibrator(PRIOR, draws=DRAWS).replay(history)
    for boost, scores in history:
        one.update(boost, scores)
    assert one.posterior()[1].tobytes() == two.posterior()[1].tobytes()
    assert one.next_boost() == two.next_boost()
    assert one.finish() == two.finish()


def test_a_killed_search_goes_on_as_if_nothing_had_happened() -> None:
    whole = search(falling(120))
    for cut in (1, 7, 14):
        resumed = Calibrator(PRIOR, draws=DRAWS).replay([(r.boost, r.scores) for r in whole.rounds[:cut]])
        assert resumed.next_boost() == whole.rounds[cut].boost


def test_unscored_trials_are_skipped_and_counted() -> None:
    a = Calibrator(PRIOR, draws=DRAWS).replay([(150.0, [80.0, None, 60.0]), (200.0, [None, None])])
    b = Calibrator(PRIOR, draws=DRAWS).replay([(150.0, [80.0, 60.0])])
    assert a.posterior()[1].tobytes() == b.posterior()[1].tobytes()
    assert len(a.rounds) == 2  # a round that could not be scored counts, or a broken judge would loop for ever
    assert (a.finish().n_trials, a.finish().n_unscored) == (2, 3)


def test_a_judge_that_scores_nothing_gives_no_threshold() -> None:
    calibrator = Calibrator(PRIOR, draws=DRAWS)
    while (boost := calibrator.next_boost()) is not None:
        calibrator.update(boost, [None] * 10)
    found = calibrator.finish()
    assert (found.status, found.reason, found.score) == ("not converged", "no trial was scored", None)
    assert (found.low, found.high, found.n_unscored) == (0, 300, 150)
    assert Calibrator(PRIOR, draws=DRAWS).finish().status == "not converged"


def test_impossible_scores_and_settings_are_refused() -> None:
    calibrator = Calibrator(PRIOR, draws=DRAWS)
    for bad in (-1.0, 101.0, math.nan):
        with pytest.raises(ValueError, match="not within 0-100"):
            calibrator.update(100, [bad])
    with pytest.raises(ValueError, match="not finite"):
        calibrator.update(math.nan, [50.0])
    assert calibrator.rounds == []
    for wrong in ({"target_score": 0}, {"tolerance": 0}, {"max_iterations": 0}, {"weight": 0}, {"stop": "soon"}):
        with pytest.raises(ValidationError):
            CalibrationConfig(**wrong)  # type: ignore[arg-type]


# -- the fit ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_falling_means_equal_isotonic_regression(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    weights, means = generator.exponential(size=(3, n)) + 0.01, generator.uniform(0, 100, (3, n))
    for row, w, m in zip(falling_means(weights, means), weights, means, strict=True):
        expected = IsotonicRegression(increasing=False).fit_transform(np.arange(n), m, sample_weight=w)
        np.testing.assert_allclose(row, expected, atol=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_logistic_is_the_maximum_of_its_likelihood(seed: int) -> None:
    """Against a general-purpose optimiser, on the quasi-likelihood written out."""
    generator = np.random.default_rng(seed)
    boosts = np.repeat(generator.uniform(60, 200, 9), 8)
    scores = 100 * generator.beta(1.5, 1.5, len(boosts)) * (boosts < 140) + 20 * generator.random(len(boosts))
    scores = np.clip(scores, 0, 100)
    fit = fit_falling(boosts, scores, 50, (0, 300), 75, draws=5)
    floor, ceiling = float(fit.curve.floor[0]), float(fit.curve.ceiling[0])
    places = np.unique(boosts)
    means = np.array([scores[boosts == b].mean() for b in places])
    y = np.clip((means - floor) / (ceiling - floor), 0, 1)
    z = (places - fit.curve.centre) / 75

    def loss(theta: np.ndarray) -> float:
        eta = theta[0] + theta[1] * z
        return float((8 * (np.logaddexp(0, eta) - y * eta)).sum() + RIDGE / 2 * (theta[1] + 3) ** 2)

    best = minimize(loss, [0.0, -3.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})
    assert best.x[1] < -0.05
    assert [fit.curve.level[0], fit.curve.slope[0]] == pytest.approx(best.x.tolist(), abs=1e-4)
    assert fit.score(fit.boost) == pytest.approx(50)


def test_fit_does_not_depend_on_the_order_of_trials_and_scales_with_the_unit() -> None:
    calibrator = search(falling(120))
    boosts = np.concatenate([np.full(10, r.boost) for r in calibrator.rounds])
    scores = np.concatenate([r.scores for r in calibrator.rounds])
    fit = fit_falling(boosts, scores, 50, (0, 300), 75)
    shuffled = np.random.default_rng(1).permutation(len(boosts))
    assert fit_falling(boosts[shuffled], scores[shuffled], 50, (0, 300), 75).boost == pytest.approx(fit.boost)
    other_unit = fit_falling(boosts / 20, scores, 50, (0, 15), 75 / 20)
    assert 20 * other_unit.boost == pytest.approx(fit.boost)
    assert 20 * other_unit.low == pytest.approx(fit.low)


def test_the_curve_of_all_trials_does_not_depend_on_the_draws() -> None:
    rng = np.random.default_rng(5)
    boosts = rng.choice(np.linspace(0, 40, 12), 60)
    scores = np.clip(rng.normal(100 - 2 * boosts, 15), 0, 100)
    one, many = (fit_falling(boosts, scores, 50, (0, 40), 10, draws=draws) for draws in (1, 700))
    assert (one.boost, one.side, one.score(11.0)) == (many.boost, many.side, many.score(11.0))
    assert [len(fit.drawn.level) for fit in (one, many)] == [1, 700]
    assert one.curve.level.shape == many.curve.level.shape == (1,)


def test_mean_interval_covers_and_never_claims_certainty() -> None:
    for scores in ([0.0] * 10, [100.0] * 4, [50.0]):
        low, high = mean_interval(scores)
        assert 0 <= low <= scores[0] <= high <= 100
        assert high - low > 5
    generator = np.random.default_rng(0)
    for shape in ((0.2, 0.2), (2.0, 2.0), (0.3, 1.0)):
        truth = 100 * shape[0] / sum(shape)
        hits = [
            low <= truth <= high for low, high in (mean_interval(100 * generator.beta(*shape, 20)) for _ in range(600))
        ]
        assert np.mean(hits) > 0.92


# -- statuses ---------------------------------------------------------------------------------------------------------


def test_a_falling_curve_converges_near_its_threshold() -> None:
    errors, covered = [], []
    for seed in range(12):
        curve = falling(70 + 15 * seed)
        found = search(curve, seed=seed).finish()
        assert found.status == "converged"
        assert found.usable
        errors.append(curve(found.boost) - 50)
        truth = 70 + 15 * seed + 20 * math.log(95 / 50 - 1)
        covered.append(found.low <= truth <= found.high)
        assert found.n_trials == 150
    assert abs(np.mean(errors)) < 3
    assert np.max(np.abs(errors)) < 15
    assert np.mean(covered) >= 0.75


def test_other_targets_and_few_trials() -> None:
    config = CalibrationConfig(target_score=30, max_iterations=12, trials_per_iteration=5)
    errors = [falling(120)(search(falling(120), config, seed=s).finish().boost) - 30 for s in range(12)]
    assert abs(np.mean(errors)) < 4


@pytest.mark.parametrize(("level", "bound"), [(90.0, 300.0), (62.0, 300.0), (8.0, 0.0)])
def test_a_score_that_never_crosses_is_at_a_bound_that_was_tried(level: float, bound: float) -> None:
    calibrator = search(lambda b: level, concentration=20)
    found = calibrator.finish()
    assert (found.status, found.boost) == ("at bound", bound)
    assert bound in {r.boost for r in calibrator.rounds}
    assert found.score == pytest.approx(level, abs=6)
    assert not found.usable


def test_a_narrow_prior_far_off_says_so_instead_of_guessing() -> None:
    found = search(falling(90), prior=BoostPrior(7, 5, 0, 100), concentration=20).finish()
    assert found.status in ("converged", "not converged")
    if found.status == "converged":
        assert falling(90)(found.boost) == pytest.approx(50, abs=10)
    few = CalibrationConfig(max_iterations=3)
    short = search(falling(90), few, BoostPrior(7, 5, 0, 100), concentration=20).finish()
    assert (short.status, short.reason) == ("not converged", "no boost was tried between 10.7 and 100")
    assert short.low <= 11
    assert short.high == 100


def test_a_step_is_found_where_it_is() -> None:
    found = search(lambda b: 92.0 if b < 200 else 6.0, concentration=4).finish()
    assert found.boost == pytest.approx(200, abs=3)
    assert found.low - 1 <= 200 <= found.high + 1


def test_one_trial_a_round_still_has_an_interval() -> None:
    config = CalibrationConfig(max_iterations=60, trials_per_iteration=1)
    found = search(falling(120), config).finish()
    assert found.high - found.low > 1


def test_the_specifications_stopping_rule() -> None:
    config = CalibrationConfig(stop="tolerance")
    calibrator = search(falling(120), config, concentration=20)
    found = calibrator.finish()
    assert len(calibrator.rounds) < 15
    assert found.status == "converged"
    assert found.boost == calibrator.rounds[-1].boost
    assert abs(calibrator.rounds[-1].mean - 50) <= 5
    flat = search(lambda b: 90.0, config, concentration=20)
    assert (len(flat.rounds), flat.finish().status) == (15, "not converged")


def test_the_authors_estimate_is_the_posterior_median() -> None:
    config = CalibrationConfig(target_score=30, max_iterations=10, estimate="posterior", weight=5)
    calibrator = search(falling(120), config)
    grid, p = calibrator.posterior()
    assert calibrator.finish().boost == grid[np.searchsorted(np.cumsum(p), 0.5)]


# -- verification and report ------------------------------------------------------------------------------------------


def test_verification_can_unmask_a_threshold() -> None:
    found = search(falling(120)).finish()
    good = verified(found, [20.0, 80.0, 50.0, 45.0, None, 60.0] * 4)
    assert good.status == "converged"
    assert good.verification is not None
    assert (good.verification.n_trials, good.verification.n_unscored) == (20, 4)
    assert good.verification.score == pytest.approx(51)
    bad = verified(found, [95.0, 90.0] * 10)
    assert (bad.status, bad.usable, bad.contradicted) == ("not converged", False, True)
    assert not good.contradicted
    assert bad.reason.startswith("fresh trials score 92")
    assert verified(found, [None, None]).verification is None


def test_report_judges_the_average_over_latents() -> None:
    base = search(falling(120)).finish()
    rows = [verified(base, [level] * 18 + [0.0, 100.0]) for level in (46.0, 58.0, 47.0, 57.0)]
    hopeless = search(lambda b: 90.0, concentration=20).finish()
    report = assess([*rows, hopeless])
    scores = [t.verification.score for t in rows if t.verification]
    assert report.statuses == {"converged": 4, "at bound": 1, "not converged": 0}
    assert (report.n, report.n_judged, report.n_verified) == (5, 4, 4)
    assert report.mean_score == pytest.approx(np.mean(scores))
    half = 3.182446 * np.std(scores, ddof=1) / 2  # t quantile with 3 degrees of freedom
    assert report.mean_low == pytest.approx(np.mean(scores) - half, rel=1e-5)
    assert report.mean_high == pytest.approx(np.mean(scores) + half, rel=1e-5)
    assert report.within_tolerance is True
    assert report.share_outside == 0.5
    assert report.share_clearly_outside == 0.0
    assert report.boost_sd == 0.0
    json.dumps(asdict(report), allow_nan=False)


def test_report_keeps_unmasked_thresholds_in_its_average() -> None:
    base = search(falling(120)).finish()
    rows = [verified(base, [50.0] * 18 + [0.0, 100.0]), verified(base, [95.0] * 20)]
    report = assess(rows)
    assert report.mean_score == pytest.approx((50 + 95) / 2)
    assert report.share_clearly_outside == 0.5
    assert report.within_tolerance is False


def test_report_of_nothing() -> None:
    report = assess([])
    assert (report.n, report.mean_score, report.within_tolerance) == (0, None, None)
    nothing: list[Threshold] = [Calibrator(PRIOR, draws=DRAWS).finish()]
    assert assess(nothing).statuses["not converged"] == 1


@pytest.mark.parametrize("curve", [falling(120), lambda b: 90.0, lambda b: 50.0])
def test_thresholds_are_json(curve: Callable[[float], float]) -> None:
    found = verified(search(curve).finish(), [50.0, 40.0])
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["status"] == found.status


@pytest.mark.parametrize("score", [50.0, 95.0])
def test_stored_thresholds_of_0_1_are_read_as_contradicted_or_not(score: float) -> None:
    """Ledgers of 0.1 lack the field, and the report over all latents needs it."""
    threshold = verified(search(falling(120)).finish(), [score - 5, score + 5] * 10)
    stored = THRESHOLDS.dump([LatentThreshold.of(7, threshold)])
    assert THRESHOLDS.load(stored, "ledger")[0].threshold == threshold
    assert isinstance(stored, list)
    old = [{name: value for name, value in entry.items() if name != "contradicted"} for entry in stored]
    assert THRESHOLDS.load(old, "ledger")[0].threshold == threshold
    assert threshold.contradicted == (score == 95)
