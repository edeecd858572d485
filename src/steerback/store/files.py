"""Where things of the user are kept, and files written whole or not at all. It knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from steerback.errors import SteerbackError


def user_folder(*parts: str) -> Path:
    """A place below `$STEERBACK_CACHE`, else `$XDG_CACHE_HOME/steerback`, else `~/.cache/steerback`; not created."""
    if chosen := os.environ.get("STEERBACK_CACHE"):
        return Path(chosen, *parts)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "steerback", *parts)


def make_folder(folder: Path, fix: str = "choose another place") -> Path:
    """The folder, made with those above it; one line with the `fix` where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerbackError(f"folder {folder} cannot be made: {error.strerror}; {fix}") from None
    return folder


def write_json(path: Path, body: object) -> Path:
    """Writes JSON so that the file is either the old one or the whole new one."""
    text = json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomic(path, text.encode("utf-8"))


def write_atomic(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` once it is written; if writing fails, the earlier file stays."""
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
"""Name of a file that `write_atomic` has not finished, with its process; figures once were `.NAME.123.png`."""


def clear_leftovers(folder: Path) -> None:
    """Remove the unfinished files of processes that are no more: a kill leaves them behind."""
    for path in folder.glob(".*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not _is_running(int(found[1])):
            with contextlib.suppress(OSError):  # they take nothing but space
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
