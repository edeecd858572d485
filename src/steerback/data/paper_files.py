"""The authors' public data, downloaded by the user into the user's folder; this package contains none of it.

The files come from one commit of the authors' repository and are checked by SHA-256, so the preset `authors` reads the
same data on every machine. This module knows addresses and hashes; the caller passes the download function.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from steerback.errors import SteerbackError, docs_page
from steerback.store.files import until_changed, user_folder, write_json

REPOSITORY = "agencyenterprise/endogenous-steering-resistance"
COMMIT = "3c29a49f9077fa1df58f5e90b5cca7ae8621311c"
RAW = "https://raw.githubusercontent.com"
PROMPTS, DETECTORS = "prompts.txt", "off_topic_detectors.json"


@dataclass(frozen=True, slots=True)
class PaperFile:
    """A file of the repository, with its hash and a description for messages."""

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
"""Targets whose labels the authors take from Neuronpedia; their repository lacks the labels of the Llama models."""

Fetch = Callable[[str, Path, str], object]
"""Function that downloads (address, destination, SHA-256), completely or not at all."""


def folder() -> Path:
    """Return `$STEERBACK_PAPER_DATA`, or else `paper-data` in the user's folder."""
    chosen = os.environ.get("STEERBACK_PAPER_DATA")
    return Path(chosen).expanduser() if chosen else user_folder("paper-data")


def fetch(download: Fetch) -> dict[str, Path]:
    """Download missing files, check all, and record their source in `source.json`; return the path of each file."""
    place = folder()
    for name, file in FILES.items():
        download(f"{RAW}/{REPOSITORY}/{COMMIT}/{file.path}", place / name, file.sha256)
    paths = {name: path_of(name) for name in FILES}
    hashes = {name: file.sha256 for name, file in FILES.items()}
    write_json(place / "source.json", {"repository": REPOSITORY, "commit": COMMIT, "sha256": hashes})
    return paths


def used(prompts: str, detectors: object) -> dict[str, str]:
    """Return the SHA-256 of each file that a run with these settings reads."""
    read = {PROMPTS: prompts == "authors", DETECTORS: detectors == str(folder() / DETECTORS)}
    return {name: FILES[name].sha256 for name, is_read in read.items() if is_read}


def path_of(name: str) -> Path:
    """Return a downloaded file. Raises SteerbackError if it is missing or differs from the authors' file."""
    path = folder() / name
    if not path.is_file():
        raise SteerbackError(
            f"preset authors needs {FILES[name].what}, which this package does not include: "
            f"run steerback fetch-paper-data, or name another file (see {docs_page('paper-data')})"
        )
    if _sha256(path) != FILES[name].sha256:
        raise SteerbackError(f"{path} is not the authors' file: delete it and run steerback fetch-paper-data")
    return path


@until_changed
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
