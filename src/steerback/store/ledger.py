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
from pathlib import Path
from typing import Any, TypeVar

from pydantic import JsonValue

from steerback.errors import SteerbackError
from steerback.records import Completion, Judgement, Trial, WindowScores
from steerback.store.database import dump_json, now, open_database, placeholders, sqlite_errors, storable
from steerback.store.facts import CONFIG, Fact
from steerback.store.rows import Row as Row
from steerback.store.rows import completion_values, prefix_values, row_of, trial_of, trial_values

T = TypeVar("T")

APPLICATION_ID = 0x53544252  # "STBR": marks our files, so that a foreign database is recognised
SCHEMA_VERSION = 1
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
TABLES = ("facts", "trials", "prefixes", "completions", "judgements", "windows")


class Ledger:
    """One run's database. Usable as a context manager."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self._db: sqlite3.Connection = open_database(path, SCHEMA, APPLICATION_ID, SCHEMA_VERSION, read_only)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

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
        with sqlite_errors(self.path):
            query = "SELECT value FROM facts WHERE target = ? AND name = ?"
            row = self._db.execute(query, (target, fact.name)).fetchone()
        return None if row is None else fact.load(json.loads(row[0]), f"{self.path}, target {target!r}")

    def put_json(self, target: str, name: str, value: JsonValue) -> None:
        """Store a fact that is copied from another ledger or file, in its JSON form."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (target, name, dump_json(value)))

    def facts(self) -> list[tuple[str, str, JsonValue]]:
        """Every stored fact: (target, name, JSON form)."""
        with sqlite_errors(self.path):
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

    def engines(self) -> dict[str, str]:
        """Fingerprint of the engine that gave each completion, by trial key."""
        with sqlite_errors(self.path):
            return dict(self._db.execute("SELECT trial, engine FROM completions"))

    def add_trials(self, trials: Sequence[Trial]) -> None:
        """Plans trials. A key that is already there must hold the same trial: plans never change under a run."""
        with self._transaction() as db:
            before = db.total_changes
            db.executemany(f"INSERT OR IGNORE INTO trials VALUES ({placeholders(14)})", map(trial_values, trials))
            fresh = db.total_changes - before == len(trials)
            continued = [values for trial in trials if (values := prefix_values(trial)) is not None]
            if continued:
                db.execute(PREFIXES)
                db.executemany(f"INSERT OR IGNORE INTO prefixes VALUES ({placeholders(3)})", continued)
            if fresh:
                return
            for trial in trials:
                row = db.execute("SELECT * FROM trials WHERE key = ?", (trial.key,)).fetchone()
                start = (
                    db.execute("SELECT * FROM prefixes WHERE trial = ?", (trial.key,)).fetchone() if continued else None
                )
                if tuple(row) != trial_values(trial) or start != prefix_values(trial):
                    raise SteerbackError(
                        f"{self.path}: trial {trial.key} was planned differently when this run was started "
                        "(another version of steerback or of the target); start a new run with another --name"
                    )

    def add_completions(self, done: Iterable[tuple[str, Completion, str]]) -> None:
        """(trial key, completion, engine fingerprint); a trial that has a completion keeps it."""
        rows = [completion_values(key, completion, engine) for key, completion, engine in done]
        with self._transaction() as db:
            db.executemany(f"INSERT OR IGNORE INTO completions VALUES ({placeholders(11)})", rows)

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

    def windows(
        self, judge: str, target: str | None = None, stage: str | None = None, condition: str | None = None
    ) -> dict[str, WindowScores]:
        """A judge's scores of the windows of responses, by trial key."""
        if not self._has("windows"):
            return {}
        wanted = {"w.judge": judge, "t.target": target, "t.stage": stage, "t.condition": condition}
        chosen = {column: value for column, value in wanted.items() if value is not None}
        query = (
            "SELECT w.trial, w.judge, w.rubric, w.starts, w.scores, w.reason, w.raw FROM windows w "
            f"JOIN trials t ON t.key = w.trial WHERE {' AND '.join(f'{c} = ?' for c in chosen)}"
        )
        with sqlite_errors(self.path):
            return {
                key: WindowScores(by, rubric, tuple(json.loads(starts)), tuple(json.loads(scores)), reason, raw)
                for key, by, rubric, starts, scores, reason, raw in self._db.execute(query, tuple(chosen.values()))
            }

    def _prefixes(self) -> tuple[str, str]:
        """Return the columns of a trial's prefix, and the join that gives them."""
        there = self._has("prefixes")
        return ("p.text, p.token_ids", "LEFT JOIN prefixes p ON p.trial = t.key") if there else ("NULL, NULL", "")

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
        """Trials in plan order with completion and `judge`'s judgement where there are any."""
        where, values = ["1"], [judge]
        for column, value in (("target", target), ("stage", stage), ("condition", condition)):
            if value is not None:
                where.append(f"t.{column} = ?")
                values.append(value)
        if keys is not None:
            where.append("t.key IN (SELECT value FROM json_each(?))")
            values.append(dump_json(list(keys)))
        blob = "c.activations" if activations else "NULL"
        start, join = self._prefixes()
        query = (
            f"SELECT t.*, {start}, c.text, c.token_ids, c.prompt_tokens, c.finish, c.prompt_positions, "
            f"c.generated_positions, c.added_norm, {blob}, j.judge, j.rubric, j.status, j.attempts, j.reason, j.raw "
            f"FROM trials t {join} LEFT JOIN completions c ON c.trial = t.key "
            "LEFT JOIN judgements j ON j.trial = t.key AND j.judge = ? "
            f"WHERE {' AND '.join(where)} ORDER BY t.target, t.stage, t.condition, t.idx"
        )
        with sqlite_errors(self.path):
            return [row_of(found) for found in self._db.execute(query, values)]

    def trials(self, stages: Sequence[str]) -> Iterator[Trial]:
        """Yield the planned trials of some stages in the order of `rows`, one at a time."""
        marks = placeholders(len(stages))
        start, join = self._prefixes()
        query = (
            f"SELECT t.*, {start} FROM trials t {join} WHERE t.stage IN ({marks}) "
            "ORDER BY target, stage, condition, idx"
        )
        with sqlite_errors(self.path):
            for stored in self._db.execute(query, list(stages)):
                yield trial_of(stored)

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
