"""Ledger: one SQLite file with everything that a run planned, generated and judged.

It stores and returns records, and does not depend on engines, judges or statistics. Each row is written once, one
transaction per batch. A run that is killed therefore loses only the rows not yet committed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, TypeVar

from pydantic import JsonValue
from pydantic_core import from_json

from steerback.errors import SteerbackError
from steerback.records import Completion, Judgement, Trial, WindowScores
from steerback.store.database import dump_json, placeholders, reading, sqlite_errors
from steerback.store.facts import CONFIG, Fact
from steerback.store.processes import collector_paused
from steerback.store.rows import (
    COMPLETION,
    JUDGEMENT,
    KEYS,
    OUTLINE,
    OUTLINES_OF,
    TRIAL,
    Outline,
    Stored,
    Verdict,
    completion_values,
    judgement_values,
    kind_of,
    kinds_query,
    latent_repr,
    prefix_values,
    read_outline,
    read_row,
    read_trial,
    read_verdict,
    trial_values,
    where_clause,
    window_values,
)
from steerback.store.rows import Row as Row
from steerback.store.schema import PREFIXES, TABLES, WINDOWS, Tables, fill_outlines

T = TypeVar("T")

ORDER = "ORDER BY t.target, t.stage, t.condition, t.idx"
MANY = 20_000
"""Number of trials from which a second process for reading is worth its start."""
BATCH = 200
"""Number of rows with texts that `Ledger.stream` reads at a time."""


class Ledger(Tables):
    """Database of one run. Usable as a context manager."""

    def put(self, target: str, fact: Fact[T], value: T) -> None:
        """Store a fact of a target; the target "" is the run itself."""
        self.put_json(target, fact.name, fact.dump(value))

    def get(self, target: str, fact: Fact[T]) -> T | None:
        """Return the stored fact, or None. Raises SteerbackError if it does not match the fact's type."""
        with reading(self.path):
            query = "SELECT value FROM facts WHERE target = ? AND name = ?"
            row = self._db.execute(query, (target, fact.name)).fetchone()
            return None if row is None else fact.load(json.loads(row[0]), f"{self.path}, target {target!r}")

    def put_json(self, target: str, name: str, value: JsonValue) -> None:
        """Store the JSON form of a fact that is copied from another ledger or file."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (target, name, dump_json(value)))

    def facts(self) -> list[tuple[str, str, JsonValue]]:
        """Return every stored fact as (target, name, JSON form)."""
        with reading(self.path):
            stored = self._db.execute("SELECT target, name, value FROM facts ORDER BY 1, 2").fetchall()
            return [(target, name, json.loads(value)) for target, name, value in stored]

    def targets_with(self, fact: Fact[T]) -> dict[str, T]:
        """Return the value of a fact by target: first the targets of the config in its order, then all others."""
        having = sorted((target for target, name, _ in self.facts() if name == fact.name), key=self._position())
        return {target: value for target in having if (value := self.get(target, fact)) is not None}

    def _position(self) -> Callable[[str], int]:
        """Return the function that gives a target's position in the config; an adapter has that of its base."""
        listed = (self.get("", CONFIG) or {}).get("targets")
        order = {str(name): i for i, name in enumerate(listed)} if isinstance(listed, list) else {}
        return lambda name: order.get(name, order.get(name.rpartition("+")[0], len(order)))

    @property
    def includes_degraded(self) -> bool:
        """Whether degraded responses count in the run's headline rates."""
        return (self.get("", CONFIG) or {}).get("degraded") != "exclude"

    def engines(self) -> dict[str, str]:
        """Return the fingerprint of the engine that generated each completion, by trial key."""
        return dict(self._all("SELECT trial, engine FROM completions"))

    @collector_paused()
    def add_trials(self, trials: Sequence[Trial]) -> None:
        """Add planned trials. Raises SteerbackError if a stored trial with the same key differs."""
        continued = {t.key: values for t in trials if (values := prefix_values(t)) is not None}
        waiting = iter(trials)
        with self._transaction() as db:
            if continued:
                db.execute(PREFIXES)
            while some := [trial_values(t) for t in islice(waiting, BATCH)]:
                keys = (dump_json([row[0] for row in some]),)
                stored = {row[0]: row for row in db.execute(f"SELECT * FROM trials WHERE key IN ({KEYS})", keys)}
                query = f"SELECT trial, text, token_ids FROM prefixes WHERE trial IN ({KEYS})"
                starts = {row[0]: row for row in db.execute(query, keys)} if continued else {}
                fresh: dict[str, tuple[Any, ...]] = {}
                for row in some:
                    key = row[0]
                    known = stored.get(key) or fresh.setdefault(key, row)
                    if known != row or (key in stored and starts.get(key) != continued.get(key)):
                        raise SteerbackError(
                            f"{self.path}: trial {key} differs from the plan that this run was started with "
                            "(another version of steerback or of the target); start a new run with another --name"
                        )
                db.executemany(f"INSERT INTO trials VALUES ({placeholders(14)})", fresh.values())
                begun = [continued[key] for key in fresh if key in continued]
                if begun:
                    db.executemany(f"INSERT INTO prefixes VALUES ({placeholders(3)})", begun)

    def add_completions(self, done: Iterable[tuple[str, Completion, str]]) -> None:
        """Add (trial key, completion, engine fingerprint) triples; existing completions stay."""
        rows = [completion_values(key, completion, engine) for key, completion, engine in done]
        with self._transaction() as db:
            db.executemany(f"INSERT OR IGNORE INTO completions VALUES ({placeholders(11)})", rows)
            fill_outlines(db, [row[0] for row in rows])

    def without_response(self, keys: Iterable[str]) -> set[str]:
        """Return the keys of those trials that have no completion."""
        return self._without("outlines WHERE trial = value", keys)

    def without_verdict(self, judge: str, keys: Iterable[str]) -> set[str]:
        """Return the keys of those trials that a judge has not judged."""
        return self._without("judgements WHERE trial = value AND judge = ?", keys, judge)

    def _without(self, rows: str, keys: Iterable[str], *values: str) -> set[str]:
        query = f"{KEYS} WHERE NOT EXISTS (SELECT 1 FROM {rows})"
        return {key for (key,) in self._all(query, (dump_json(list(keys)), *values))}

    def add_judgements(self, judged: Iterable[tuple[str, Judgement]]) -> None:
        """Add (trial key, judgement) pairs. They replace unscored judgements only."""
        rows = [judgement_values(key, judgement) for key, judgement in judged]
        self._put_verdicts("judgements", ("status", "attempts"), rows, "status = 'unscored'")

    def add_windows(self, scored: Iterable[tuple[str, WindowScores]]) -> None:
        """Add (trial key, window scores) pairs. They replace entries without scores only."""
        self._put_verdicts("windows", ("starts", "scores"), [window_values(k, w) for k, w in scored], "reason != ''")

    def _put_verdicts(self, table: str, results: tuple[str, str], rows: Sequence[tuple[Any, ...]], failed: str) -> None:
        """Insert rows into a table of verdicts with the columns `results`; a stored row is replaced only if it has
        `failed`.
        """
        updates = ", ".join(f"{column} = excluded.{column}" for column in ("rubric", *results, "reason", "raw", "at"))
        with self._transaction() as db:
            if table == "windows":
                db.execute(WINDOWS)
            db.executemany(
                f"INSERT INTO {table} VALUES ({placeholders(8)}) ON CONFLICT (trial, judge) DO UPDATE SET {updates} "
                f"WHERE {table}.{failed}",
                rows,
            )

    def windows(self, judge: str, keys: Sequence[str] | None = None) -> dict[str, WindowScores]:
        """Return a judge's scores of the sentence windows of responses, by trial key."""
        columns, where = "w.judge, w.rubric, w.starts, w.scores, w.reason, w.raw", where_clause(None, None, None, keys)
        with reading(self.path):
            return {
                key: WindowScores(by, rubric, tuple(from_json(starts)), tuple(from_json(scores)), reason, raw)
                for key, by, rubric, starts, scores, reason, raw in self._windows(columns, judge, where)
            }

    def window_scores(
        self,
        judge: str,
        target: str | None = None,
        stage: str | None = None,
        condition: str | None = None,
        half: int | None = None,
    ) -> dict[str, list[float]]:
        """Return the window scores without texts, by trial key; empty lists for responses the judge did not score.

        `half`: as in `outlines`.
        """
        with reading(self.path):
            stored = self._windows("w.scores", judge, where_clause(target, stage, condition, None, half))
            return {key: from_json(scores) for key, scores in stored}

    def window_reasons(self, judge: str) -> list[str]:
        """Return for each response whose windows a judge has scored why it has no scores; "" if it has."""
        with reading(self.path):
            return [reason for _, reason in self._windows("w.reason", judge, ("1", []))]

    def without_windows(self, judge: str, target: str | None, stage: str, retry: bool = False) -> Iterator[Outline]:
        """Yield the trials whose windows a judge has not scored, with `retry` also those that it gave no scores."""
        where, values = where_clause(target, stage, None, None)
        tables = "trials t"
        if self._has("windows"):
            tables += " LEFT JOIN windows w ON w.trial = t.key AND w.judge = ?"
            values.insert(0, judge)
            where += " AND (w.trial IS NULL OR w.scores = '[]')" if retry else " AND w.trial IS NULL"
        keys = [key for (key,) in self._all(f"SELECT t.key FROM {tables} WHERE {where}", values)]
        yield from self.outlines(keys=keys) if keys else ()

    def _windows(self, columns: str, judge: str, where: tuple[str, list[str]]) -> Iterator[tuple[Any, ...]]:
        if not self._has("windows"):
            return
        tables = "trials t JOIN windows w ON w.trial = t.key AND w.judge = ?"
        yield from self._db.execute(f"SELECT w.trial, {columns} FROM {tables} WHERE {where[0]}", (judge, *where[1]))

    def _trials(self) -> tuple[str, str]:
        """Return the columns of a trial with its prefix, and the tables they come from."""
        if self._has("prefixes"):
            return f"{TRIAL}, p.text, p.token_ids", "trials t LEFT JOIN prefixes p ON p.trial = t.key"
        return f"{TRIAL}, NULL, NULL", "trials t"

    def rows(
        self,
        target: str | None = None,
        stage: str | None = None,
        condition: str | None = None,
        judge: str | None = None,
        keys: Sequence[str] | None = None,
        activations: bool = False,
    ) -> list[Row]:
        """Return trials in plan order with their completions and `judge`'s judgements, as far as they exist.

        Texts and token ids take about 15 kB per row; use `stream` or `outlines` for many trials.
        """
        tables = "LEFT JOIN completions c ON c.trial = t.key LEFT JOIN judgements j ON j.trial = t.key AND j.judge = ?"
        columns = f"{COMPLETION}, {'c.activations' if activations else 'NULL'}, {JUDGEMENT}, j.raw"
        return list(self._read(read_row, columns, tables, judge, where_clause(target, stage, condition, keys)))

    def _read(
        self, read: Callable[[Stored], T], columns: str, joins: str, judge: str | None, where: tuple[str, list[str]]
    ) -> Iterator[T]:
        """Yield the selected trials in plan order, joined with other tables and decoded by `read`."""
        trial, tables = self._trials()
        query = f"SELECT {trial}, {columns} FROM {tables} {joins} WHERE {where[0]} {ORDER}"
        with reading(self.path):
            for stored in self._db.execute(query, (judge, *where[1])):
                yield read(stored)

    def stream(self, keys: Iterable[str], judge: str | None = None, activations: bool = False) -> Iterator[Row]:
        """Yield the rows of trials in the order of `keys`, with `BATCH` rows in memory at a time."""
        waiting = iter(keys)
        while some := list(islice(waiting, BATCH)):
            rows = {r.trial.key: r for r in self.rows(keys=some, judge=judge, activations=activations)}
            yield from (rows.pop(key) for key in some)  # the next batch is read when this one is released

    def outlines(
        self,
        target: str | None = None,
        stage: str | None = None,
        condition: str | None = None,
        judge: str | None = None,
        keys: Sequence[str] | None = None,
        half: int | None = None,
    ) -> Iterator[Outline]:
        """Yield trials in plan order without texts; `half` 0 or 1: the first or second half of a condition."""
        where = where_clause(target, stage, condition, keys, half)
        yield from self._read(read_outline, f"{OUTLINE}, {JUDGEMENT}", OUTLINES_OF, judge, where)

    def verdicts(self, target: str, stage: str, condition: str, judge: str, half: int | None) -> Iterator[Verdict]:
        """Yield the verdicts of a condition in plan order (`half`: as in `outlines`)."""
        where = where_clause(target, stage, condition, None, half)
        yield from self._read(read_verdict, f"{OUTLINE}, {JUDGEMENT}", OUTLINES_OF, judge, where)

    def kinds(self, stage: str, judge: str) -> list[tuple[Outline, int]]:
        """Return one trial of each kind in a stage (`rows.kind_of`) with the number of such trials."""
        query = kinds_query(*self._trials())
        examples: dict[tuple[object, ...], str] = {}
        numbers: Counter[str] = Counter()
        with reading(self.path):
            for stored in sorted(self._db.execute(query, (judge, stage)), key=itemgetter(-1)):
                numbers[examples.setdefault(kind_of(stored), stored[-2])] += stored[-3]
        return [(row, numbers[row.trial.key]) for row in self.outlines(judge=judge, keys=[*numbers])]

    def responses(self, outlines: Iterable[Outline]) -> Iterator[tuple[Outline, str | None]]:
        """Yield each outline with its response text (None before it exists), with `BATCH` texts in memory at a time."""
        yield from ((row, done[0] if done else None) for row, done in self.completions(outlines, "c.text"))

    def completions(
        self, outlines: Iterable[Outline], columns: str = f"{COMPLETION}, c.activations"
    ) -> Iterator[tuple[Outline, Stored | None]]:
        """Yield each outline with columns of its completion as SQLite returns them (None before it exists)."""
        query = f"SELECT c.trial, {columns} FROM completions c WHERE c.trial IN ({KEYS})"
        waiting = iter(outlines)
        while some := list(islice(waiting, BATCH)):
            with sqlite_errors(self.path):
                found = {row[0]: row[1:] for row in self._db.execute(query, (dump_json([o.trial.key for o in some]),))}
            yield from ((outline, found.get(outline.trial.key)) for outline in some)

    def trials(self, stages: Sequence[str]) -> Iterator[Trial]:
        """Yield the planned trials of some stages in the order of `rows`, one at a time."""
        marks = placeholders(len(stages))
        columns, tables = self._trials()
        query = f"SELECT {columns} FROM {tables} WHERE t.stage IN ({marks}) {ORDER}"
        with sqlite_errors(self.path):
            for stored in self._db.execute(query, list(stages)):
                yield read_trial(stored)

    def groups(self, stages: Sequence[str]) -> Iterator[tuple[str, tuple[str, str, str, int]]]:
        """Yield the key of each trial of some stages, in the order of `rows`, with its target, latent, prompt and seed.

        Trials of different conditions share the latter. The latent is text as Python writes it.
        """
        query = "SELECT t.key, t.target, t.latent, t.prompt, t.seed FROM trials t WHERE t.stage IN "
        query += f"({placeholders(len(stages))}) {ORDER}"
        with sqlite_errors(self.path):
            for key, target, latent, prompt, seed in self._db.execute(query, list(stages)):
                yield key, (sys.intern(target), latent_repr(latent), sys.intern(prompt), seed)

    def stage_sizes(self) -> dict[str, int]:
        """Return the number of planned trials of each stage."""
        return dict(self._once("SELECT stage, count(*) FROM trials GROUP BY 1 ORDER BY 1"))

    def progress(self) -> tuple[int, int]:
        """Return the number of planned trials and the number of responses."""
        [(planned, done)] = self._all("SELECT (SELECT count(*) FROM trials), (SELECT count(*) FROM completions)")
        return planned, done

    def judges(self) -> list[str]:
        """Return the names of the judges with judgements in this ledger."""
        return [judge for (judge,) in self._once("SELECT DISTINCT judge FROM judgements ORDER BY judge")]

    def plan(self, place: tuple[str, str, str] | None = None) -> Iterator[tuple[str, str | None, str]]:
        """Yield key, latent and interventions, as stored, of all trials or of a target, stage and condition."""
        target, stage, condition = place or (None, None, None)
        where, values = where_clause(target, stage, condition, None)
        with sqlite_errors(self.path):
            yield from self._db.execute(
                f"SELECT key, latent, interventions FROM trials t WHERE {where} {ORDER}", values
            )

    def stages(self) -> list[tuple[str, str]]:
        """Return the (target, stage) pairs that have trials: targets as in the config, stages in plan order."""
        return self._pairs("SELECT target, stage FROM trials GROUP BY 1, 2 ORDER BY min(rowid)")

    def conditions(self, stage: str = "measure") -> list[tuple[str, str]]:
        """Return the (target, condition) pairs of a stage: targets as in the config, conditions in plan order."""
        query = "SELECT target, condition FROM trials WHERE stage = ? GROUP BY 1, 2 ORDER BY min(rowid)"
        return self._pairs(query, stage)

    def _pairs(self, query: str, *values: str) -> list[tuple[str, str]]:
        # processes that measure several targets side by side plan their trials in no fixed order
        position = self._position()
        return sorted(self._once(query, *values), key=lambda pair: position(pair[0]))

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return all rows of all tables in key order, without timestamps. Two equal runs give equal dumps."""
        tables = {}
        with sqlite_errors(self.path):
            for table in filter(self._has, TABLES):
                columns = [r[1] for r in self._db.execute(f"PRAGMA table_info({table})") if r[1] != "at"]
                query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY 1, 2"
                tables[table] = [tuple(r) for r in self._db.execute(query)]
        return tables
