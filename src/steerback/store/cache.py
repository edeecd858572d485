"""A cache of completions, judgements and judges' replies, shared by all runs and keyed by all that shaped the value.

Only what is expensive is cached; thresholds, selections and metrics are recomputed from it, so a warm cache changes
how long a run takes and nothing else. A hit is copied into the run's ledger.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steerback.records import Attempt, Completion, Judgement, Receipt, digest
from steerback.store.database import open_database, pack_array, sqlite_errors, unpack_array
from steerback.store.files import user_folder

APPLICATION_ID = 0x53544243  # "STBC"
SCHEMA_VERSION = 1
SCHEMA = "CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, activations BLOB) WITHOUT ROWID"


def default_path() -> Path:
    """`cache.sqlite` in the user's folder."""
    return user_folder("cache.sqlite")


@dataclass(frozen=True, slots=True)
class KeptReply:
    """A language model's reply, the nonce its verdict carries, and the number of the item in its call (from 1)."""

    text: str
    nonce: str
    number: int


class Cache:
    """Content-addressed store; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db: sqlite3.Connection = open_database(path, SCHEMA, APPLICATION_ID, SCHEMA_VERSION)

    def close(self) -> None:
        self._db.close()

    def completions(self, keys: Sequence[str]) -> dict[str, Completion]:
        """The completions that are known, by cache key."""
        return {key: _completion(value, blob) for key, value, blob in self._get(keys)}

    def judgements(self, keys: Sequence[str]) -> dict[str, Judgement]:
        """The judgements that are known, by cache key."""
        return {key: _judgement(value) for key, value, _ in self._get(keys)}

    def put_completions(self, entries: Mapping[str, Completion]) -> None:
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
        """Unscored judgements are left out: asking again may succeed."""
        rows = [(key, _pack(asdict(j)), None) for key, j in entries.items() if j.status != "unscored"]
        self._put(rows)

    def replies(self, keys: Sequence[str]) -> dict[str, KeptReply]:
        """The replies that are known, by cache key."""
        return {key: KeptReply(**_unpack(value)) for key, value, _ in self._get(keys)}  # type: ignore[arg-type]

    def put_replies(self, entries: Mapping[str, KeptReply]) -> None:
        """Keep replies by cache key; one that is there stays."""
        self._put([(key, _pack(asdict(reply)), None) for key, reply in entries.items()])

    def _get(self, keys: Sequence[str]) -> list[tuple[str, bytes, bytes | None]]:
        with sqlite_errors(self.path):
            query = "SELECT key, value, activations FROM entries WHERE key IN (SELECT value FROM json_each(?))"
            return list(self._db.execute(query, (json.dumps(list(keys)),)))

    def _put(self, rows: Iterable[tuple[str, bytes, bytes | None]]) -> None:
        with sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._db.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", rows)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def cache_key(kind: str, fingerprint: str, content: object) -> str:
    """`kind`: completion, judgement or reply; `fingerprint`: the engine's or judge's; `content`: request or item."""
    return digest([kind, fingerprint, content])


def _pack(body: object) -> bytes:
    return zlib.compress(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"), 1)


def _unpack(value: bytes) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(zlib.decompress(value).decode("utf-8", "surrogatepass"))
    return loaded


def _completion(value: bytes, blob: bytes | None) -> Completion:
    body = _unpack(value)
    receipt = Receipt(**body.pop("receipt"))  # type: ignore[arg-type]
    tokens = tuple(body.pop("token_ids"))  # type: ignore[arg-type, var-annotated]
    return Completion(token_ids=tokens, receipt=receipt, activations=unpack_array(blob), **body)  # type: ignore[arg-type]


def _judgement(value: bytes) -> Judgement:
    body = _unpack(value)
    attempts = tuple(Attempt(**a) for a in body.pop("attempts"))  # type: ignore[attr-defined]
    return Judgement(attempts=attempts, **body)  # type: ignore[arg-type]
