"""Selection of latents: sampling, user lists, relevance and concreteness filters."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from steerback.config import SelectionConfig, build_config, specification
from steerback.errors import SteerbackError
from steerback.latents.concreteness import OfflineRater, Rater, abstract_labels, make_rater
from steerback.latents.sampling import check_latents, parse_latents, sample_latents
from steerback.latents.selection import ever_active, most_active, rater_of, rating_sample, select, top_count
from steerback.study.study import Study

LABELS = {3: "volcanoes", 5: "Sailing, rigging and boats", 8: "tea", 9: "tea", 11: "Violins"}


# -- sampling ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 5000), min_size=1, max_size=300), st.integers(1, 80), st.integers(0, 9))
def test_sample_takes_one_latent_from_every_stretch(candidates: set[int], n: int, seed: int) -> None:
    chosen = sample_latents(sorted(candidates), n, seed)
    assert len(chosen) == min(n, len(candidates))
    assert set(chosen) <= candidates
    assert list(chosen) == sorted(set(chosen))
    assert chosen == sample_latents(sorted(candidates, reverse=True), n, seed)
    if len(candidates) > n:
        ranks = [sorted(candidates).index(k) for k in chosen]
        assert [r * n // len(candidates) for r in ranks] == pytest.approx(list(range(n)), abs=1)


def test_sample_is_uniform_over_candidates() -> None:
    counts = np.zeros(10)
    for seed in range(3000):
        counts[list(sample_latents(range(10), 5, seed))] += 1
    assert np.abs(counts / 3000 - 0.5).max() < 0.04  # 4 standard errors


def test_seed_changes_the_sample() -> None:
    assert sample_latents(range(1000), 20, 42) != sample_latents(range(1000), 20, 43)
    with pytest.raises(SteerbackError, match="at least 1"):
        sample_latents(range(10), 0)


# -- own lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("12,", (12,)),
        (" 7 , volcanoes,11", (7, 3, 11)),
        ("VIOLINS", (11,)),
        ("Sailing, rigging and boats", (5,)),
        ("mood", ("mood",)),
    ],
)
def test_what_an_own_list_means(text: str, expected: object) -> None:
    assert parse_latents(text, LABELS, 20, directions=("mood",)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("0", "at least 1"),
        ("-3", "at least 1"),
        ("3,20", "no latent 20; indices run from 0 to 19"),
        ("-1,2", "no latent -1"),
        ("3,volcanoes", "named twice"),
        ("tea", r"2 latents are labelled 'tea' \(8, 9\)"),
        ("volcano", r"did you mean 3 \(volcanoes\)"),
        ("1,zzzz", "'zzzz' is not an index, a label"),
        ("list.txt", "file list.txt does not exist"),
        (",", "no latent is named"),
    ],
)
def test_wrong_own_lists_are_named(text: str, message: str) -> None:
    with pytest.raises(SteerbackError, match=message) as error:
        parse_latents(text, LABELS, 20)
    assert "\n" not in str(error.value)


def test_own_list_from_files(tmp_path: Path) -> None:
    lines, as_json, odd = tmp_path / "l.txt", tmp_path / "l.json", tmp_path / "odd.json"
    lines.write_text("# mine\n4, 6\nSailing, rigging and boats\nvolcanoes # hot\n\n", encoding="utf-8")
    as_json.write_text(json.dumps([4, "violins"]), encoding="utf-8")
    odd.write_text("[4, null]", encoding="utf-8")
    assert parse_latents(str(lines), LABELS, 20) == (4, 6, 5, 3)
    assert parse_latents(str(as_json), LABELS, 20) == (4, 11)
    with pytest.raises(SteerbackError, match="None is not an index"):
        parse_latents(str(odd), LABELS, 20)
    as_json.write_text("[4,", encoding="utf-8")
    with pytest.raises(SteerbackError, match="not valid JSON"):
        parse_latents(str(as_json), LABELS, 20)


def test_own_list_without_labels_says_so() -> None:
    with pytest.raises(SteerbackError, match="has no labels; give indices"):
        check_latents(["volcanoes"], {}, 10)
    assert check_latents([3, "mood"], {}, 10, ["mood"]) == [3, "mood"]


# -- relevance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(65_536, 100), (131_072, 100), (16_384, 25), (1024, 2), (300, 1), (1, 1)])
def test_small_saes_lose_the_same_fraction(size: int, count: int) -> None:
    assert top_count(size) == count


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6))
def test_most_active_against_a_loop(prompts: int, latents: int, top: int, seed: int) -> None:
    peaks = np.random.default_rng(seed).integers(0, 5, (prompts, latents)).astype(float)
    expected = set()
    for row in peaks:
        ranked = sorted(range(latents), key=lambda k: (-row[k], k))[:top]
        expected |= {k for k in ranked if row[k] > 0}
    assert set(np.flatnonzero(most_active(peaks, top))) == expected
    assert set(np.flatnonzero(ever_active(peaks))) == {k for k in range(latents) if peaks[:, k].any()}


@pytest.mark.parametrize(
    ("preset", "over", "responses"), [("specification", "response", ["an answer"]), ("authors", "all", [""])]
)
def test_relevance_reads_what_the_preset_says(preset: str, over: str, responses: list[str]) -> None:
    asked: dict[str, object] = {}

    def activations(prompts: list[str], responses: list[str], **options: object) -> np.ndarray:
        asked.update(options, prompts=prompts, responses=responses)
        return np.array([[1.0, 0.0]], dtype=np.float32)

    async def references() -> list[object]:
        return [SimpleNamespace(trial=SimpleNamespace(prompt="why"), completion=SimpleNamespace(text="an answer"))]

    engine = SimpleNamespace(activations=activations)
    study = SimpleNamespace(
        config=build_config("esr", ("llama-3.1-8b",), preset), engine=engine, references=references, prompts=["why"]
    )
    assert asyncio.run(Study._peaks(study)).tolist() == [[1.0, 0.0]]  # type: ignore[arg-type]
    assert asked == {"over": over, "prompts": ["why"], "responses": responses}


def test_peaks_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 0, latent 1 is not finite"):
        most_active(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="n prompts, n latents"):
        ever_active(np.zeros(3))


# -- concreteness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["concreteness_labels", "concreteness_labels_described"])
def test_offline_rater_tells_own_concrete_from_own_abstract_labels(name: str) -> None:
    """Word lists and these labels have the same author: this guards against regressions, it proves nothing more."""
    with (Path(__file__).parent / "data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    ratings = OfflineRater().rate([row["label"] for row in rows])
    assert all(r is not None and 0 <= r <= 100 for r in ratings)
    assert roc_auc_score([row["kind"] == "concrete" for row in rows], ratings) > 0.99
    kept = {row["label"] for row, r in zip(rows, ratings, strict=True) if r is not None and r >= 65}
    assert kept == {row["label"] for row in rows if row["kind"] == "concrete"}  # by the authors' threshold


def test_offline_rater_knows_places_and_mentions() -> None:
    concrete, abstract, *places = OfflineRater().rate(
        [
            "Hawaiian tourism itinerary descriptions",
            "Descriptions of emotional states",
            *("Himalayan peaks", "brazil nuts", "Japanese gardens", "Texan ranches"),
        ]
    )
    assert concrete is not None
    assert concrete > 90
    assert abstract is not None
    assert abstract < 50
    assert all(rating is not None and rating > 65 for rating in places)


def test_the_built_in_labels_keep_their_ratings() -> None:
    """The latents of the built-in models' runs, and so all their numbers, hang on these."""
    at = {
        61.8: "thunderstorms bagpipes",
        72.3: "wolves opera samurai vikings ballet orchids perfume",
        91.7: "poker",
        96.1: "robots penguins dragons coffee chess pyramids sharks castles owls volcanoes skiing ghosts",
    }
    for rating, words in at.items():
        assert set(OfflineRater().rate(words.split())) == {rating}
    assert OfflineRater().rate(["coral reefs", "steam trains", "the Moon"]) == [72.3, 96.1, 96.1]


