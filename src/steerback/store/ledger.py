"""The ledger: one SQLite file that holds everything a run planned, generated and judged.

It stores and returns records; it knows no engine, no judge and no statistics. Rows are written once, in one
transaction a batch, so a run killed at any moment loses at most what had not been committed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from steerback.errors import SteerbackError
from steerback.records import Completion, Judgement, Trial, WindowScores, is_degraded
from steerback.store.database import dump_json, now, open_database, placeholders, reading, sqlite_errors, storable
from steerback.store.facts import CONFIG, Fact
from steerback.store.rows import (
    COMPLETION,
    JUDGEMENT,
    OUTLINE,
    TRIAL,
    Outline,
    completion_values,
    prefix_values,
    read_outline,
    read_row,
    read_trial,
    trial_values,
)
from steerback.store.rows import Row as Row

T = TypeVar("T")

APPLICATION_ID = 0x53544252  # "STBR": marks our files, so that a foreign database is recognised
SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE facts (target TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (target, name));
CREATE TABLE trials (
    key TEXT PRIMARY KEY, target TEXT NOT NULL, stage TEXT NOT NULL, condition TEXT NOT NULL, idx INTEGER NOT NULL,
    latent TEXT, label TEXT, boost REAL, prompt TEXT NOT NULL, meta_prompt TEXT NOT NULL, prefill TEXT NOT NULL,
    seed INTEGER NOT NULL, interventions TEXT NOT NULL, record TEXT);
CREATE INDEX trials_by_stage ON trials (target, stage, condition, idx);
CREATE TABLE completions (
    trial TEXT PRIMARY KEY REFERENCES trials (key), text TEXT NOT NULL, token_ids TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, finish TEXT NOT NULL, prompt_positions INTEGER NOT NULL,
    generated_positions INTEGER NOT NULL, added_norm REAL NOT NULL, activations BLOB, engine TEXT NOT NULL, at TEXT);
CREATE TABLE judgements (
    trial TEXT NOT NULL REFERENCES trials (key), judge TEXT NOT NULL, rubric TEXT NOT NULL, status TEXT NOT NULL,
    attempts TEXT NOT NULL, reason TEXT NOT NULL, raw TEXT NOT NULL, at TEXT, PRIMARY KEY (trial, judge));
"""
WINDOWS = """
CREATE TABLE IF NOT EXISTS windows (
    trial TEXT NOT NULL REFERENCES trials (key), judge TEXT NOT NULL, rubric TEXT NOT NULL, starts TEXT NOT NULL,
    scores TEXT NOT NULL, reason TEXT NOT NULL, raw TEXT NOT NULL, at TEXT, PRIMARY KEY (trial, judge))
"""
"""Made when the first window is scored: ledgers of 0.1 have no such table."""
PREFIXES = """
CREATE TABLE IF NOT EXISTS prefixes (
    trial TEXT PRIMARY KEY REFERENCES trials (key), text TEXT NOT NULL, token_ids TEXT NOT NULL)
"""
"""Made when the first response is continued from its tokens."""
OUTLINES = """
CREATE TABLE outlines (
    trial TEXT PRIMARY KEY REFERENCES completions (trial), finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    tokens INTEGER NOT NULL, prompt_positions INTEGER NOT NULL, generated_positions INTEGER NOT NULL,
    degraded INTEGER NOT NULL) WITHOUT ROWID
"""
"""What metrics need of each completion, so that they read no texts. Derived: it holds nothing of its own."""
TABLES = ("facts", "trials", "prefixes", "completions", "judgements", "windows")
ORDER = "ORDER BY t.target, t.stage, t.condition, t.idx"
BATCH = 200
"""Rows with texts that `Ledger.stream` holds at a time."""


