"""A run's folder: its lock, its ledger, its config and its manifest. It starts nothing and judges nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from steerback.config import RunConfig, differences, parse_config
from steerback.errors import SteerbackError
from steerback.readers import read_json_table
from steerback.records import Spend
from steerback.store.facts import CONFIG, JUDGE_SPEND
from steerback.store.files import clear_leftovers, make_folder
from steerback.store.files import write_atomic as write_atomic
from steerback.store.files import write_json as write_json
from steerback.store.ledger import Ledger
from steerback.store.manifest import Parts, manifest

LONGEST_NAME = 200
"""Bytes of a run's name: file systems allow 255, and names of figures are longer than the run's."""


class Run:
    """An open run, locked by this process until `close`. Usable as a context manager."""

    def __init__(self, folder: Path, config: RunConfig, ledger: Ledger, lock: IO[str] | None) -> None:
        self.folder, self.config, self.ledger, self._lock = folder, config, ledger, lock

    @classmethod
    def start(cls, folder: Path, config: RunConfig) -> Run:
        """Creates the run, or reopens it when it was started with the same config."""
        _name_is_plain(folder.name)
        make_folder(folder, "choose another --runs")
        lock = _acquire(folder)
        clear_leftovers(folder)
        try:
            ledger = Ledger(folder / "ledger.sqlite")
        except BaseException:
            lock.close()
            raise
        run = cls(folder, config, ledger, lock)
        try:
            run._keep_config()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reopen(cls, folder: Path) -> Run:
        """An existing run with the config it was started with, locked for going on."""
        return cls.start(folder, stored_config(folder))

    @classmethod
    def read(cls, folder: Path) -> Run:
        """An existing run for reading; takes no lock, so it works while the run is going on."""
        config = stored_config(folder)
        return cls(folder, config, Ledger(folder / "ledger.sqlite", read_only=True), None)

    def _keep_config(self) -> None:
        stored = self.ledger.get("", CONFIG)
        if stored is None:
            self.ledger.put("", CONFIG, self.config.model_dump(mode="json"))
            return
        changed = differences(parse_config(stored, f"config of {self.folder}"), self.config)
        if (
            changed and not self.ledger.stage_sizes() and len(self.ledger.facts()) == 1
        ):  # it came to nothing: start anew
            self.ledger.put("", CONFIG, self.config.model_dump(mode="json"))
        elif changed:
            raise SteerbackError(
                f"run {self.folder.name!r} was started with another config ({'; '.join(changed)}); "
                "choose another --name, or resume it as it was: steerback resume " + self.folder.name
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.ledger.close()
        if self._lock is not None:
            self._lock.close()

    def judge(self, name: str | None = None) -> str:
        """The judge whose verdicts are read: `name`, else the run's. Raises SteerbackError if it judged nothing."""
        chosen, known = name or self.config.judge, self.ledger.judges()
        if known and chosen not in known:
            raise SteerbackError(f"judge {chosen!r} has judged nothing in this run; there are: {', '.join(known)}")
        return chosen

    def write_manifest(self, parts: Parts) -> Path:
        """Write `manifest.json`: config, versions, commit, machine, and `parts` (targets, engines, judge, prompts)."""
        return write_json(self.folder / "manifest.json", manifest(self.config, parts))

    def add_spend(self, name: str, spent: Spend) -> None:
        """Adds to what a judge of this run has been paid."""
        stored = self.ledger.get("", JUDGE_SPEND)
        paid = dict(stored or {})
        paid[name] = paid.get(name, Spend()) + spent
        self.ledger.put("", JUDGE_SPEND, paid)
        self.amend_manifest({"judge spend": JUDGE_SPEND.dump(paid)})

    def amend_manifest(self, parts: Parts) -> None:
        """Set `parts` in the existing manifest; an imported run has none, and gets none."""
        path = self.folder / "manifest.json"
        if path.is_file():
            write_json(path, {**read_json_table(path, "manifest"), **parts})


def stored_config(folder: Path) -> RunConfig:
    """The config a run was started with."""
    if not os.path.isfile(folder / "ledger.sqlite"):
        siblings = sorted(p.parent.name for p in folder.parent.glob("*/ledger.sqlite"))
        known = f"runs there: {', '.join(siblings)}" if siblings else "there are no runs there"
        raise SteerbackError(f"no run {folder.name!r} in {folder.parent} ({known})")
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        stored = ledger.get("", CONFIG)
    if stored is None:
        if (folder / "manifest.json").is_file():
            raise SteerbackError(
                f"run {folder.name!r}: ledger.sqlite is empty beside a manifest; put back a copy of it"
            )
        raise SteerbackError(f"run {folder.name!r} holds no config: it was stopped before it began; run it again")
    return parse_config(stored, f"config of {folder}")


def find_run(name_or_path: str, root: Path) -> Path:
    """The folder of a run given by name (under `root`) or by path."""
    path = Path(name_or_path)
    if os.path.isfile(path / "ledger.sqlite"):  # unlike Path.is_file, False for a name that no file can have
        return path
    return root / name_or_path


def finished_runs(names: Sequence[str] | None, root: Path) -> list[Path]:
    """The folders of the named runs, or of all finished ones under `root`."""
    if names:
        return [find_run(name, root) for name in names]
    finished = sorted(path.parent for path in root.glob("*/summary.json") if (path.parent / "ledger.sqlite").is_file())
    if not finished:
        raise SteerbackError(f"no finished run in {root}; name runs, or say where they are with --runs")
    return finished


def new_run(name: str, root: Path) -> Path:
    """Return the folder of a run to be made under `root`. Raises SteerbackError for a name that is no file name."""
    _name_is_plain(name)
    return root / name


@contextmanager
def new_or_nothing(folder: Path) -> Iterator[None]:
    """Remove a run's folder if what is done inside fails and the folder did not exist before."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def plain(text: str) -> str:
    """Return the text with `_` for each character that a run's name may not hold."""
    return re.sub(r"[^\w.@+-]", "_", text).lstrip(".")


def _acquire(folder: Path) -> IO[str]:
    try:  # never through a link, which could name any file of the user's
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        lock = open(handle, "r+")  # noqa: SIM115 - held open for the life of the run
    except OSError as error:
        why = "its .lock is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
        raise SteerbackError(f"run folder {folder} cannot be written: {why}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise SteerbackError(
            f"run {folder.name!r} is already going on in process {holder}; wait for it or choose another --name"
        ) from None
    try:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except OSError as error:
        lock.close()
        raise SteerbackError(f"run folder {folder} cannot be written: {error.strerror}") from None
    return lock


def _name_is_plain(name: str) -> None:
    if not re.fullmatch(r"[\w.@+-]+", name) or name.startswith(".") or len(name.encode()) > LONGEST_NAME:
        raise SteerbackError(
            f"run name {name[:80]!r} may hold letters, digits and . _ - @ + only, not start with a dot, and have at "
            f"most {LONGEST_NAME} bytes"
        )
