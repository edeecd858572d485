"""Matched random sets and backtracking latents."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.errors import SteerbackError
from steerback.latents.backtracking import find_backtracking
from steerback.latents.matching import LatentActivity, matched_sets, uniform_sets


def activity(seed: int = 0, latents: int = 200, texts: int = 30) -> LatentActivity:
    """Latents of very different frequency and strength, a fifth of them dead."""
    generator = np.random.default_rng(seed)
    strength, rate = generator.lognormal(0, 1.5, latents), generator.beta(0.5, 3, latents)
    rate[::5] = 0
    frequencies = np.clip(rate * generator.uniform(0.5, 1.5, (texts, latents)), 0, 1)
    means = frequencies * strength * generator.uniform(0.8, 1.2, (texts, latents))
    return LatentActivity.measure(means, frequencies, generator.uniform(0.5, 2, latents))


def test_activity_is_the_mean_over_texts_and_the_norm_a_clamp_removes() -> None:
    found = LatentActivity.measure(
        np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[0.5, 0.0], [0.7, 0.0]]), np.array([2.0, 9.0])
    )
    assert found.mean.tolist() == [2.0, 0.0]
    assert found.frequency.tolist() == pytest.approx([0.6, 0.0])
    assert found.removed.tolist() == [4.0, 0.0]
    assert found.live.tolist() == [True, False]
    with pytest.raises(ValueError, match="not all finite"):
        LatentActivity.measure(np.array([[np.nan]]), np.array([[1.0]]), np.array([1.0]))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4))
def test_sets_are_live_distinct_and_disjoint(seed: int, size: int, n_sets: int) -> None:
    a = activity(seed)
    generator = np.random.default_rng(seed)
    interest = generator.choice(np.flatnonzero(a.live), size, replace=False).tolist()
    steered = generator.choice(200, 20, replace=False).tolist()
    found = matched_sets(a, interest, n_sets, steered, seed)
    drawn = list(itertools.chain(*found.sets))
    assert found.overlap == 0
    assert [len(s) for s in found.sets] == [size] * n_sets
    assert len(set(drawn)) == len(drawn)
    assert not set(drawn) & (set(interest) | set(steered))
    assert a.live[drawn].all()
    assert matched_sets(a, interest, n_sets, steered, seed) == found


def test_assignment_is_the_best_there_is() -> None:
    """One set of three from nine candidates, against every ordered choice."""
    a = activity(3, latents=15)
    live = np.flatnonzero(a.live)
    interest = live[:3].tolist()
    found = matched_sets(a, interest, 1).sets[0]
    features = a.features()
    distance = np.linalg.norm(features[interest][:, None] - features[None], axis=2)
    best = min(
        sum(distance[i, k] for i, k in enumerate(choice)) for choice in itertools.permutations(live[3:].tolist(), 3)
    )
    assert sum(distance[i, k] for i, k in enumerate(found)) == pytest.approx(best)


def test_several_sets_use_the_nearest_neighbours_of_a_single_latent() -> None:
    a = activity(4)
    live = np.flatnonzero(a.live)
    member = int(live[10])
    found = matched_sets(a, [member], 4)
    distance = np.linalg.norm(a.features() - a.features()[member], axis=1)
    others = [int(k) for k in live if k != member]
    assert {s[0] for s in found.sets} == set(sorted(others, key=lambda k: distance[k])[:4])


def test_nineteen_sets_of_a_single_latent_are_nineteen_different_latents() -> None:
    a = activity(4)
    member = int(np.flatnonzero(a.live)[10])
    found = matched_sets(a, [member], 19)
    assert len(set(map(tuple, found.sets))) == 19
    assert found.overlap == 0


def test_no_set_is_drawn_twice_while_there_are_others() -> None:
    a = activity(7, latents=30)
    found = matched_sets(a, np.flatnonzero(a.live)[:1].tolist(), 12)
    assert len(set(map(tuple, found.sets))) == 12


def test_matching_beats_a_uniform_draw_on_everything_it_reports() -> None:
    a = activity(1, latents=2000)
    interest = np.argsort(-a.removed)[20:40].tolist()  # strongly active, as detectors are
    matched, uniform = matched_sets(a, interest, 19), uniform_sets(a, interest, 19)
    assert max(q.distance for q in matched.quality) < 1
    for feature in ("mean", "frequency", "removed"):
        assert max(abs(q.difference[feature]) for q in matched.quality) < 0.5
        assert min(abs(q.difference[feature]) for q in uniform.quality) > 0.5
    ratios = [q.removed_ratio for q in matched.quality if q.removed_ratio]
    assert 0.5 < np.mean(ratios) < 1.5
    assert np.mean([q.removed_ratio for q in uniform.quality if q.removed_ratio]) < 0.5
    distances = [q.distance for q in matched.quality]
    assert max(distances) / min(distances) < 2  # dealt, not ranked: no set is the good one


def test_quality_is_measured_by_hand() -> None:
    a = activity(2)
    interest = [int(k) for k in np.flatnonzero(a.live)[:4]]
    found = matched_sets(a, interest, 1)
    logs = np.log(a.removed[a.live])
    gap = np.log(a.removed[list(found.sets[0])]).mean() - np.log(a.removed[interest]).mean()
    assert found.quality[0].difference["removed"] == pytest.approx(gap / logs.std())
    assert found.quality[0].removed_ratio == pytest.approx(
        a.removed[list(found.sets[0])].sum() / a.removed[interest].sum()
    )


def test_too_few_candidates_overlap_and_say_so() -> None:
    a = activity(5, latents=40)
    interest = np.flatnonzero(a.live)[:6].tolist()
    found = matched_sets(a, interest, 19)
    pairs = list(itertools.combinations(found.sets, 2))
    assert found.overlap == pytest.approx(np.mean([len(set(x) & set(y)) / 6 for x, y in pairs]))
    assert found.overlap > 0.2
    assert all(len(set(s)) == 6 for s in found.sets)
    assert len(set(map(tuple, found.sets))) > 10
    with pytest.raises(SteerbackError, match="only 2 live latents are left to match 6"):
        matched_sets(a, interest, 1, exclude=np.flatnonzero(a.live)[8:].tolist())


def test_uniform_sets_are_uniform() -> None:
    a = activity(6, latents=20)
    live = np.flatnonzero(a.live)
    counts = np.zeros(20)
    sets = uniform_sets(a, live[:4].tolist(), 3000).sets
    for s in sets:
        counts[list(s)] += 1
    assert counts[live[:4]].sum() == 0
    share = counts[live[4:]] / len(sets)
    assert np.abs(share - 4 / len(live[4:])).max() < 0.04
    json.dumps(uniform_sets(a, live[:4].tolist(), 2).model_dump(), allow_nan=False)


@pytest.mark.parametrize("interest", [[], [3, 3], [-1], [200]])
def test_a_set_that_makes_no_sense_is_refused(interest: list[int]) -> None:
    with pytest.raises(SteerbackError, match="distinct latents from 0 to 199"):
        matched_sets(activity(), interest)


# -- backtracking -----------------------------------------------------------------------------------------------------

LABELS = {
    1: "The assistant is correcting itself after a mistake",
    2: "Self-correction and backtracking in reasoning",
    3: "Color correction in photo editing",
    4: "Wait times at airports",
    5: "Someone changing their mind",
    6: "Oops, acknowledging an error",
    7: "Beginning of a sentence",
    8: "Retractable awnings",
    9: "Expressions like 'wait' and 'actually' that revise a statement",
    10: "Restart the computer",
    11: "Actually",
    12: "Awaiting trial",
    13: "Starting over from the beginning",
}


def test_labels_that_speak_of_going_back() -> None:
    found = find_backtracking(LABELS)
    assert {m.latent for m in found} == {1, 2, 5, 6, 9, 13}
    assert [m.points for m in found] == sorted((m.points for m in found), reverse=True)
    best = {m.latent: m for m in found}
    assert best[2].matched == ("self-correct*", "backtrack*", "correction*")
    assert best[2].points == 7.5
    assert {m.latent for m in find_backtracking(LABELS, minimum=1)} == {1, 2, 5, 6, 9, 11, 13}
    assert len(find_backtracking(LABELS, limit=2)) == 2
    assert find_backtracking({}) == ()


def test_own_keywords_stand_between_word_boundaries() -> None:
    labels = {1: "tea and cake", 2: "teaching", 3: "TEA-time", 4: "iced tea with cake", 5: "green tea"}
    assert {m.latent for m in find_backtracking(labels, {"tea": 2}, ())} == {1, 3, 4, 5}
    assert {m.latent for m in find_backtracking(labels, {"tea*": 2}, ("green *",))} == {1, 2, 3, 4}
    assert {m.latent for m in find_backtracking(labels, {"tea * cake": 2}, ())} == {1, 4}
