"""Access to SQLite files for ledger and cache: safe opening, one-line errors, compressed arrays."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError, one_line
from steerback.store.files import make_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


PATIENCE = 30.0
"""Seconds to wait for another process that uses the same file."""


class DamagedDatabaseError(SteerbackError):
    """The file is not a database of this package, or it is damaged."""


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Convert an SQLite error about a file into a one-line error that says what the user can do."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            raise SteerbackError(
                f"{path}: the disk is full ({text}); free some space, then resume: all finished trials are kept"
            ) from None
        if "readonly" in text or "read-only" in text or "unable to open" in text:
            raise SteerbackError(f"{path} cannot be written ({text}); check the permissions of its folder") from None
        if "locked" in text:
            raise SteerbackError(f"{path}: another process is using it ({text}); wait for it or stop it") from None
        raise DamagedDatabaseError(
            f"{path} is not a readable steerback database ({text}); restore it from a copy or use another file"
        ) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors as `sqlite_errors` does, and report a value that cannot be decoded as damage of the file."""
    try:
        with sqlite_errors(path):
            yield
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error) as error:
        raise DamagedDatabaseError(
            f"{path}: contains a damaged value ({one_line(error)[:200]}); restore the file from a copy"
        ) from None


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit all statements of the block together, or none if it raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


Migrate = Callable[[sqlite3.Connection, int], None]
"""Function that updates the tables of a file from an older schema version (second argument) to the current one."""


def open_database(
    path: Path,
    schema: str,
    application_id: int,
    version: int,
    read_only: bool = False,
    migrate: Migrate | None = None,
) -> sqlite3.Connection:
    """Open an SQLite file in WAL mode, and create it if it does not exist.

    A file of an older schema version is migrated after a copy of it is saved in the same folder (`NAME.v1.sqlite`).
    Raises SteerbackError for files of other programs and for newer schema versions.
    """
    if read_only and not path.is_file():
        raise SteerbackError(f"{path} does not exist; start a run first (steerback run ...)")
    make_folder(path.parent)
    with sqlite_errors(path):
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path, schema, application_id, version)
            have = connection.execute("PRAGMA user_version").fetchone()[0]
            if have < version and migrate is not None:
                _migrated(connection, path, version, migrate)
            elif have != version:
                raise SteerbackError(
                    f"{path} has schema version {have}, this steerback reads {version}; use the release that wrote it"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch a new file to WAL mode. SQLite refuses this without waiting while another process does the same."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _prepare(connection: sqlite3.Connection, path: Path, schema: str, application_id: int, version: int) -> None:
    owner = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables == 0 and owner in (0, application_id):
        _use_wal(connection)
        with transaction(connection):
            # Check again inside the transaction: another process may have created the tables in the meantime.
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                connection.execute(f"PRAGMA application_id = {application_id}")
                connection.execute(f"PRAGMA user_version = {version}")
                for statement in filter(str.strip, schema.split(";")):
                    connection.execute(statement)
    elif owner != application_id:
        raise SteerbackError(f"{path} is an SQLite file of another program; it was not changed")
    connection.execute("PRAGMA synchronous = NORMAL")


def _migrated(connection: sqlite3.Connection, path: Path, version: int, migrate: Migrate) -> None:
    """Save a copy of a file, then migrate it in one transaction. Another process may do the same at the same time."""
    _keep_copy(connection, path, version)
    with transaction(connection):
        have = connection.execute("PRAGMA user_version").fetchone()[0]
        if have < version:
            migrate(connection, have)
            connection.execute(f"PRAGMA user_version = {version}")


def _keep_copy(connection: sqlite3.Connection, path: Path, newer: int) -> None:
    """Copy a database to a file named after its schema version, unless that copy exists."""
    part = path.with_name(f".{path.name}.{os.getpid()}-copy.tmp")
    try:
        with closing(sqlite3.connect(part)) as target:
            connection.backup(target)
            have = target.execute("PRAGMA user_version").fetchone()[0]
        copy = path.with_name(f"{path.stem}.v{have}{path.suffix}")
        if have < newer and not copy.exists():
            os.replace(part, copy)
    finally:
        part.unlink(missing_ok=True)


def pack_array(array: NDArray[np.float32] | None) -> bytes | None:
    """Compress a float32 array of shape (positions, latents); its shape is stored before the data."""
    if array is None:
        return None
    import numpy as np

    values = np.ascontiguousarray(array, dtype="<f4")
    if values.ndim != 2:
        raise ValueError(f"activations must have shape (positions, latents), not {values.shape}")
    return np.asarray(values.shape, dtype="<i8").tobytes() + zlib.compress(values.tobytes(), 1)


def unpack_array(blob: bytes | None) -> NDArray[np.float32] | None:
    """Restore an array from `pack_array`."""
    if blob is None:
        return None
    import numpy as np

    shape = np.frombuffer(blob[:16], dtype="<i8")
    return np.frombuffer(zlib.decompress(blob[16:]), dtype="<f4").reshape(shape)


def dump_json(value: object) -> str:
    """Return JSON with sorted keys, so that equal values give equal text."""
    return _encoder.encode(value)


_encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False)  # made once: `json.dumps` makes one each time


def storable(text: str) -> str:
    """Return text that SQLite can store: each lone surrogate becomes one `?`, so character spans stay valid."""
    return text.encode("utf-8", "replace").decode("utf-8")


def placeholders(n: int) -> str:
    """Return `?, ?, ...` for n values of a statement."""
    return ", ".join("?" * n)


def now() -> str:
    """Return the UTC time to the millisecond, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
