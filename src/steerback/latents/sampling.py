"""Choose the latents to steer with: a stratified draw, or the user's list.

This module works on indices; `selection` decides which indices are candidates.

    chosen = sample_latents(candidates, 50, seed=42)     # spread over the index range
    listed = parse_latents("volcanoes, 17", labels)      # (24, 17)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from steerback import readers
from steerback.errors import SteerbackError
from steerback.records import LatentKey


def sample_latents(candidates: Sequence[int], n: int, seed: int = 42) -> tuple[int, ...]:
    """Draw `n` of `candidates`, one at random from each of n equal strata; return them in ascending order.

    Strata are consecutive parts of the candidates in index order, so that every part of the feature space is
    represented. All candidates are returned if there are at most `n`.
    """
    if n < 1:
        raise SteerbackError(f"cannot choose {n} latents; ask for at least 1")
    unique = sorted(set(candidates))
    if len(unique) <= n:
        return tuple(unique)
    edges = [i * len(unique) // n for i in range(n + 1)]
    generator = np.random.default_rng(seed)
    drawn = [unique[int(generator.integers(a, b))] for a, b in pairwise(edges)]
    return tuple(sorted(drawn))


def parse_latents(
    text: str, labels: Mapping[int, str], n_latents: int | None = None, directions: Collection[str] = ()
) -> int | tuple[LatentKey, ...]:
    """Parse the value of `--latents`: an integer is the number of latents to draw, anything else lists latents.

    A list is comma-separated ("12, volcanoes, 400"; "12," for the single latent 12), a file with one entry per line
    ('#' starts a comment), or a file with a JSON list. Entries are indices, labels of exactly one latent (any case), or
    names of directions. Raises SteerbackError that names the wrong entry.
    """
    stripped = text.strip()
    if not stripped:
        raise SteerbackError("--latents is empty; give a number, a list (12, volcanoes) or a file")
    if _is_index(stripped):
        if int(stripped) < 1:
            raise SteerbackError(f"--latents {stripped}: ask for at least 1 latent")
        return int(stripped)
    entries, where = _entries(stripped, labels)
    return tuple(check_latents(entries, labels, n_latents, directions, where))


def check_latents(
    entries: Sequence[object],
    labels: Mapping[int, str],
    n_latents: int | None = None,
    directions: Collection[str] = (),
    where: str = "latents",
) -> list[LatentKey]:
    """Resolve listed latents to keys. Raises SteerbackError for repetitions, and for indices beyond `n_latents`."""
    if not entries:
        raise SteerbackError(f"{where}: no latent is named; give indices, labels or names of directions")
    keys = [_resolve(entry, labels, n_latents, directions, where) for entry in entries]
    seen: dict[LatentKey, object] = {}
    for entry, key in zip(entries, keys, strict=True):
        if key in seen:
            raise SteerbackError(f"{where}: latent {key!r} is named twice ({seen[key]!r} and {entry!r}); keep one")
        seen[key] = entry
    return keys


def _resolve(
    entry: object, labels: Mapping[int, str], n_latents: int | None, directions: Collection[str], where: str
) -> LatentKey:
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise SteerbackError(f"{where}: {entry!r} is not an index, a label or the name of a direction")
    if isinstance(entry, int) or _is_index(entry):
        index = int(entry)
        if index < 0 or (n_latents is not None and index >= n_latents):
            upper = "" if n_latents is None else f" to {n_latents - 1}"
            raise SteerbackError(f"{where}: there is no latent {index}; indices run from 0{upper}")
        return index
    if entry in directions:
        return entry
    wanted = entry.strip().casefold()
    matches = [index for index, label in labels.items() if label.strip().casefold() == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(map(str, matches[:5]))
        raise SteerbackError(f"{where}: {len(matches)} latents are labelled {entry!r} ({shown}); give the index")
    raise SteerbackError(f"{where}: {entry!r} is not an index, a label or a direction; {_near(wanted, labels)}")


def _near(wanted: str, labels: Mapping[int, str]) -> str:
    """Return a hint with labels that resemble `wanted`, or with the command that lists labels."""
    import difflib

    if not labels:
        return "this target has no labels; give indices"
    by_label = {label.strip().casefold(): index for index, label in labels.items()}
    close = [label for label in by_label if wanted in label][:3] or difflib.get_close_matches(wanted, by_label, 3)
    if not close:
        return "list the labels with: steerback labels show TARGET"
    return "did you mean " + " or ".join(f"{by_label[label]} ({label})" for label in close) + "?"


def _entries(text: str, labels: Mapping[int, str]) -> tuple[Sequence[object], str]:
    """Return the entries of a file or of a comma-separated list, and the name of the source for messages."""
    path = Path(text).expanduser()
    try:
        is_file = path.is_file()
    except OSError:  # too long for a file name, so it is a list
        is_file = False
    if is_file:
        return _read(path), f"latents file {path}"
    if text.casefold() in {label.strip().casefold() for label in labels.values()}:
        return [text], "--latents"  # a label may contain a comma
    if ("/" in text or text.endswith((".txt", ".json", ".csv"))) and "," not in text:
        raise SteerbackError(f"--latents: file {text} does not exist")
    return [part.strip() for part in text.split(",") if part.strip()], "--latents"


def _read(path: Path) -> Sequence[object]:
    content = readers.read_text(path, "latents file")
    if content.lstrip().startswith("["):
        listed = readers.parse_json(content, f"latents file {path}")
        return listed if isinstance(listed, list) else []
    lines = [line.split("#", 1)[0].strip() for line in content.splitlines()]
    entries: list[str] = []
    for line in filter(None, lines):
        # a line with other entries than indices is one label, which may contain commas
        parts = [part.strip() for part in line.split(",") if part.strip()]
        entries.extend(parts if all(_is_index(part) for part in parts) else [line])
    return entries


def _is_index(text: str) -> bool:
    return text.removeprefix("-").isdecimal() and text.isascii()
