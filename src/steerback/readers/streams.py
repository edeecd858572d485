"""Streaming reader of large JSON files, plain or gzip. It keeps one item in memory at a time."""

from __future__ import annotations

import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path

import ijson

from steerback.errors import SteerbackError
from steerback.readers import GZIP, Json, checked, opened

BOM = b"\xef\xbb\xbf"


def stream_object(path: Path, what: str, array: str) -> Iterator[tuple[str, Json]]:
    """Yield the (key, value) pairs of the object in a JSON file, with one pair for each item of the list `array`.

    Raises SteerbackError if the file does not contain an object, or if `array` occurs twice or is not a list.
    """
    where = f"{what} {path}"
    try:
        with opened(path, what) as raw:
            if not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
                raise SteerbackError(f"{what} {path} must be read twice, so it cannot be a pipe; use a file")
            packed = raw.read(len(GZIP)) == GZIP
            raw.seek(0)
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            if file.read(len(BOM)) != BOM:
                file.seek(0)
            for key, value in _pairs(ijson.basic_parse(file, use_float=True), where, array):
                yield key, checked(value, where)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise SteerbackError(f"{where} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SteerbackError(f"{where} is damaged: {error}; fetch or compress it again") from None


def _pairs(events: Iterator[tuple[str, object]], where: str, array: str) -> Iterator[tuple[str, Json]]:
    """Build values from parser events. Values begin at depth `base`: 1, or 2 inside the list `array`."""
    depth, base, key, seen = 0, 1, "", False
    builder: ijson.ObjectBuilder | None = None
    for event, value in events:
        ends, starts = event in ("end_map", "end_array"), event in ("start_map", "start_array")
        depth -= ends
        if builder is not None:
            builder.event(event, value)
        elif depth == 0 and not ends:
            if event != "start_map":
                raise SteerbackError(f"{where} must contain an object with named values")
        elif event == "map_key" and depth == 1:
            key = str(value)
        elif ends:
            base = 1
        elif key == array and base == 1:
            if event != "start_array" or seen:
                raise SteerbackError(f"{where}: {array} must be one list")
            base, seen = 2, True
        else:
            builder = ijson.ObjectBuilder()
            builder.event(event, value)
        depth += starts
        if builder is not None and depth == base:
            yield key, builder.value
            builder = None
