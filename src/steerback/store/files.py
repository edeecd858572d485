"""The user's cache folder, and atomic file writes. This module does not depend on the content of the files."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import BinaryIO, TypeVar

from steerback.errors import SteerbackError

T = TypeVar("T")


def until_changed(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Keep what `read` returns for a file until the file's time or size changes. Callers must not change it."""

    @lru_cache(maxsize=256)
    def kept(path: Path, _changed: int, _size: int) -> T:
        return read(path)

    @wraps(read)
    def current(path: Path) -> T:
        stat = path.stat()
        return kept(path, stat.st_mtime_ns, stat.st_size)

    return current


def user_folder(*parts: str) -> Path:
    """Return a path below `$STEERBACK_CACHE`, `$XDG_CACHE_HOME/steerback` or `~/.cache/steerback`; it may not exist."""
    if chosen := os.environ.get("STEERBACK_CACHE"):
        return Path(chosen, *parts)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "steerback", *parts)


def make_folder(folder: Path, fix: str = "choose another place") -> Path:
    """Create a folder with its parents and return it. Raises SteerbackError with the advice `fix` if that is
    impossible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerbackError(f"folder {folder} cannot be created: {error.strerror}; {fix}") from None
    return folder


def write_json(path: Path, body: object) -> Path:
    """Write JSON so that the file is always either the old one or the complete new one."""
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomic(path, text.encode("utf-8"))


def write_atomic(path: Path, content: bytes) -> Path:
    """Write a file completely or not at all."""
    with whole_file(path) as file:
        file.write(content)
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` only after it is completely written; if writing fails, the old file stays."""
    clear_leftovers(path.parent, glob.escape(path.name))
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{os.getpid()}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SteerbackError(f"{path} cannot be written: {error.strerror}") from None


_TEMPORARY = re.compile(r"\..+\.(\d{1,9})(?:-\w+\.tmp|\.(?:png|pdf))")
"""Name of an unfinished file, with the process that writes it. Older versions named figures `.NAME.123.png`."""


def clear_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the unfinished files (of the file `name`) of processes that no longer run, for example after a kill."""
    for path in folder.glob(f".{name}.*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            with contextlib.suppress(OSError):  # a file that stays only costs space
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
