"""Ledgers that are large, shared by several processes, or of another schema version."""

from __future__ import annotations

import functools
import gzip
import multiprocessing
import os
import shutil
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerback.analysis import base
from steerback.analysis.base import outcomes_of
from steerback.analysis.labels import LedgerPlace
from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.jobs.estimate import judging_line, windows_line
from steerback.jobs.grading import Grader
from steerback.jobs.judging import to_judge
from steerback.judging import make_judge
from steerback.metrics import Outcomes
from steerback.published import exports
from steerback.records import Attempt, Completion, Intervention, Judgement, Receipt, Trial, is_degraded
from steerback.report import export
from steerback.report.export import export_flat
from steerback.report.transcripts import Choice, choose
from steerback.report.view import page
from steerback.report.view_trials import ShownRun
from steerback.store import processes
from steerback.store.cache import Cache
from steerback.store.files import make_folder
from steerback.store.ledger import Ledger
from steerback.store.processes import second_process, write_by_two
from steerback.store.run import Run

OLD = Path(__file__).parent / "data" / "ledgers-0.1" / "traces.sqlite.gz"
OPERATIONS, ROWS = 1000, 1000
TEXT = ("stone falls slowly in the water of the lake, " * 30 + "so it is. ") * 3


def trial(name: str, index: int, condition: str = "baseline") -> Trial:
    edits = (Intervention("add", index % 20, 10.0),)
    key = f"{name}/measure/{condition}/{index}"
    return Trial(key, name, "measure", condition, index, "Why?", index, index % 20, interventions=edits)


def answer(text: str, tokens: int) -> Completion:
    return Completion(text, tuple(range(1000, 1000 + tokens)), 5, "stop", Receipt(5, tokens - 1, 1.0))


def verdict(index: int) -> Judgement:
    attempts = (Attempt(0, 20, 30.0), Attempt(20, 40, float(index % 100), "Wait"))[: 1 + (index % 5 == 0)]
    return Judgement("machine", "attempts-1", "scored", attempts, raw="because " * 50)


def write_ledger(path: Path, name: str) -> None:
    """Write trials one by one, each operation in a transaction of its own."""
    with Ledger(path) as ledger:
        for i in range(OPERATIONS):
            ledger.add_trials([trial(name, i), trial("both", i)])
            done = [
                (key, answer(f"{key} by {name}", 3), "engine") for key in (trial(name, i).key, trial("both", i).key)
            ]
            ledger.add_completions(done)
            ledger.add_judgements((key, verdict(i)) for key, _, _ in done)


def read_ledger(path: Path, name: str) -> None:
    """Read a growing ledger; it never shrinks, and no verdict is there without its response."""
    before = 0
    with Ledger(path, read_only=True) as ledger:
        for i in range(OPERATIONS):
            assert len(ledger.without_response([trial("both", i).key])) <= 1
            if i % 100 == 0:
                rows = [r for r in ledger.outlines(judge="machine") if r.finish is not None]
                assert len(rows) >= before
                assert all(r.valid_receipt for r in rows)
                before = len(rows)


def write_cache(path: Path, name: str) -> None:
    cache = Cache(path)
    for i in range(OPERATIONS):
        cache.put_completions({f"both {i}": answer(f"both {i}", 3), f"{name} {i}": answer(f"{name} {i}", 3)})
        assert cache.completions([f"{name} {i}"])
    cache.close()


def start_run(folder: Path, name: str) -> None:
    """Add trials one by one to a run that another process opens as well; one of the two waits for its turn."""
    config = RunConfig(experiment="imported", targets=("both",), judge="machine", engine="scripted")
    left = [trial(name, i) for i in range(OPERATIONS)]
    while left:
        try:
            with Run.start(folder, config) as run:
                for _ in range(100):
                    run.ledger.add_trials([left.pop()])
        except SteerbackError as error:
            if "is in use by process" not in str(error):
                raise


def together(path: Path, *work: tuple[Callable[[Path, str], None], str]) -> None:
    context = multiprocessing.get_context("forkserver")  # imports this module once, not once in each process
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=does, args=(path, name)) for does, name in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0] * len(processes)