class Ledger:
    """One run's database. Usable as a context manager."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self._db: sqlite3.Connection = open_database(
            path, f"{SCHEMA};{OUTLINES}", APPLICATION_ID, SCHEMA_VERSION, read_only, _migrate
        )
        self._complete_outlines()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _complete_outlines(self) -> None:
        """Outline the completions that a process of an older version added after this ledger was migrated."""
        with sqlite_errors(self.path):
            query = "SELECT (SELECT count(*) FROM completions) - (SELECT count(*) FROM outlines)"
            missing = self._db.execute(query).fetchone()[0]
        if missing:
            with self._transaction() as db:
                _outline(db)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def put(self, target: str, fact: Fact[T], value: T) -> None:
        """Store a fact of a target; `target` "" is the run itself."""
        self.put_json(target, fact.name, fact.dump(value))

    def get(self, target: str, fact: Fact[T]) -> T | None:
        """The stored fact, or None. Raises SteerbackError if it has another form than the fact's type."""
        with reading(self.path):
            query = "SELECT value FROM facts WHERE target = ? AND name = ?"
            row = self._db.execute(query, (target, fact.name)).fetchone()
            return None if row is None else fact.load(json.loads(row[0]), f"{self.path}, target {target!r}")

    def put_json(self, target: str, name: str, value: JsonValue) -> None:
        """Store a fact that is copied from another ledger or file, in its JSON form."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (target, name, dump_json(value)))

    def facts(self) -> list[tuple[str, str, JsonValue]]:
        """Every stored fact: (target, name, JSON form)."""
        with reading(self.path):
            stored = self._db.execute("SELECT target, name, value FROM facts ORDER BY 1, 2").fetchall()
            return [(target, name, json.loads(value)) for target, name, value in stored]

    def targets_with(self, fact: Fact[T]) -> dict[str, T]:
        """Every target that has a fact, with its value, in the order of the run's config, others after it."""
        config = self.get("", CONFIG) or {}
        listed = config.get("targets")
        order = [str(name) for name in listed] if isinstance(listed, list) else []
        having = [target for target, name, _ in self.facts() if name == fact.name]
        having.sort(key=lambda name: order.index(name) if name in order else len(order))
        return {target: value for target in having if (value := self.get(target, fact)) is not None}

    @property
    def includes_degraded(self) -> bool:
        """Whether degraded responses count in the run's headline."""
        return (self.get("", CONFIG) or {}).get("degraded") != "exclude"

    def engines(self) -> dict[str, str]:
        """Fingerprint of the engine that gave each completion, by trial key."""
        with sqlite_errors(self.path):
            return dict(self._db.execute("SELECT trial, engine FROM completions"))

    def add_trials(self, trials: Sequence[Trial]) -> None:
        """Plans trials. A key that is already there must hold the same trial: plans never change under a run."""
        rows = [trial_values(t) for t in trials]
        with self._transaction() as db:
            before = db.total_changes
            db.executemany(f"INSERT OR IGNORE INTO trials VALUES ({placeholders(14)})", rows)
            fresh = db.total_changes - before == len(trials)
            continued = {t.key: values for t in trials if (values := prefix_values(t)) is not None}
            if continued:
                db.execute(PREFIXES)
                db.executemany(f"INSERT OR IGNORE INTO prefixes VALUES ({placeholders(3)})", continued.values())
            if fresh:
                return
            for row in rows:
                key, start = row[:1], None
                stored = db.execute("SELECT * FROM trials WHERE key = ?", key).fetchone()
                if continued:
                    start = db.execute("SELECT * FROM prefixes WHERE trial = ?", key).fetchone()
                if stored != row or start != continued.get(row[0]):
                    raise SteerbackError(
                        f"{self.path}: trial {row[0]} was planned differently when this run was started "
                        "(another version of steerback or of the target); start a new run with another --name"
                    )

    def add_completions(self, done: Iterable[tuple[str, Completion, str]]) -> None:
        """(trial key, completion, engine fingerprint); a trial that has a completion keeps it."""
        rows = [completion_values(key, completion, engine) for key, completion, engine in done]
        with self._transaction() as db:
            db.executemany(f"INSERT OR IGNORE INTO completions VALUES ({placeholders(11)})", rows)
            _outline(db, [row[0] for row in rows])

    def completed(self, keys: Iterable[str]) -> set[str]:
        """Those of the trials that have a completion."""
        query = "SELECT trial FROM outlines WHERE trial IN (SELECT value FROM json_each(?))"
        return self._among(query, keys)

    def judged(self, judge: str, keys: Iterable[str]) -> set[str]:
        """Those of the trials about which a judge has a verdict."""
        query = "SELECT trial FROM judgements WHERE trial IN (SELECT value FROM json_each(?)) AND judge = ?"
        return self._among(query, keys, judge)

    def _among(self, query: str, keys: Iterable[str], *values: str) -> set[str]:
        with sqlite_errors(self.path):
            return {key for (key,) in self._db.execute(query, (dump_json(list(keys)), *values))}

    def add_judgements(self, judged: Iterable[tuple[str, Judgement]]) -> None:
        """(trial key, judgement); an unscored one is replaced, any other is kept."""
        rows = [
            (
                key,
                j.judge,
                j.rubric,
                j.status,
                storable(dump_json([asdict(a) for a in j.attempts])),
                storable(j.reason),
                storable(j.raw),
                now(),
            )
            for key, j in judged
        ]
        with self._transaction() as db:
            db.executemany(
                f"INSERT INTO judgements VALUES ({placeholders(8)}) ON CONFLICT (trial, judge) DO UPDATE SET "
                "rubric = excluded.rubric, status = excluded.status, attempts = excluded.attempts, "
                "reason = excluded.reason, raw = excluded.raw, at = excluded.at WHERE judgements.status = 'unscored'",
                rows,
            )

    def add_windows(self, scored: Iterable[tuple[str, WindowScores]]) -> None:
        """(trial key, scores of its windows); one without scores is replaced, any other is kept."""
        rows = [
            (
                key,
                w.judge,
                w.rubric,
                dump_json(w.starts),
                dump_json(w.scores),
                storable(w.reason),
                storable(w.raw),
                now(),
            )
            for key, w in scored
        ]
        with self._transaction() as db:
            db.execute(WINDOWS)
            db.executemany(
                f"INSERT INTO windows VALUES ({placeholders(8)}) ON CONFLICT (trial, judge) DO UPDATE SET "
                "rubric = excluded.rubric, starts = excluded.starts, scores = excluded.scores, "
                "reason = excluded.reason, raw = excluded.raw, at = excluded.at WHERE windows.reason != ''",
                rows,
            )

    def windows(self, judge: str, keys: Sequence[str] | None = None) -> dict[str, WindowScores]:
        """A judge's scores of the windows of responses, by trial key."""
        if not self._has("windows"):
            return {}
        where, values = _where(None, None, None, keys)
        query = (
            "SELECT w.trial, w.judge, w.rubric, w.starts, w.scores, w.reason, w.raw FROM trials t "
            f"JOIN windows w ON w.trial = t.key AND w.judge = ? WHERE {where}"
        )
        with reading(self.path):
            return {
                key: WindowScores(by, rubric, tuple(json.loads(starts)), tuple(json.loads(scores)), reason, raw)
                for key, by, rubric, starts, scores, reason, raw in self._db.execute(query, (judge, *values))
            }

    def window_scores(
        self, judge: str, target: str | None = None, stage: str | None = None, condition: str | None = None
    ) -> dict[str, list[float]]:
        """The scores alone, by trial key; an empty list where the judge gave a reason instead."""
        if not self._has("windows"):
            return {}
        where, values = _where(target, stage, condition, None)
        query = (
            f"SELECT w.trial, w.scores FROM trials t JOIN windows w ON w.trial = t.key AND w.judge = ? WHERE {where}"
        )
        with reading(self.path):
            return {key: json.loads(scores) for key, scores in self._db.execute(query, (judge, *values))}

    def _trials(self) -> tuple[str, str]:
        """Return the columns of a trial and its prefix, and the tables that give them."""
        if self._has("prefixes"):
            return f"{TRIAL}, p.text, p.token_ids", "trials t LEFT JOIN prefixes p ON p.trial = t.key"
        return f"{TRIAL}, NULL, NULL", "trials t"

    def _has(self, table: str) -> bool:
        with sqlite_errors(self.path):
            query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
            return self._db.execute(query, (table,)).fetchone() is not None

    def rows(
        self,
        target: str | None = None,
        stage: str | None = None,
        condition: str | None = None,
        judge: str | None = None,
        keys: Sequence[str] | None = None,
        activations: bool = False,
    ) -> list[Row]:
        """Trials in plan order with completion and `judge`'s judgement where there are any.

        Texts and token ids take about 15 kB a row: for many trials take `stream` or `outlines`.
        """
        where, values = _where(target, stage, condition, keys)
        blob = "c.activations" if activations else "NULL"
        columns, tables = self._trials()
        query = (
            f"SELECT {columns}, {COMPLETION}, {blob}, {JUDGEMENT}, j.raw FROM {tables} "
            "LEFT JOIN completions c ON c.trial = t.key LEFT JOIN judgements j ON j.trial = t.key AND j.judge = ? "
            f"WHERE {where} {ORDER}"
        )
        with reading(self.path):
            return [read_row(found) for found in self._db.execute(query, (judge, *values))]

    def stream(self, keys: Iterable[str], judge: str | None = None, activations: bool = False) -> Iterator[Row]:
        """Yield the rows of trials in the order of their keys, `BATCH` at a time in memory."""
        waiting = iter(keys)
        while some := list(islice(waiting, BATCH)):
            rows = {r.trial.key: r for r in self.rows(keys=some, judge=judge, activations=activations)}
            yield from (rows[key] for key in some)

    def outlines(
        self,
        target: str | None = None,
        stage: str | None = None,
        condition: str | None = None,
        judge: str | None = None,
        keys: Sequence[str] | None = None,
    ) -> Iterator[Outline]:
        """Yield the trials in plan order without texts: what metrics read."""
        where, values = _where(target, stage, condition, keys)
        columns, tables = self._trials()
        query = (
            f"SELECT {columns}, {OUTLINE}, {JUDGEMENT} FROM {tables} LEFT JOIN outlines o ON o.trial = t.key "
            f"LEFT JOIN judgements j ON j.trial = t.key AND j.judge = ? WHERE {where} {ORDER}"
        )
        with reading(self.path):
            for found in self._db.execute(query, (judge, *values)):
                yield read_outline(found)

    def responses(self, outlines: Iterable[Outline]) -> Iterator[tuple[Outline, str | None]]:
        """Yield each outline with the text of its response (None: there is none yet), `BATCH` texts at a time."""
        query = "SELECT trial, text FROM completions WHERE trial IN (SELECT value FROM json_each(?))"
        waiting = iter(outlines)
        while some := list(islice(waiting, BATCH)):
            with sqlite_errors(self.path):
                texts = dict(self._db.execute(query, (dump_json([o.trial.key for o in some]),)))
            yield from ((outline, texts.get(outline.trial.key)) for outline in some)

    def trials(self, stages: Sequence[str]) -> Iterator[Trial]:
        """Yield the planned trials of some stages in the order of `rows`, one at a time."""
        marks = placeholders(len(stages))
        columns, tables = self._trials()
        query = f"SELECT {columns} FROM {tables} WHERE t.stage IN ({marks}) {ORDER}"
        with sqlite_errors(self.path):
            for stored in self._db.execute(query, list(stages)):
                yield read_trial(stored)

    def stage_sizes(self) -> dict[str, int]:
        """Number of planned trials of each stage."""
        with sqlite_errors(self.path):
            return {r[0]: r[1] for r in self._db.execute("SELECT stage, count(*) FROM trials GROUP BY 1 ORDER BY 1")}

    def judges(self) -> list[str]:
        """Names of the judges that have judged anything here."""
        with sqlite_errors(self.path):
            return [r[0] for r in self._db.execute("SELECT DISTINCT judge FROM judgements ORDER BY judge")]

    def stages(self) -> list[tuple[str, str]]:
        """(target, stage) pairs that have trials, in the order in which they were planned."""
        with sqlite_errors(self.path):
            found = self._db.execute("SELECT target, stage FROM trials GROUP BY 1, 2 ORDER BY min(rowid)")
            return [(r[0], r[1]) for r in found]

    def conditions(self, stage: str = "measure") -> list[tuple[str, str]]:
        """(target, condition) pairs of a stage, in the order in which they were planned."""
        query = "SELECT target, condition FROM trials WHERE stage = ? GROUP BY 1, 2 ORDER BY min(rowid)"
        with sqlite_errors(self.path):
            return [(r[0], r[1]) for r in self._db.execute(query, (stage,))]

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table in key order, without timestamps: what two equal runs have in common."""
        tables = {}
        with sqlite_errors(self.path):
            for table in filter(self._has, TABLES):
                columns = [r[1] for r in self._db.execute(f"PRAGMA table_info({table})") if r[1] != "at"]
                query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1, 2"
                tables[table] = [tuple(r) for r in self._db.execute(query)]
        return tables


def _where(
    target: str | None, stage: str | None, condition: str | None, keys: Sequence[str] | None
) -> tuple[str, list[str]]:
    chosen = {"t.target": target, "t.stage": stage, "t.condition": condition}
    where = ["1", *(f"{column} = ?" for column, value in chosen.items() if value is not None)]
    values = [value for value in chosen.values() if value is not None]
    if keys is not None:
        where.append("t.key IN (SELECT value FROM json_each(?))")
        values.append(dump_json(list(keys)))
    return " AND ".join(where), values


def _outline(db: sqlite3.Connection, trials: Sequence[str] | None = None) -> None:
    """Fill the table `outlines` for the completions of some trials, or for all that lack an outline."""
    db.create_function("tokens", 1, lambda ids: len(json.loads(ids)), deterministic=True)
    db.create_function("degraded", 1, is_degraded, deterministic=True)
    chosen = "SELECT value FROM json_each(?)"
    if trials is None:
        chosen = "SELECT trial FROM completions EXCEPT SELECT trial FROM outlines"
    db.execute(
        "INSERT OR IGNORE INTO outlines SELECT trial, finish, prompt_tokens, tokens(token_ids), prompt_positions, "
        f"generated_positions, degraded(text) FROM completions WHERE trial IN ({chosen})",
        () if trials is None else (dump_json(list(trials)),),
    )


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Bring a ledger of an older schema version to the present one."""
    if version < 2:
        db.execute(OUTLINES)
        _outline(db)