def test_below_median_is_dropped_or_below_a_threshold() -> None:
    ratings = {1: 10.0, 2: 50.0, 3: 50.0, 4: 90.0}
    assert abstract_labels(ratings) == {1}
    assert abstract_labels({1: 10.0, 2: 20.0, 3: 30.0}) == {1}
    assert abstract_labels(ratings, 65) == {1, 2, 3}
    assert abstract_labels({}) == set()


def test_rater_protocol_and_names() -> None:
    assert isinstance(make_rater("offline"), Rater)
    assert OfflineRater().rate(["42", "of the", ""]) == [None, None, None]
    with pytest.raises(SteerbackError, match="unknown concreteness rater 'gpt'; choose one of: offline"):
        make_rater("gpt")


# -- all filters together ---------------------------------------------------------------------------------------------


def test_every_latent_is_accounted_for() -> None:
    peaks = np.zeros((2, 40))
    peaks[0, 7] = peaks[1, 8] = 3.0
    peaks[0, 9] = 1.0  # not the most active of its prompt, so it stays under top-1
    labels = {k: "volcanoes" if k % 2 else "the concept of importance" for k in range(30)}
    found = select(n_latents=40, n=5, labels=labels, dead={0, 1, 7}, peaks=peaks, settings=SelectionConfig(), seed=42)
    assert found.counts["all"] == 40
    assert found.counts["dropped: dead"] == 3
    assert found.counts["dropped: relevant to a prompt"] == 1  # 8; 7 was dead already
    assert found.counts["dropped: abstract label"] == 13  # even labelled ones but 0 and 8
    assert found.counts["candidates"] == 40 - 3 - 1 - 13
    assert found.counts["without label"] == 10
    assert found.counts["chosen"] == len(found.chosen) == 5
    assert not set(found.chosen) & {0, 1, 7, 8}
    assert all(k % 2 or k >= 30 for k in found.chosen)