def test_two_writers_and_a_reader_of_one_ledger_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    together(path, (write_ledger, "a"), (write_ledger, "b"), (read_ledger, ""))
    with Ledger(path, read_only=True) as ledger:
        rows = ledger.rows(judge="machine")
        assert len(rows) == 3 * OPERATIONS
        assert all(r.completion is not None and r.judgement == verdict(r.trial.index) for r in rows)
        assert {r.completion.text.rpartition(" by ")[0] for r in rows if r.completion} == {r.trial.key for r in rows}


def test_two_processes_of_one_cache_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    together(path, (write_cache, "a"), (write_cache, "b"))
    cache = Cache(path)
    known = cache.completions([f"{name} {i}" for name in ("a", "b", "both") for i in range(OPERATIONS)])
    cache.close()
    assert len(known) == 3 * OPERATIONS
    assert all(done.text == key for key, done in known.items())


def test_two_processes_create_one_cache_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = iter([True, True, False])

    class Second(sqlite3.Connection):
        """A connection that SQLite refuses at once, because another process switches the file to WAL mode as well."""

        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            if "journal_mode" in statement and next(refused):
                raise sqlite3.OperationalError("database is locked")
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Second))
    cache = Cache(tmp_path / "cache.sqlite", pytest.fail)
    cache.put_completions({"key": answer("text", 3)})
    assert cache.completions(["key"])
    cache.close()


def test_two_processes_of_one_run_take_turns_and_lose_nothing(tmp_path: Path) -> None:
    together(tmp_path / "run", (start_run, "a"), (start_run, "b"))
    with Run.read(tmp_path / "run") as run:
        assert run.ledger.stage_sizes() == {"measure": 2 * OPERATIONS}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose responses take 4 MB and whose token ids take 30 MB as Python objects."""
    config = RunConfig(experiment="imported", targets=("model",), judge="machine", engine="scripted", draws=100)
    trials = [trial("model", i, condition) for condition in ("baseline", "other") for i in range(ROWS // 2)]
    with Run.start(tmp_path_factory.mktemp("large") / "run", config) as run:
        run.ledger.add_trials(trials)
        run.ledger.add_completions((t.key, answer(TEXT, 800), "engine") for t in trials)
        run.ledger.add_judgements((t.key, verdict(t.index)) for t in trials)
        yield run


def peak(work: Callable[[], object]) -> float:
    """Return the peak memory of a call in MB."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("verb", ["analysis", "show", "csv", "parquet", "authors", "view"])
def test_memory_does_not_grow_with_the_texts_of_a_ledger(large: Run, tmp_path: Path, verb: str) -> None:
    ledger = large.ledger
    work: dict[str, Callable[[], object]] = {
        "analysis": lambda: outcomes_of([*ledger.outlines(judge="machine")], True),
        "show": lambda: choose(ledger, "machine", Choice(count=3)),
        "csv": lambda: export_flat(ledger, tmp_path / "trials.csv", "machine", "csv"),
        "parquet": lambda: export_flat(ledger, tmp_path / "trials.parquet", "machine", "parquet"),
        "authors": lambda: exports.export_authors(large, tmp_path, "machine"),
        "view": lambda: page([ShownRun(large, "machine")], limit=100),
    }
    work[verb]()  # imports are no part of it
    assert peak(work[verb]) < 8


@pytest.mark.parametrize("rubric", ["attempts", "windows", "whole", "boundaries"])
def test_memory_of_judging_does_not_grow_with_the_texts_of_a_ledger(large: Run, rubric: str) -> None:
    pytest.importorskip("inspect_ai")
    judge = make_judge("mockllm/model")
    work: dict[str, Callable[[], object]] = {
        "attempts": lambda: judging_line(to_judge(large, judge)),
        "windows": lambda: windows_line(large, judge, False),
        "whole": lambda: Grader("mockllm/model", "whole").todo(large),
        "boundaries": lambda: Grader("offline", "boundaries").todo(large),
    }
    work[rubric]()  # imports are no part of it
    assert peak(work[rubric]) < 15


def test_an_outline_is_its_row_without_texts(large: Run) -> None:
    for row, outline in zip(large.ledger.rows(judge="machine"), large.ledger.outlines(judge="machine"), strict=True):
        assert row.completion is not None
        assert row.judgement is not None
        assert (outline.trial, outline.finish, outline.tokens) == (row.trial, "stop", len(row.completion.token_ids))
        assert (outline.valid_receipt, outline.degraded) == (row.valid_receipt, row.degraded)
        assert outline.judgement == replace(row.judgement, raw="")
        assert outline.attempts == row.attempts


