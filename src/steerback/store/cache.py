"""Cache of completions, judgements and judge replies, shared by all runs.

Each key hashes everything that determines the value. Only expensive values are cached; thresholds, selections and
metrics are computed again. A warm cache therefore changes the run time and nothing else. Each cached value that a run
uses is copied into the run's ledger. The cache never makes a run fail: a damaged value is computed again, and an
unusable cache file is ignored.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from steerback.errors import SteerbackError, visible
from steerback.records import Completion, FinishReason, Judgement, Receipt, digest
from steerback.store.database import (
    DamagedDatabaseError,
    open_database,
    pack_array,
    sqlite_errors,
    transaction,
    unpack_array,
)
from steerback.store.files import user_folder

Value = TypeVar("Value")
APPLICATION_ID = 0x53544243  # "STBC"
SCHEMA_VERSION = 1
SCHEMA = "CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, activations BLOB) WITHOUT ROWID"

_KNOWN = (
    "SELECT key, CAST(value AS BLOB), CAST(activations AS BLOB) FROM entries "
    "WHERE key IN (SELECT value FROM json_each(?))"
)


def default_path() -> Path:
    """Return the path of `cache.sqlite` in the user's cache folder."""
    return user_folder("cache.sqlite")


@dataclass(frozen=True, slots=True)
class KeptReply:
    """Reply of a language model with the nonce of its verdict and the item's number in the call (counted from 1)."""

    text: str
    nonce: str
    number: int


@dataclass(frozen=True, slots=True)
class KeptCompletion:
    """Stored form of a completion, without its activations."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish: FinishReason
    receipt: Receipt


_COMPLETION, _JUDGEMENT, _REPLY = TypeAdapter(KeptCompletion), TypeAdapter(Judgement), TypeAdapter(KeptReply)


@cache
def note_once(text: str) -> None:
    """Print a line on stderr, once per process."""
    print(f"steerback: {visible(text)}", file=sys.stderr)


class Cache:
    """Content-addressed store that several processes can use at the same time.

    `note` receives one line about each problem with the file. `damaged` counts the values that were dropped.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = note_once) -> None:
        self.path, self._note, self.damaged = path, note, 0
        self._db: sqlite3.Connection | None = None
        with self._failing_softly():
            self._db = open_database(path, SCHEMA, APPLICATION_ID, SCHEMA_VERSION)

    def close(self) -> None:
        """Close the file and report how many damaged values were dropped."""
        if self.damaged:
            self._note(f"cache {self.path}: {self.damaged} damaged values were dropped and computed again")
        if self._db is not None:
            self._db.close()

    def completions(self, keys: Sequence[str]) -> dict[str, Completion]:
        """Return the cached completions by cache key."""
        return self._get(keys, _completion)

    def judgements(self, keys: Sequence[str]) -> dict[str, Judgement]:
        """Return the cached judgements by cache key."""
        return self._get(keys, lambda value, _: _JUDGEMENT.validate_python(_unpack(value)))

    def put_completions(self, entries: Mapping[str, Completion]) -> None:
        """Store completions with their activations, by cache key."""
        rows = []
        for key, completion in entries.items():
            body = {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "prompt_tokens": completion.prompt_tokens,
                "finish": completion.finish,
                "receipt": asdict(completion.receipt),
            }
            rows.append((key, _pack(body), pack_array(completion.activations)))
        self._put(rows)

    def put_judgements(self, entries: Mapping[str, Judgement]) -> None:
        """Store judgements by cache key, except unscored ones: a second request may succeed."""
        rows = [(key, _pack(asdict(j)), None) for key, j in entries.items() if j.status != "unscored"]
        self._put(rows)

    def replies(self, keys: Sequence[str]) -> dict[str, KeptReply]:
        """Return the cached replies by cache key."""
        return self._get(keys, lambda value, _: _REPLY.validate_python(_unpack(value)))

    def put_replies(self, entries: Mapping[str, KeptReply]) -> None:
        """Store replies by cache key; an existing entry stays."""
        self._put([(key, _pack(asdict(reply)), None) for key, reply in entries.items()])

    def _get(self, keys: Sequence[str], read: Callable[[bytes, bytes | None], Value]) -> dict[str, Value]:
        """Return the cached values as decoded by `read`; values that cannot be decoded are dropped."""
        values: dict[str, Value] = {}
        damaged: list[tuple[str]] = []
        with self._failing_softly():
            for key, value, blob in self._db.execute(_KNOWN, (json.dumps(list(keys)),)) if self._db else ():
                try:
                    values[key] = read(value, blob)
                except (zlib.error, ValueError, TypeError, RecursionError):
                    damaged.append((key,))
        if damaged:
            self.damaged += len(damaged)
            self._change("DELETE FROM entries WHERE key = ?", damaged)
        return values

    def _put(self, rows: Sequence[tuple[str, bytes, bytes | None]]) -> None:
        self._change("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", rows)

    def _change(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        with self._failing_softly():
            if self._db is not None:
                with transaction(self._db):
                    self._db.executemany(statement, rows)

    @contextmanager
    def _failing_softly(self) -> Iterator[None]:
        """Report an error of the file in one line, and stop using the cache after it."""
        try:
            with sqlite_errors(self.path):
                yield
        except SteerbackError as error:
            if self._db is not None:
                self._db.close()
                self._db = None
            aside = _set_aside(self.path) if isinstance(error, DamagedDatabaseError) else None
            moved = f"; it was moved to {aside.name}" if aside else ""
            self._note(f"the run continues without the cache: {error}{moved}")


def _set_aside(path: Path) -> Path | None:
    """Rename a file that is not a database, together with SQLite's -wal and -shm files. The next run creates a new
    cache.
    """
    aside = path.with_name(f"{path.name}.damaged")
    try:
        for suffix in ("-wal", "-shm", ""):
            if (file := Path(f"{path}{suffix}")).exists():
                file.replace(f"{aside}{suffix}")
    except OSError:
        return None
    return aside


def cache_key(kind: str, fingerprint: str, content: object) -> str:
    """Return the key of a cache entry.

    `kind` is completion, judgement or reply. `fingerprint` identifies the engine or the judge. `content` is the request
    or the judged item.
    """
    return digest([kind, fingerprint, content])


def _pack(body: object) -> bytes:
    return zlib.compress(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"), 1)


def _unpack(value: bytes) -> object:
    return json.loads(zlib.decompress(value).decode("utf-8", "surrogatepass"))


def _completion(value: bytes, blob: bytes | None) -> Completion:
    kept = _COMPLETION.validate_python(_unpack(value))
    activations = unpack_array(blob)
    return Completion(kept.text, kept.token_ids, kept.prompt_tokens, kept.finish, kept.receipt, activations)
