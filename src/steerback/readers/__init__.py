"""Readers of users' files, one per format. Each defect raises a SteerbackError that names the file.

`what` and `where` describe the file in messages, e.g. "config file". The results contain only plain values (`Json`) of
limited depth and size, and only text that can be encoded as UTF-8.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import select
import stat
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import yaml

from steerback.errors import SteerbackError, one_line

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

LARGEST = 2**30
"""Size limit of a file in bytes."""
LARGEST_SETTINGS = 2**22
"""Size limit of a YAML or TOML file in bytes; their parsers are slow."""
LONGEST_HEADER = 100_000_000
"""Size limit of a safetensors header in bytes, equal to that of the safetensors library."""
DEEPEST, MOST_NODES, WIDEST_INTEGER = 64, 100_000, 1000
"""Limits: levels of nesting, values in a YAML file (its aliases can multiply), bits of an integer (float has 1,024)."""
GZIP = b"\x1f\x8b"
"""First bytes of a gzip file. No UTF-8 text starts with them."""
PATIENCE = 10.0
"""Seconds to wait for data from a pipe."""


def read_bytes(path: Path, what: str, largest: int = LARGEST) -> bytes:
    """Return the content of a file or pipe. Raises SteerbackError if it has more than `largest` bytes."""
    where = f"{what} {path}"
    with opened(path, what) as file:
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        content = file.read(largest + 1) if regular else _from_pipe(file.fileno(), where, largest)
    if len(content) > largest:
        raise SteerbackError(f"{where} is larger than the limit of {largest:,} bytes")
    return content


@contextmanager
def opened(path: Path, what: str) -> Iterator[io.FileIO]:
    """Open a file without blocking on pipes. Any OSError until it is closed becomes a SteerbackError."""
    try:
        with io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            yield file
    except FileNotFoundError:
        raise SteerbackError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise SteerbackError(f"{what} {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise SteerbackError(f"{what} {str(path)!r} cannot be read: its name contains a NUL character") from None


def _from_pipe(handle: int, where: str, largest: int) -> bytes:
    content = b""
    while len(content) <= largest:
        if not select.select([handle], [], [], PATIENCE)[0]:
            raise SteerbackError(f"{where} is a pipe without data for {PATIENCE:g} seconds; use a file")
        part = os.read(handle, 2**20)
        if not part:
            break
        content += part
    return content


def read_text(path: Path, what: str, largest: int = LARGEST) -> str:
    """Return the text of a UTF-8 file, plain or gzip, without a byte-order mark."""
    where = f"{what} {path}"
    content = read_bytes(path, what, largest)
    return decode(unpacked(content, where, largest) if content.startswith(GZIP) else content, where)


def unpacked(content: bytes, where: str, largest: int = LARGEST) -> bytes:
    """Decompress gzip data. Raises SteerbackError if it is damaged or its content exceeds `largest` bytes."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            plain = file.read(largest + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SteerbackError(f"{where} is damaged: {error}; fetch or compress it again") from None
    if len(plain) > largest:
        raise SteerbackError(f"{where} unpacks to more than the limit of {largest:,} bytes")
    return plain


def decode(content: bytes, where: str) -> str:
    """Return UTF-8 text, without a byte-order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SteerbackError(f"{where} cannot be read as UTF-8 text: {error}") from None
    if "\0" in text:
        raise SteerbackError(f"{where} is not a text file: it contains a NUL character")
    return text


def read_lines(path: Path, what: str) -> list[str]:
    """Return the stripped lines of a text file, without blank lines and comments (`#`)."""
    return content_lines(read_text(path, what))


def content_lines(text: str) -> list[str]:
    """Return the stripped lines of a text, without blank lines and comments (`#`)."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def read_json(path: Path, what: str) -> Json:
    """Return the value in a JSON file."""
    return parse_json(read_text(path, what), f"{what} {path}")


def read_json_table(path: Path, what: str) -> dict[str, Json]:
    """Return the object in a JSON file."""
    return _table(read_json(path, what), f"{what} {path}")


def read_json_lines(path: Path, what: str) -> Iterator[tuple[str, Json]]:
    """Yield (file and line, value) for each non-blank line of a JSON lines file."""
    yield from parse_json_lines(read_text(path, what), f"{what} {path}")


def parse_json_lines(text: str, where: str) -> Iterator[tuple[str, Json]]:
    """Yield (file and line, value) for each non-blank line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield (place := f"{where}, line {number}"), parse_json(line, place)


def parse_json(text: str, where: str) -> Json:
    """Return the value of a JSON text. NaN and Infinity are valid, because Python's `json` writes them."""
    try:
        value: Json = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise SteerbackError(f"{where} is not valid JSON: {reason_of(error)}") from None
    return checked(value, where)


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} occurs twice in one object")
    return table


_TOML_TEXT = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_TOML_BETWEEN_KEYS = re.compile(r"[=,{}#\n]")