@given(st.lists(st.sampled_from(["aa", "b"]), max_size=12))
def test_degraded_by_counting(words: list[str]) -> None:
    assert is_degraded(" ".join(words)) == any(set(words[i : i + 5]) == {"aa"} for i in range(len(words) - 4))


def test_a_ledger_of_an_older_schema_is_migrated_and_a_copy_is_kept(tmp_path: Path) -> None:
    path, copy = tmp_path / "ledger.sqlite", tmp_path / "ledger.v1.sqlite"
    path.write_bytes(gzip.decompress(OLD.read_bytes()))
    with closing(sqlite3.connect(path)) as old:
        before = {table: old.execute(f"SELECT * FROM {table}").fetchall() for table in ("trials", "completions")}
    with Ledger(path, read_only=True) as ledger:
        rows, outlines = ledger.rows(), list(ledger.outlines())
        assert [(o.finish, o.valid_receipt, o.degraded) for o in outlines] == [
            (r.finish, r.valid_receipt, r.degraded) for r in rows
        ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.sqlite", "ledger.v1.sqlite"]
    for file, version in ((path, 2), (copy, 1)):
        with closing(sqlite3.connect(file)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (version,)
            assert {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in before} == before


def test_a_response_of_an_older_process_after_migration_is_not_overlooked(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add_trials([trial("a", 0)])
        ledger.add_completions([(trial("a", 0).key, answer("x", 3), "engine")])
    with closing(sqlite3.connect(path)) as old:
        old.execute("DELETE FROM outlines")
        old.commit()
    with Ledger(path) as ledger:
        assert [row.valid_receipt for row in ledger.outlines()] == [True]


def test_work_beside_this_process_returns_its_result_or_raises_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "can_fork", lambda: True)

    def broken() -> None:
        raise SteerbackError(f"broken in {os.getpid()}")

    assert second_process(os.getpid)() != os.getpid()
    assert second_process(os.getpid, worth=False)() == os.getpid()
    with pytest.raises(SteerbackError, match=f"broken in {os.getpid()}"):
        second_process(broken)()


def test_what_two_processes_write_is_in_order_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, whole = os.getpid(), b"".join(b"%d," % n for n in range(7))

    def parts(items: Sequence[int]) -> Iterator[bytes]:
        for n in items:
            if n == lost and os.getpid() != mine:
                os._exit(3)
            yield b"%d," % n

    for forks, n_lost in ((False, -1), (True, -1), (True, 5)):
        lost = n_lost
        monkeypatch.setattr(processes, "can_fork", lambda forks=forks: forks)
        with (tmp_path / "x").open("wb") as file:
            write_by_two(file, tmp_path, parts, range(7), worth=True)
        assert (tmp_path / "x").read_bytes() == whole
        assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("change", ["completions SET token_ids = '[1; 2]'", "trials SET interventions = '[{'"])
def test_damaged_values_are_not_exported(tmp_path: Path, large: Run, change: str) -> None:
    folder = shutil.copytree(large.folder, tmp_path / "run")
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
        db.execute(f"UPDATE {change} WHERE rowid = 1")
        db.commit()
    with Run.read(folder) as run, pytest.raises(SteerbackError, match="damaged value"):
        exports.export_authors(run, tmp_path / "out", "machine")
    assert [*(tmp_path / "out").iterdir()] == []


def test_two_processes_give_the_results_of_one(large: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {("model", name): LedgerPlace("model", "measure", name) for name in ("baseline", "other")}

    def results(name: str) -> tuple[dict[str, bytes], list[Outcomes]]:
        folder = make_folder(tmp_path / name)
        export_flat(large.ledger, folder / "trials.csv", "machine", "csv")
        paths = exports.export_authors(large, folder, "machine")
        assert [path.stem for path in paths][:2] == [f"experiment_results_model_{c}" for c in ("baseline", "other")]
        files = {path.name: path.read_bytes() for path in folder.iterdir()}  # no part is left
        return files, [*base.read_conditions(large.ledger, "machine", places)[0].values()]

    files, outcomes = results("one")
    assert len(files) == 4
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    for module in (base, export, exports):
        monkeypatch.setattr(module, "MANY", 0)
    again, others = results("two")
    assert again == files
    for one, other in zip(outcomes, others, strict=True):
        assert all(np.array_equal(x, getattr(other, name), equal_nan=True) for name, x in vars(one).items())
