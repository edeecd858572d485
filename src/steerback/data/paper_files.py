"""The authors' public data: fetched by the user into the user's own folder, never a part of this package.

Files are those of one commit of the authors' repository, told by their SHA-256, so what the preset `authors` reads is
the same on every machine. It knows addresses and hashes; how to download is told to it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from steerback.errors import SteerbackError, docs_page
from steerback.store.files import user_folder, write_json

REPOSITORY = "agencyenterprise/endogenous-steering-resistance"
COMMIT = "3c29a49f9077fa1df58f5e90b5cca7ae8621311c"
RAW = "https://raw.githubusercontent.com"
PROMPTS, DETECTORS = "prompts.txt", "off_topic_detectors.json"


@dataclass(frozen=True, slots=True)
class PaperFile:
    """A file of the repository and what it is."""

    path: str
    sha256: str
    what: str


FILES: Mapping[str, PaperFile] = {
    PROMPTS: PaperFile(
        "data/prompts.txt",
        "a3bcbf82a44046c3fdcb9b65c58b1254ee8976401214533a5a550f0aa00a55d3",
        "the 38 object-level prompts",
    ),
    DETECTORS: PaperFile(
        "data/off_topic_detectors.json",
        "039262871625ee5d66575594ef97f9dff216d9c8df23715757fd2b38f99188b9",
        "the 25 off-topic detectors of Llama-3.3-70B",
    ),
}

LABELLED = ("gemma-2-2b@authors", "gemma-2-9b@authors", "gemma-2-27b@authors")
"""Targets whose labels the authors take from Neuronpedia; those of the Llama models are not in their repository."""

Fetch = Callable[[str, Path, str], object]
"""Downloads (address, destination, SHA-256), whole or not at all."""


def folder() -> Path:
    """`$STEERBACK_PAPER_DATA`, else `paper-data` in the user's folder."""
    chosen = os.environ.get("STEERBACK_PAPER_DATA")
    return Path(chosen).expanduser() if chosen else user_folder("paper-data")


def fetch(download: Fetch) -> dict[str, Path]:
    """Downloads what is not there, checks all of it, and notes where it is from in `source.json` beside it."""
    place = folder()
    found = {}
    for name, file in FILES.items():
        download(f"{RAW}/{REPOSITORY}/{COMMIT}/{file.path}", place / name, file.sha256)
        found[name] = path_of(name)
    hashes = {name: file.sha256 for name, file in FILES.items()}
    write_json(place / "source.json", {"repository": REPOSITORY, "commit": COMMIT, "sha256": hashes})
    return found


def used(prompts: str, detectors: object) -> dict[str, str]:
    """Which of the files a run with these settings reads, with their hashes."""
    read = {PROMPTS: prompts == "authors", DETECTORS: detectors == str(folder() / DETECTORS)}
    return {name: FILES[name].sha256 for name, is_read in read.items() if is_read}


def path_of(name: str) -> Path:
    """A fetched file; SteerbackError where it is not there or not the one of the authors' repository."""
    path = folder() / name
    if not path.is_file():
        raise SteerbackError(
            f"preset authors needs {FILES[name].what}, which this package does not hold: "
            f"run steerback fetch-paper-data (or name your own, see {docs_page('paper-data')})"
        )
    stat = path.stat()
    if _sha256(path, stat.st_mtime_ns, stat.st_size) != FILES[name].sha256:
        raise SteerbackError(f"{path} is not the authors' file: delete it and run steerback fetch-paper-data")
    return path


@lru_cache(maxsize=8)
def _sha256(path: Path, _changed: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