def read_toml(path: Path, what: str) -> dict[str, Json]:
    """Return the tables of a TOML file."""
    where = f"{what} {path}"
    text = read_text(path, what, LARGEST_SETTINGS)
    parts = _TOML_BETWEEN_KEYS.split(_TOML_TEXT.sub("", text))
    if any(part.count(".") > DEEPEST for part in parts):  # the parser takes quadratic time for a dotted key
        raise SteerbackError(f"{where} is not valid TOML: it is nested too deeply")
    try:
        value: Json = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteerbackError(f"{where} is not valid TOML: {reason_of(error)}") from None
    return _table(checked(value, where), where)


def read_yaml(path: Path, what: str) -> dict[str, Json]:
    """Return the settings of a YAML file of `key: value` lines."""
    where = f"{what} {path}"
    value = parse_yaml(read_text(path, what, LARGEST_SETTINGS), where)
    if not isinstance(value, dict):
        raise SteerbackError(f"{where} must contain `setting: value` lines, not a {type(value).__name__}")
    return value


def parse_yaml(text: str, where: str) -> Json:
    """Return the value of a YAML text. `off`, `no` and dates are text, and 1e-4 is a number."""
    try:
        value: Json = yaml.load(text, Loader=_Yaml)  # safe: a SafeLoader creates plain values only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SteerbackError(f"{where} is not valid YAML: {reason_of(error)}") from None
    return checked(value, where, MOST_NODES)


class _Yaml(yaml.SafeLoader):
    """YAML loader with `true` and `false` as the only booleans, and with unique keys.

    Dates, times and merge keys (`<<`) are text. There are no tags. Times would be integers to the base 60, which take
    quadratic time to read, and merge keys can multiply without limit.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        key, count = keys.most_common(1)[0] if keys else ("", 0)
        if count > 1:
            raise ValueError(f"key {key!r} occurs twice{node.start_mark}")
        built: dict[object, object] = super().construct_mapping(node, deep)
        return built

    def fetch_flow_collection_start(self, kind: type[yaml.Token]) -> None:
        if self.flow_level == DEEPEST:  # the scanner takes quadratic time for open brackets
            raise RecursionError
        super().fetch_flow_collection_start(kind)

    def fetch_tag(self) -> None:
        raise ValueError(f"tags are not supported; write text in quotes{self.get_mark()}")


_REPLACED = {
    "bool": (r"^(?:true|True|false|False)$", "tTfF"),
    "int": (r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+|0|[1-9][0-9_]*)$", "-+0123456789"),
    "float": (
        r"^[-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
    "timestamp": (None, ""),
    "merge": (None, ""),
}
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _REPLACED.items():
    if _pattern:
        _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


def read_safetensors_header(path: Path, what: str) -> dict[str, dict[str, Json]]:
    """Return the header of a safetensors file: dtype, shape and offsets of each tensor, and `__metadata__`."""
    where = f"{what} {path}"
    with opened(path, what) as file:
        size = int.from_bytes(file.read(8), "little")
        content = file.read(size) if size <= min(LONGEST_HEADER, os.fstat(file.fileno()).st_size) else b""
    if len(content) != size:
        raise SteerbackError(f"{where} is not a safetensors file: its header of {size:,} bytes is missing")
    header = _table(parse_json(decode(content, where), where), where)
    return {name: _table(entry, f"{where}: {name!r}") for name, entry in header.items()}


def read_address(text: str, where: str) -> SplitResult:
    """Return the parts of an http(s) address. Raises SteerbackError for any other text."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises ValueError for a port above 65535
    except ValueError as error:
        raise SteerbackError(f"{where}: {text!r} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not text.isprintable() or " " in text:
        raise SteerbackError(f"{where}: {text!r} is not an address of the form https://host/path")
    return parts


def _table(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise SteerbackError(f"{where} must contain an object with named values, not a {type(value).__name__}")
    return value


def checked(value: Json, where: str, most: int | None = None) -> Json:
    """Return a parsed value. Raises SteerbackError if it is too deep or too large, or has invalid keys or text."""
    waiting: list[tuple[object, int]] = [(value, 0)]
    seen = 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST or (most is not None and seen > most):
            limit = f"more than {DEEPEST} levels" if depth > DEEPEST else f"more than {most:,} values"
            raise SteerbackError(f"{where} contains {limit}")
        if isinstance(item, dict):
            wrong = next((key for key in item if not isinstance(key, str)), None)
            if wrong is not None or None in item:
                raise SteerbackError(f"{where} has the key {wrong!r}, which is not text; write it in quotes")
            waiting.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            waiting.extend((part, depth + 1) for part in item)
        elif isinstance(item, str):
            _check_text(item, where)
        elif isinstance(item, int):
            if item.bit_length() > WIDEST_INTEGER:
                raise SteerbackError(f"{where} contains an integer of more than {WIDEST_INTEGER} bits")
        elif not (item is None or isinstance(item, float)):
            raise SteerbackError(f"{where} contains a {type(item).__name__}; write it as text, in quotes")
    return value


def _check_text(text: str, where: str) -> None:
    if "\0" in text:
        raise SteerbackError(f"{where} contains a text with a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SteerbackError(f"{where} contains a text with half of a surrogate pair") from None


def reason_of(error: Exception) -> str:
    """Return a library's message in one line. Python's advice about long integers does not help users."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    message = one_line(error)[:300]
    return "an integer has too many digits" if "integer string conversion" in message else message
