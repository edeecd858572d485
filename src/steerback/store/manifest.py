"""Manifest of a run: its config and everything its numbers depend on. People and other programs read it; no code here
does.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NotRequired, TypedDict

from steerback.config import RunConfig
from steerback.errors import VERSION

PACKAGES = ("numpy", "scipy", "scikit-learn", "torch", "transformers", "tokenizers", "safetensors", "pydantic")


class SourceTree(TypedDict):
    """Commit of the source tree that the package runs from; `dirty` if its files differ from that commit."""

    revision: str
    dirty: bool


class MachineUsed(TypedDict):
    """Machine type. Generated text depends on it, besides versions and seeds."""

    system: str
    processor: str
    cores: int | None
    threads: NotRequired[int]
    gpus: NotRequired[list[str]]


class PromptsUsed(TypedDict):
    source: str
    count: int
    hash: str


class LabelsUsed(TypedDict):
    count: int
    hash: str


class TargetUsed(TypedDict):
    target: Mapping[str, object]
    labels: LabelsUsed
    engine: Mapping[str, object]


class PaperDataUsed(TypedDict):
    repository: str
    commit: str
    sha256: Mapping[str, str]


class ImportedFile(TypedDict):
    file: str
    sha256: str


Parts = TypedDict(
    "Parts",
    {
        "targets": dict[str, TargetUsed],
        "prompts": PromptsUsed,
        "paper data": PaperDataUsed,
        "judge": Mapping[str, object],
        "judge probes": Mapping[str, str],
        "judges": Mapping[str, Mapping[str, object]],
        "judge spend": object,
        "options": Mapping[str, object],
        "imported": list[ImportedFile],
        "unknown settings": list[str],
    },
    total=False,
)
"""Parts of a manifest that depend on the run's stages; each is known when its stage starts."""


class Manifest(Parts):
    """Content of `manifest.json`."""

    config: Mapping[str, object]
    versions: Mapping[str, str]
    commit: SourceTree | None
    machine: MachineUsed
    written: str


def manifest(config: RunConfig, parts: Parts) -> Manifest:
    """Return the manifest of a run on this machine, with the current time."""
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        **parts,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and the libraries that the numbers depend on."""
    installed = {"python": platform.python_version(), "steerback": VERSION}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def commit() -> SourceTree | None:
    """Return the commit and the dirty flag of the source tree, or None for an installed wheel."""
    source = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # without git, the version number identifies the release
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", __file__)
    revision = git("rev-parse", "HEAD") if tracked else None
    return None if revision is None else {"revision": revision, "dirty": bool(git("status", "--porcelain", "."))}


def machine() -> MachineUsed:
    """Return the type of this machine."""
    used: MachineUsed = {"system": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}
    if "torch" in sys.modules:  # the manifest alone is no reason to import torch
        import torch

        used["threads"] = torch.get_num_threads()
        used["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return used


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    named = re.search(r"model name\s*:\s*(.+)", text)
    return named.group(1).strip() if named else platform.machine()
