"""Tables of the ledger: their creation, and the update of older ledgers."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic_core import from_json

from steerback.records import is_degraded
from steerback.store.database import dump_json, open_database, sqlite_errors, transaction
from steerback.store.rows import KEYS

APPLICATION_ID = 0x53544252  # "STBR" marks the files of this package
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
"""Created when the first window is scored: ledgers of 0.1 have no such table."""
PREFIXES = """
CREATE TABLE IF NOT EXISTS prefixes (
    trial TEXT PRIMARY KEY REFERENCES trials (key), text TEXT NOT NULL, token_ids TEXT NOT NULL)
"""
"""Created when the first response is continued from its tokens."""
OUTLINES = """
CREATE TABLE outlines (
    trial TEXT PRIMARY KEY REFERENCES completions (trial), finish TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    tokens INTEGER NOT NULL, prompt_positions INTEGER NOT NULL, generated_positions INTEGER NOT NULL,
    degraded INTEGER NOT NULL) WITHOUT ROWID
"""
"""Properties of each completion for metrics, which then read no texts. All are derived from `completions`."""
TABLES = ("facts", "trials", "prefixes", "completions", "judgements", "windows")


def open_tables(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the database of a ledger, or create it; an older one is updated."""
    return open_database(path, f"{SCHEMA};{OUTLINES}", APPLICATION_ID, SCHEMA_VERSION, read_only, _migrate)


def fill_outlines(db: sqlite3.Connection, trials: Sequence[str] | None = None) -> None:
    """Fill the table `outlines` for the completions of some trials, or for all completions without outline."""
    db.create_function("tokens", 1, lambda ids: len(from_json(ids)), deterministic=True)
    db.create_function("degraded", 1, is_degraded, deterministic=True)
    chosen = KEYS if trials is not None else "SELECT trial FROM completions EXCEPT SELECT trial FROM outlines"
    db.execute(
        "INSERT OR IGNORE INTO outlines SELECT trial, finish, prompt_tokens, tokens(token_ids), prompt_positions, "
        f"generated_positions, degraded(text) FROM completions WHERE trial IN ({chosen})",
        () if trials is None else (dump_json(list(trials)),),
    )


def _migrate(db: sqlite3.Connection, version: int) -> None:
    """Update a ledger from an older schema version to the current one."""
    if version < 2:
        db.execute(OUTLINES)
        fill_outlines(db)


class Tables:
    """Open tables of a ledger. Usable as a context manager."""

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path = path
        self._db = open_tables(path, read_only)
        self._kept_at, self._kept = (0, 0), dict[tuple[str, tuple[str, ...]], list[Any]]()
        [(missing,)] = self._all("SELECT (SELECT count(*) FROM completions) - (SELECT count(*) FROM outlines)")
        if missing:  # an older version wrote completions after the migration of this ledger
            with self._transaction() as db:
                fill_outlines(db)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with sqlite_errors(self.path), transaction(self._db):
            yield self._db

    def _all(self, query: str, values: Sequence[str] = ()) -> list[Any]:
        with sqlite_errors(self.path):
            return self._db.execute(query, values).fetchall()

    def _once(self, query: str, *values: str) -> list[Any]:
        """Return all rows of a query that reads every trial. They are kept until the ledger changes."""
        state = (*self._all("PRAGMA data_version")[0], self._db.total_changes)
        if state != self._kept_at:
            self._kept_at, self._kept = state, {}
        if (query, values) not in self._kept:
            self._kept[query, values] = self._all(query, values)
        return self._kept[query, values]

    def _has(self, table: str) -> bool:
        return bool(self._all("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)))
