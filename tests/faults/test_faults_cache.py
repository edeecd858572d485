"""No run fails because of the cache: damaged values are computed again, and an unusable cache file is ignored."""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import ledger_of, scripted_job

from steerback.jobs import execute
from steerback.records import Attempt, Completion, Judgement, Receipt
from steerback.store.cache import Cache, KeptReply, note_once
from steerback.store.files import user_folder


@pytest.fixture
def lines() -> list[str]:
    note_once.cache_clear()
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[Any, ...]]]]:
    """A cache that one run has filled, and the run's ledger."""
    place = tmp_path_factory.mktemp("whole")
    cache = Cache(place / "cache.sqlite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "analyse", lambda *_: None)
        execute.run(scripted_job(), place / "run", cache=cache)
    cache.close()
    return place / "cache.sqlite", ledger_of(place / "run")


def copied(path: Path, to: Path) -> Path:
    with sqlite3.connect(path) as old, sqlite3.connect(to) as new:
        old.backup(new)
    old.close()
    new.close()
    return to


def run_with(path: Path, folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr(execute, "analyse", lambda *_: None)
    cache = Cache(path, lines.append)
    execute.run(scripted_job(), folder, cache=cache)
    cache.close()
    return cache


def unpacked(value: bytes) -> Any:
    return json.loads(zlib.decompress(value))


DAMAGES: dict[str, Callable[[bytes], object]] = {
    "cut": lambda value: value[: len(value) // 2],
    "flipped": lambda value: value[:-1] + bytes([value[-1] ^ 1]),
    "not compressed": lambda value: zlib.decompress(value),
    "no JSON": lambda _: zlib.compress(b'{"text": '),
    "deep JSON": lambda _: zlib.compress(b"[" * 100_000),
    "list": lambda _: zlib.compress(b"[]"),
    "no bytes": lambda _: 7,
    "text": lambda _: "text",
    "empty": lambda _: b"",
    "fields of another type": lambda value: zlib.compress(
        json.dumps({k: [v] for k, v in unpacked(value).items()}).encode()
    ),
    "a field less": lambda value: zlib.compress(json.dumps(dict(list(unpacked(value).items())[1:])).encode()),
}


def test_damaged_values_are_dropped_counted_and_asked_for_again(
    whole: tuple[Path, Any], tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(whole[0], tmp_path / "cache.sqlite")
    with sqlite3.connect(path) as db:
        entries = db.execute("SELECT key, value FROM entries ORDER BY key").fetchall()
        damaged = list(zip(entries[::3], list(DAMAGES.values()) * len(entries), strict=False))
        assert len(damaged) > len(DAMAGES)
        for (key, value), damage in damaged:
            db.execute("UPDATE entries SET value = ? WHERE key = ?", (damage(value), key))
        db.execute("UPDATE entries SET value = CAST(x'ff80' AS TEXT) WHERE key = ?", (entries[1][0],))
    db.close()
    cache = run_with(path, tmp_path / "run", lines, monkeypatch)
    assert ledger_of(tmp_path / "run") == whole[1]
    assert cache.damaged == len(damaged) + 1
    assert lines == [f"cache {path}: {len(damaged) + 1} damaged values were dropped and computed again"]
    again: list[str] = []
    assert run_with(path, tmp_path / "again", again, monkeypatch).damaged == 0  # the new values were kept
    assert again == []


@pytest.mark.parametrize("blob", [b"", b"short", np.asarray((2, 3), "<i8").tobytes() + zlib.compress(b"abcd"), 3.5])
def test_damaged_activations_are_damage_of_the_value(tmp_path: Path, blob: object) -> None:
    cache = Cache(tmp_path / "c.sqlite", print)
    done = Completion("a", (1,), 1, "stop", Receipt(1, 0, 0.5), np.ones((1, 2), np.float32))
    cache.put_completions({"a": done, "b": done})
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        db.execute("UPDATE entries SET activations = ? WHERE key = 'a'", (blob,))
    db.close()
    assert list(cache.completions(["a", "b"])) == ["b"]
    assert cache.damaged == 1
    cache.close()


def test_values_of_another_kind_and_lone_surrogates(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite", print)
    judged = Judgement("j", "r", "scored", (Attempt(0, 3, 50.0),), raw="half \ud800")
    cache.put_judgements({"j": judged})
    cache.put_replies({"r": KeptReply("half \udc00", "0a", 1)})
    assert cache.judgements(["j"]) == {"j": judged}
    assert cache.replies(["r"]) == {"r": KeptReply("half \udc00", "0a", 1)}
    assert cache.completions(["j"]) == {}
    assert cache.judgements(["r"]) == {}
    assert cache.damaged == 2
    cache.close()


def not_sqlite(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def another_program(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()


def without_its_table(path: Path) -> None:
    Cache(path).close()
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE entries")
        db.execute("CREATE TABLE x (y)")
    db.close()


def torn(path: Path) -> None:
    """A database whose pages are damaged behind its header."""
    cache = Cache(path)
    cache.put_replies({f"{n}": KeptReply("x" * 500, "0a", n) for n in range(200)})
    cache.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "moved"),
    [(not_sqlite, True), (without_its_table, True), (torn, True), (another_program, False), (Path.mkdir, False)],
)
def test_a_cache_that_is_none_is_left_out_with_one_line(
    whole: tuple[Path, Any],
    tmp_path: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    moved: bool,
) -> None:
    path = tmp_path / "cache.sqlite"
    make(path)
    run_with(path, tmp_path / "run", lines, monkeypatch)
    assert ledger_of(tmp_path / "run") == whole[1]
    assert len(lines) == 1
    assert "the run continues without the cache" in lines[0]
    assert (tmp_path / "cache.sqlite.damaged").exists() == moved
    assert path.exists() != moved
    if moved:  # the next run begins a new one
        again: list[str] = []
        run_with(path, tmp_path / "again", again, monkeypatch)
        assert again == []
        assert path.is_file()


def test_a_cache_that_fails_in_the_middle_is_left_out(
    whole: tuple[Path, Any], tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(whole[0], tmp_path / "cache.sqlite")
    cache = Cache(path, lines.append)
    assert cache._db is not None
    cache._db.execute("PRAGMA max_page_count = 1")  # as on a full disk
    cache._db.execute("DELETE FROM entries WHERE length(value) % 2")
    monkeypatch.setattr(execute, "analyse", lambda *_: None)
    execute.run(scripted_job(), tmp_path / "run", cache=cache)
    cache.close()
    assert ledger_of(tmp_path / "run") == whole[1]
    assert len(lines) <= 1


def test_the_line_is_printed_once_by_those_who_open_it_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str]
) -> None:
    another_program(tmp_path / "c.sqlite")
    for _ in range(3):
        Cache(tmp_path / "c.sqlite").close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "continues without the cache" in said


def test_the_command_line_goes_on_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path))
    user_folder("cache.sqlite").write_bytes(b"no database" * 300)
    with execute.tools() as (_, cache):
        assert cache is not None
        assert cache.completions(["a"]) == {}
    assert "the run continues without the cache" in capsys.readouterr().err
