"""Two processes that share the reading of a ledger, and counts by SQLite: the results of reading row by row."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelled import make_run, scattered
from steerback.analysis import base
from steerback.analysis.base import outcomes_of, read_conditions
from steerback.analysis.labels import LedgerPlace
from steerback.jobs import view as view_job
from steerback.jobs.view import write_view
from steerback.records import (
    Attempt,
    Completion,
    FinishReason,
    Intervention,
    Judgement,
    Positions,
    Prefix,
    Receipt,
    Trial,
    WindowScores,
)
from steerback.report import view_sample
from steerback.report.view_trials import STAGES, ShownRun, flags_of, reason_of
from steerback.store import processes
from steerback.store.ledger import Ledger
from steerback.store.rows import verdict_of
from steerback.store.run import Run

JUDGE, PLACE = "machine", ("model", "measure", "plain")
POSITIONS: tuple[Positions, ...] = ("all", "generated", "prompt")


def planned(index: int, positions: Positions | None = None, prefixed: bool = False, condition: str = "plain") -> Trial:
    edits = (Intervention("add", index % 3, 2.0, positions),) if positions else ()
    prefix = Prefix("So", (1, 2)) if prefixed else None
    key, place = f"model/measure/{condition}/{index}", ("model", "measure", condition, index)
    return Trial(key, *place, "Why?", index, index % 3, interventions=edits, prefix=prefix)


def judged(rng: random.Random) -> Judgement:
    status = rng.choice(("scored", "empty", "unscored"))
    score = rng.choice((40.0, 60.0, float("nan")))
    attempts = (Attempt(0, 2, 30.0), Attempt(2, 4, score, "Wait", rng.random() < 0.5))[: rng.randint(1, 2)]
    reason = rng.choice(("", "none", "other")) if status != "unscored" else rng.choice(("no answer", "refused"))
    return Judgement(JUDGE, "r-1", status, attempts if status == "scored" else (), reason)


def odd_ledger(path: Path, seed: int, trials: int = 60) -> Ledger:
    """A ledger with trials of every kind: prefixes, wrong receipts, empty and degraded responses, any verdict."""
    rng = random.Random(seed)
    prefixes = seed % 2 == 0
    plan = [
        planned(i, rng.choice((None, *POSITIONS)), prefixes and rng.random() < 0.5, rng.choice(("plain", "other")))
        for i in rng.sample(range(-50, 50 * trials), trials)
    ]
    done: list[tuple[str, Completion, str]] = []
    verdicts: list[tuple[str, Judgement]] = []
    windows: list[tuple[str, WindowScores]] = []
    for trial in plan:
        if rng.random() < 0.1:
            continue
        ids, prompt = tuple(range(rng.choice((0, 1, 2, 3)))), rng.choice((0, 1, 4))
        receipt = Receipt(rng.choice((0, 1, 3, 4)), rng.choice((0, 1, 2, 3)), 1.0)
        finish: FinishReason = rng.choice(("stop", "stop", "stop", "length", "error", "unknown"))
        text = "so so so so so" if rng.random() < 0.3 else "fine"
        done.append((trial.key, Completion(text, ids, prompt, finish, receipt), "engine"))
        if rng.random() < 0.9:
            verdicts.append((trial.key, judged(rng)))
        if rng.random() < 0.7:
            scores = tuple(float(rng.choice((0, 50, 100))) for _ in range(rng.randint(0, 6)))
            reason = "" if scores else "too short"
            windows.append((trial.key, WindowScores(JUDGE, "w-1", tuple(range(len(scores))), scores, reason)))
    ledger = Ledger(path)
    ledger.add_trials(plan)
    ledger.add_completions(done)
    ledger.add_judgements(verdicts)
    ledger.add_windows(windows)
    return ledger


@pytest.mark.parametrize("seed", range(4))
def test_kinds_count_what_the_outlines_say(tmp_path: Path, seed: int) -> None:
    with odd_ledger(tmp_path / "ledger.sqlite", seed, 6000) as ledger:
        rows = list(ledger.outlines(judge=JUDGE))
        added = [key for (key,) in ledger._all("SELECT key FROM trials ORDER BY rowid")]
        kinds = ledger.kinds("measure", JUDGE)

    def facts(row: Any) -> tuple[object, ...]:
        return row.trial.condition, tuple(flags_of(row)), reason_of(row)

    expected = Counter(facts(row) for row in rows)
    counted: Counter[object] = Counter()
    for row, number in kinds:
        counted[facts(row)] += number
    assert counted == expected
    # each example is the first of its kind, and examples are in plan order: reasons that are equally frequent keep it
    places = {row.trial.key: n for n, row in enumerate(rows)}
    shown = [places[row.trial.key] for row, _ in kinds]
    assert shown == sorted(shown)
    by_key, firsts = {row.trial.key: row for row in rows}, dict[object, str]()
    for key in added:
        firsts.setdefault(facts(by_key[key]), key)
    assert set(firsts.values()) <= {row.trial.key for row, _ in kinds}


@pytest.mark.parametrize("seed", range(6))
def test_the_halves_of_a_condition_are_its_rows(tmp_path: Path, seed: int) -> None:
    with odd_ledger(tmp_path / "ledger.sqlite", seed) as ledger:
        halves = [list(ledger.verdicts(*PLACE, JUDGE, half)) for half in (0, 1)]
        rows = list(ledger.outlines(*PLACE, JUDGE))
        assert repr(halves[0] + halves[1]) == repr([verdict_of(row) for row in rows])  # nan differs from itself
        assert all(halves)
        parts = [list(ledger.outlines(*PLACE, JUDGE, half=half)) for half in (0, 1)]
        assert repr(parts[0] + parts[1]) == repr(rows)
        windows = [ledger.window_scores(JUDGE, *PLACE, half) for half in (0, 1)]
        assert windows[0] | windows[1] == ledger.window_scores(JUDGE, *PLACE)


@given(st.sets(st.integers(-(2**40), 2**40), min_size=1, max_size=5))
def test_each_trial_is_in_one_half(indices: set[int]) -> None:
    with Ledger(Path(":memory:")) as ledger:
        ledger.add_trials([planned(i) for i in indices])
        halves = [[v.pair for v in ledger.verdicts(*PLACE, JUDGE, half)] for half in (0, 1)]
    assert halves[0] + halves[1] == sorted(indices)


@pytest.mark.parametrize("seed", range(4))
def test_conditions_that_two_processes_read_have_the_outcomes_and_windows_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    places = {("model", c): LedgerPlace("model", "measure", c) for c in ("plain", "other", "absent")}
    with odd_ledger(tmp_path / "ledger.sqlite", seed) as ledger:
        whole = {c: outcomes_of(list(ledger.outlines("model", "measure", c, JUDGE)), True) for _, c in places}
        alone = read_conditions(ledger, JUDGE, places)
        prepared = read_conditions(ledger, JUDGE, places, list)
        monkeypatch.setattr(processes, "can_fork", lambda: True)
        monkeypatch.setattr(base, "MANY", 0)
        shared = read_conditions(ledger, JUDGE, places)
    for outcomes, recovered in (alone, prepared, shared):
        for key in places:
            for name, column in vars(whole[key[1]]).items():
                np.testing.assert_array_equal(getattr(outcomes[key], name), column)
        assert recovered == alone[1]
    assert alone[1]["model", "plain"] is not None
    assert alone[1]["model", "absent"] is None


def test_what_is_kept_of_a_ledger_follows_its_changes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger, Ledger(path) as other:
        assert (ledger.judges(), ledger.stage_sizes(), ledger.conditions()) == ([], {}, [])
        ledger.add_trials([planned(0)])
        assert ledger.stage_sizes() == {"measure": 1}
        other.add_trials([planned(1, condition="other")])
        assert (ledger.stage_sizes(), len(ledger.conditions())) == ({"measure": 2}, 2)
        other.add_completions([(planned(0).key, Completion("fine", (1,), 4, "stop", Receipt()), "engine")])
        other.add_judgements([(planned(0).key, Judgement(JUDGE, "r-1", "empty"))])
        assert ledger.judges() == other.judges() == [JUDGE]
        ledger.judges().append("nobody")
        assert ledger.judges() == [JUDGE]


def test_two_processes_write_the_page_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {name: scattered(6, 20, 0.4, seed) for seed, name in enumerate(("baseline", "other"))}
    place = make_run(tmp_path / "run", verdicts)
    again = make_run(tmp_path / "again", verdicts)
    few = view_job.ViewSettings(most_trials=130)

    def pages() -> list[bytes]:
        out = tmp_path / "view.html"
        return [write_view(*call).read_bytes() for call in (([place], out), ([place], out, few), ([place, again], out))]

    one = pages()
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    for module in (base, view_job, view_sample):
        monkeypatch.setattr(module, "MANY", 0)
    assert pages() == one
    with Run.read(place) as run:
        shown = [ShownRun(run, JUDGE)]
        _, _, chunks = view_sample.sampled(shown, STAGES, 5000, 10**9)
        assert len(chunks) == 10
        room = sum(map(len, chunks[:7])) + 10  # the second process reaches the limit
        shared = view_sample.sampled(shown, STAGES, 5000, room)
        monkeypatch.setattr(view_sample, "MANY", 10**6)
        assert view_sample.sampled(shown, STAGES, 5000, room) == shared
    assert 100 < len(shared[0].keys) < 7 * 25
