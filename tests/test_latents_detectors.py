"""Detector search against brute force, and against planted latents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from steerback.errors import SteerbackError
from steerback.latents.detectors import Pairs, derange, make_pairs, search_detectors
from steerback.latents.separation import null_counts, ranks_of, separation

# -- pairs ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 7), min_size=2, max_size=60), st.integers(0, 999))
def test_no_text_keeps_its_prompt(groups: list[int], seed: int) -> None:
    array = np.array(groups)
    assume(2 * np.bincount(array).max() <= len(array))
    order = derange(array, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(array)))
    assert (array[order] != array).all()


def test_the_hardest_derangements_are_found() -> None:
    for groups in ([0] * 30 + list(range(1, 31)), [0] * 5 + [1] * 5, [0] * 4 + [1] * 3 + [2]):
        array = np.array(groups)
        for seed in range(30):
            assert (array[derange(array, np.random.default_rng(seed))] != array).all()
    with pytest.raises(SteerbackError, match="3 of 5 texts"):
        derange(np.array([0, 0, 0, 1, 2]), np.random.default_rng(0))


def test_halves_share_no_prompt_and_pairs_stay_within_them() -> None:
    prompts = [f"p{i % 21}" for i in range(63)]
    pairs = make_pairs(prompts, seed=42)
    inside, outside = set(pairs.prompt[pairs.search]), set(pairs.prompt[~pairs.search])
    assert not inside & outside
    assert (len(inside), len(outside)) == (11, 10)
    assert (pairs.search[pairs.partner] == pairs.search).all()
    assert all(prompts[i] != prompts[j] for i, j in enumerate(pairs.partner))
    assert sorted(pairs.partner) == list(range(63))  # each prompt is a mismatch as often as it has texts
    again = make_pairs(prompts, seed=42)
    assert (again.partner == pairs.partner).all()
    assert (make_pairs(prompts, seed=43).partner != pairs.partner).any()
    assert make_pairs(prompts, held_out=False).search.all()
    with pytest.raises(SteerbackError, match="at least 4 different prompts"):
        make_pairs(["a", "b", "c"])


def test_mismatches_are_spread_over_prompts() -> None:
    prompts = [f"p{i // 10}" for i in range(100)]
    pairs = make_pairs(prompts, held_out=False)
    partners_of_first = {prompts[j] for j in pairs.partner[:10]}
    assert len(partners_of_first) >= 5


# -- statistics -------------------------------------------------------------------------------------------------------


def sparse(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.maximum(generator.normal(size=shape), 0).round(1)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 15), st.integers(2, 15), st.integers(0, 10**6))
def test_separation_against_loops(n: int, m: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    a, b = sparse(generator, (n, 4)), sparse(generator, (m, 4))
    found = separation(a, b)
    for k in range(4):
        wins = np.mean([(y > x) + 0.5 * (y == x) for x in a[:, k] for y in b[:, k]])
        assert found.auc[k] == pytest.approx(wins)
        assert found.auc[k] == pytest.approx(roc_auc_score([0] * n + [1] * m, np.concatenate([a[:, k], b[:, k]])))
        assert (found.auc[k] == 1.0) == (b[:, k].min() > a[:, k].max())
        pooled = np.sqrt(((n - 1) * a[:, k].var(ddof=1) + (m - 1) * b[:, k].var(ddof=1)) / (n + m - 2))
        if pooled:
            assert found.effect[k] == pytest.approx((b[:, k].mean() - a[:, k].mean()) / pooled)
    np.testing.assert_allclose(found.matched_frequency, (a > 0).mean(axis=0))
    np.testing.assert_allclose(found.mismatched_median, np.median(b, axis=0))


def test_null_counts_against_recomputing_each_draw() -> None:
    generator = np.random.default_rng(5)
    a, b = sparse(generator, (12, 30)), sparse(generator, (12, 30)) + 0.3
    clusters = np.repeat(np.arange(4), 3) * 10  # numbers need not be dense
    drawn = null_counts(ranks_of(a, b), clusters, (0.7, 0.55), 40, seed=9)
    again = np.random.default_rng(9)
    swapped = again.integers(0, 2, (40, 4)).astype(bool)[:, np.repeat(np.arange(4), 3)]
    for draw in range(40):
        flip = swapped[draw][:, None]
        # "swapped" texts take the mismatched label with their matched activation
        auc = separation(np.where(flip, b, a), np.where(flip, a, b)).auc
        assert drawn.counts[0, draw] == (auc >= 0.7).sum()
        assert drawn.counts[1, draw] == (auc >= 0.55).sum()
        assert drawn.largest[draw] == pytest.approx(auc.max())


# -- search -----------------------------------------------------------------------------------------------------------


def planted(seed: int = 0, texts: int = 80, latents: int = 300) -> tuple[np.ndarray, np.ndarray, Pairs]:
    """Latents 0-4 detect the mismatch perfectly, 5-9 in 85 % of texts, 10 is always on and a little higher."""
    generator = np.random.default_rng(seed)
    prompts = [f"p{i // 2}" for i in range(texts)]
    pairs = make_pairs(prompts, seed=seed)
    base = sparse(generator, (texts, latents))  # what the response says, in both arms
    matched, mismatched = base + 0.05 * sparse(generator, base.shape), base + 0.05 * sparse(generator, base.shape)
    matched[:, :10] = 0
    mismatched[:, :10] = generator.uniform(1, 2, (texts, 10))
    mismatched[:, 5:10] *= generator.random((texts, 5)) < 0.85
    matched[:, 10] = 50 + generator.normal(size=texts)
    mismatched[:, 10] = 50.5 + generator.normal(size=texts)
    return matched, mismatched, pairs


def test_planted_detectors_are_found_and_hold_on_other_prompts() -> None:
    matched, mismatched, pairs = planted()
    found = search_detectors(matched, mismatched, pairs)
    assert set(found.latents) == set(range(5))
    assert found.n_passed == 5
    assert found.search.perfect.observed == 5
    assert found.search.perfect.expected < 0.1
    assert found.search.perfect.p < 0.01
    assert found.search.high_auc.observed >= 5
    assert found.held_out is not None
    assert found.held_out.separation.auc.tolist() == [1.0] * 5
    assert found.held_out.perfect.observed == 5
    assert found.held_out.perfect.p < 0.01
    assert found.held_out.n_prompts + found.search.n_prompts == 40
    loose = search_detectors(matched, mismatched, pairs, "auc", auc=0.85)
    assert set(loose.latents) == set(range(10))
    authors = search_detectors(matched, mismatched, pairs, "authors")
    silent = (matched[pairs.search] == 0).all(axis=0)
    fires = (mismatched[pairs.search] > 0).mean(axis=0) >= 0.8
    assert set(authors.latents) == set(np.flatnonzero(silent & fires))
    assert set(range(5)) <= set(authors.latents)


def test_ranking_puts_separation_before_effect_size() -> None:
    matched, mismatched, pairs = planted()
    found = search_detectors(matched, mismatched, pairs, "top", limit=7)
    assert set(found.latents[:5]) == set(range(5))
    assert len(found.latents) == 7
    assert found.n_passed > 7
    auc = [found.overall.auc[k] for k in found.latents]
    assert auc == sorted(auc, reverse=True)
    best = found.overall.effect[list(found.latents[:5])].tolist()
    assert best == sorted(best, reverse=True)


def test_where_nothing_is_planted_nothing_beats_the_null() -> None:
    p_values, found_any = [], 0
    for seed in range(25):
        generator = np.random.default_rng(seed)
        prompts = [f"p{i // 2}" for i in range(40)]
        pairs = make_pairs(prompts, seed=seed)
        base = sparse(generator, (40, 200))
        arms = [base + 0.2 * sparse(generator, base.shape) for _ in range(2)]
        found = search_detectors(*arms, pairs, "auc", auc=0.6, draws=60)
        found_any += bool(search_detectors(*arms, pairs, draws=10).latents)
        p_values.append(found.search.high_auc.p)
    assert found_any == 0
    assert np.mean(np.array(p_values) <= 0.1) <= 0.2


def test_excluded_latents_and_no_detector_at_all() -> None:
    matched, mismatched, pairs = planted()
    found = search_detectors(matched, mismatched, pairs, exclude=[0, 1, 2, 3])
    assert found.latents == (4,)
    none = search_detectors(matched, mismatched, pairs, exclude=range(300))
    assert none.latents == ()
    assert none.search.perfect.observed == 0
    whole = make_pairs([f"p{i // 2}" for i in range(80)], held_out=False)
    assert search_detectors(matched, mismatched, whole).held_out is None


def test_authors_format_and_report_are_json() -> None:
    matched, mismatched, pairs = planted()
    found = search_detectors(matched, mismatched, pairs)
    written = json.loads(json.dumps(found.record().model_dump(), allow_nan=False))
    assert written["latents"] == list(found.latents)
    assert written["held_out"]["separation"]["auc"] == [1.0] * 5


def test_impossible_requests_are_refused() -> None:
    matched, mismatched, pairs = planted()
    with pytest.raises(SteerbackError, match="unknown detector rule 'best'"):
        search_detectors(matched, mismatched, pairs, "best")  # type: ignore[arg-type]
    with pytest.raises(SteerbackError, match="'top' needs limit"):
        search_detectors(matched, mismatched, pairs, "top")
    with pytest.raises(ValueError, match=r"shape \(80, n latents\)"):
        search_detectors(matched[:10], mismatched[:10], pairs)
    matched[3, 3] = np.nan
    with pytest.raises(ValueError, match="not all finite"):
        search_detectors(matched, mismatched, pairs)