def test_authors_filters_and_filters_off() -> None:
    peaks = np.zeros((1, 10))
    peaks[0, :4] = 0.1
    strict = SelectionConfig(relevance="zero", concreteness="threshold")
    found = select(n_latents=10, n=99, labels={5: "importance"}, dead=(), peaks=peaks, settings=strict)
    assert found.chosen == (4, 6, 7, 8, 9)
    off = SelectionConfig(relevance="off", concreteness="off")
    assert select(n_latents=4, n=9, labels={}, dead=(), peaks=None, settings=off).chosen == (0, 1, 2, 3)
    with pytest.raises(SteerbackError, match=r"no latent is left to steer with \(all 4, dropped: dead 4\)"):
        select(n_latents=4, n=9, labels={}, dead=range(4), peaks=None, settings=off)
    with pytest.raises(ValueError, match="needs peaks"):
        select(n_latents=4, n=9, labels={}, dead=(), peaks=peaks, settings=strict)


def test_latents_without_a_label_can_be_left_out() -> None:
    off = SelectionConfig(relevance="off", concreteness="off")
    found = select(
        n_latents=6, n=9, labels={1: "tea", 4: "owls"}, dead=(4,), peaks=None, settings=off, labelled_only=True
    )
    assert found.chosen == (1,)
    assert found.counts["dropped: no label"] == 4


def test_a_costly_rater_is_asked_about_a_sample() -> None:
    class Counting:
        name, version = "counting", "1"
        seen = 0

        def rate(self, labels: list[str]) -> list[float | None]:
            self.seen = len(labels)
            return [float(label.split()[1]) for label in labels]

    rater = Counting()
    labels = {k: f"thing {k}" for k in range(500)}
    plain = SelectionConfig(relevance="off")
    found = select(
        n_latents=600, n=10, labels=labels, dead=(), peaks=None, settings=plain, rater=rater, rate_at_most=50
    )
    assert rater.seen == len(found.ratings) == 50
    assert found.counts["dropped: not rated"] == 450
    assert found.counts["dropped: abstract label"] == 25  # below the median of the sample
    assert found.counts["candidates"] == 25 + 100  # those without a label stay
    again = select(
        n_latents=600, n=10, labels=labels, dead=(), peaks=None, settings=plain, rater=rater, rate_at_most=50
    )
    assert again == found


def test_the_runs_judge_rates_labels_if_it_is_a_model() -> None:
    config = specification("esr", ("organism",))
    assert rater_of(config.model_copy(update={"judge": "offline"})) == "offline"
    assert rater_of(config.model_copy(update={"judge": "sonnet-4.5"})) == "sonnet-4.5"
    own = config.model_copy(update={"judge": "sonnet-4.5", "selection": SelectionConfig(rater="offline", rated=9)})
    assert rater_of(own) == "offline"
    assert (rating_sample(config), rating_sample(own)) == (500, 9)
    assert rating_sample(config.model_copy(update={"n_latents": 80})) == 800


def test_ratings_that_fail_are_counted() -> None:
    class Flaky:
        name, version = "flaky", "1"
        seen = 0

        def rate(self, labels: list[str]) -> list[float | None]:
            self.seen = len(labels)
            return [None if i == 0 else float(i) for i in range(len(labels))]

    rater = Flaky()
    labels = {k: f"thing {k}" for k in range(50)}
    plain = SelectionConfig(relevance="off")
    found = select(n_latents=50, n=10, labels=labels, dead=(), peaks=None, settings=plain, rater=rater)
    assert rater.seen == 50
    assert found.counts["rating failed"] == 1
    assert found.counts["dropped: abstract label"] == 24  # of 49 rated
    assert len(found.ratings) == 49
