"""The ledger stores all records, rejects those of other runs, and never changes a plan."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.errors import SteerbackError
from steerback.records import (
    Attempt,
    Completion,
    Intervention,
    Judgement,
    Receipt,
    Recording,
    Trial,
    expected_positions,
    is_degraded,
)
from steerback.store.cache import Cache, cache_key
from steerback.store.database import pack_array, unpack_array
from steerback.store.facts import CONFIG
from steerback.store.ledger import Ledger


def make_trial(index: int = 0, **fields: object) -> Trial:
    values: dict[str, object] = {
        "key": f"t/measure/steered/{index}",
        "target": "t",
        "stage": "measure",
        "condition": "steered",
        "index": index,
        "prompt": "Explain how tides work.",
        "seed": 44 + index,
        "latent": 7,
        "label": "volcanoes",
        "interventions": (Intervention("add", 7, 1.5), Intervention("clamp", 3, 0.0, "generated", 2)),
    }
    return Trial(**(values | fields))  # type: ignore[arg-type]


def make_completion(text: str = "Tides.", **fields: object) -> Completion:
    values: dict[str, object] = {"prompt_tokens": 4, "finish": "stop", "receipt": Receipt(4, 1, 1.5)}
    return Completion(text, (1, 2), **(values | fields))  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    trial = make_trial(record=Recording((3, 5), 2), meta_prompt="Stay.", prefill="Well, ")
    acts = np.arange(10, dtype=np.float32).reshape(5, 2)
    done = make_completion("A\x00B \u00e9 \U0001f30b", activations=acts)
    judged = Judgement("j", "r1", "scored", (Attempt(0, 3, 12.5), Attempt(3, 6, 99.0, "Wait", False)), raw="{}")
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.add_trials([trial])
        ledger.add_completions([(trial.key, done, "engine")])
        ledger.add_judgements([(trial.key, judged)])
    with Ledger(tmp_path / "l.sqlite", read_only=True) as ledger:
        (row,) = ledger.rows(judge="j", activations=True)
    assert (row.trial, row.completion, row.judgement) == (trial, done, judged)
    assert row.completion is not None
    np.testing.assert_array_equal(row.completion.activations, acts)


def test_a_lone_surrogate_in_model_text_is_kept_as_a_replacement(tmp_path: Path) -> None:
    trial = make_trial()
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.add_trials([trial])
        ledger.add_completions([(trial.key, make_completion("bad \ud800 text"), "e")])
        ledger.add_judgements([(trial.key, Judgement("j", "r", "unscored", reason="\udfff", raw="\ud801"))])
        (row,) = ledger.rows(judge="j")
    assert row.completion is not None
    assert row.completion.text == "bad ? text"


def test_first_completion_and_first_score_are_kept_but_unscored_is_replaced(tmp_path: Path) -> None:
    trial = make_trial()
    scored = Judgement("j", "r", "scored", (Attempt(0, 1, 10.0),))
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.add_trials([trial])
        ledger.add_completions([(trial.key, make_completion("one"), "e")])
        ledger.add_completions([(trial.key, make_completion("two"), "e")])
        for judgement in (Judgement("j", "r", "unscored", reason="timeout"), scored, Judgement("j", "r", "empty")):
            ledger.add_judgements([(trial.key, judgement)])
        (row,) = ledger.rows(judge="j")
    assert row.completion is not None
    assert row.completion.text == "one"
    assert row.judgement == scored


def test_a_plan_never_changes_under_a_run(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.add_trials([make_trial(0), make_trial(1)])
        ledger.add_trials([make_trial(0), make_trial(1), make_trial(2)])
        with pytest.raises(SteerbackError, match="differs from the plan"):
            ledger.add_trials([make_trial(1, interventions=(Intervention("add", 7, 1.6),))])
        assert len(ledger.rows()) == 3


def test_foreign_corrupt_and_newer_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign, corrupt, newer = tmp_path / "foreign", tmp_path / "corrupt", tmp_path / "newer"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    corrupt.write_bytes(b"this is no database" * 100)
    Ledger(newer).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for path, words in ((foreign, "another program"), (corrupt, "not a readable"), (newer, "schema version 99")):
        before = path.read_bytes()
        with pytest.raises(SteerbackError, match=words) as caught:
            Ledger(path)
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5), st.integers(0, 4), st.data())
def test_arrays_survive_packing(rows: int, columns: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=rows * columns, max_size=rows * columns))
    array = np.asarray(values, dtype=np.float32).reshape(rows, columns)
    np.testing.assert_array_equal(unpack_array(pack_array(array)), array)


def test_cache_returns_what_was_put_and_forgets_unscored(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "c.sqlite")
    done = make_completion(activations=np.ones((5, 1), np.float32))
    scored, unscored = Judgement("j", "r", "empty"), Judgement("j", "r", "unscored", reason="x")
    cache.put_completions({"a": done})
    cache.put_judgements({"b": scored, "c": unscored})
    assert cache.completions(["a", "zz"]) == {"a": done}
    assert cache.judgements(["b", "c"]) == {"b": scored}
    cache.close()


def test_cache_keys_differ_with_anything_that_shapes_the_value() -> None:
    keys = {cache_key(k, f, c) for k in ("completion", "judgement") for f in ("e1", "e2") for c in ("x", "y")}
    assert len(keys) == 8


@settings(deadline=None)
@given(st.lists(st.sampled_from(["all", "prompt", "generated"]), max_size=3), st.integers(1, 50), st.integers(0, 50))
def test_expected_positions_by_counting(kinds: list[str], prompt: int, generated: int) -> None:
    edits = tuple(Intervention("add", 0, 1.0, k) for k in kinds)  # type: ignore[arg-type]
    fed = ["prompt"] * prompt + ["generated"] * max(generated - 1, 0)
    touched = [p for p in fed if any(k in ("all", p) for k in kinds)]
    assert expected_positions(edits, prompt, generated) == (touched.count("prompt"), touched.count("generated"))


@pytest.mark.parametrize(
    ("text", "degraded"),
    [
        ("lava lava lava lava lava", True),
        ("x lava lava lava lava y", False),
        ("the lava lava lava\nlava  lava end", True),
        ("aa aa aa aa aab", False),
        ("baa aa aa aa aa", False),
        ("- - - - - - - -", False),
        ("", False),
        ("no no no no no, stop", False),  # "no," is another word than "no"
    ],
)
def test_degraded_is_five_identical_consecutive_words(text: str, degraded: bool) -> None:
    assert is_degraded(text) is degraded
    words = text.split()
    assert degraded == any(len(set(words[i : i + 5])) == 1 and len(words[i]) > 1 for i in range(len(words) - 4))


def test_gating_merges_an_attempt_whose_phrase_does_not_open_it() -> None:
    spans = (Attempt(0, 10, 0.0), Attempt(10, 40, 100.0, "Wait", False), Attempt(40, 50, 80.0, "Sorry"))
    merged = Judgement("j", "r", "scored", spans).gated_attempts()
    assert merged == (Attempt(0, 40, 75.0), Attempt(40, 50, 80.0, "Sorry"))


def test_targets_stand_in_the_order_of_the_config_whichever_planned_first(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.put("", CONFIG, {"targets": ["b", "a"]})
        for target in ("a", "a+mix", "b"):
            for condition in ("second", "first"):
                key = f"{target}/{condition}"
                ledger.add_trials([make_trial(key=key, target=target, condition=condition)])
        order = [(t, c) for t in ("b", "a", "a+mix") for c in ("second", "first")]
        assert ledger.conditions() == order
        assert ledger.stages() == [(t, "measure") for t in ("b", "a", "a+mix")]
