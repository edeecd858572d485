"""Run folder: lock, ledger, config and manifest. This module generates and judges nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from steerback.config import RunConfig, differences, parse_config
from steerback.errors import SteerbackError, did_you_mean
from steerback.readers import read_json_table
from steerback.records import Spend
from steerback.store.facts import CONFIG, JUDGE_SPEND, Fact
from steerback.store.files import clear_leftovers, make_folder
from steerback.store.files import write_atomic as write_atomic
from steerback.store.files import write_json as write_json
from steerback.store.ledger import Ledger
from steerback.store.manifest import Parts, manifest

T = TypeVar("T")

LONGEST_NAME = 200
"""Most bytes in a run's name. File systems allow 255, and the names of figures are longer than the run's."""


class Run:
    """Open run, locked by this process until `close`. Usable as a context manager."""

    def __init__(self, folder: Path, config: RunConfig, ledger: Ledger, lock: IO[str] | None) -> None:
        self.folder, self.config, self.ledger, self._lock = folder, config, ledger, lock

    @classmethod
    def start(cls, folder: Path, config: RunConfig) -> Run:
        """Create the run, or reopen it if it has the same config."""
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
        """Open an existing run with its stored config and lock it."""
        return cls.start(folder, stored_config(folder))

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Open an existing run for reading. It takes no lock, so it also works while another process runs it."""
        config = stored_config(folder)
        return cls(folder, config, Ledger(folder / "ledger.sqlite", read_only=True), None)

    def _keep_config(self) -> None:
        stored = self.ledger.get("", CONFIG)
        if stored is None:
            self.ledger.put("", CONFIG, self.config.model_dump(mode="json"))
            return
        changed = differences(parse_config(stored, f"config of {self.folder}"), self.config)
        only_config = not self.ledger.stage_sizes() and len(self.ledger.facts()) == 1
        if changed and only_config:  # nothing was planned yet, so the new config replaces the old one
            self.ledger.put("", CONFIG, self.config.model_dump(mode="json"))
        elif changed:
            raise SteerbackError(
                f"run {self.folder.name!r} was started with another config ({'; '.join(changed)}); "
                "choose another --name, or continue it unchanged: steerback resume " + self.folder.name
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
        """Return the judge whose verdicts are read (default: the run's). Raises SteerbackError if it judged nothing."""
        chosen, known = self.config.judge if name is None else name, self.ledger.judges()
        if known and chosen not in known:
            raise SteerbackError(f"judge {chosen!r} has judged nothing in this run; choose one of: {', '.join(known)}")
        return chosen

    def write_manifest(self, parts: Parts) -> Path:
        """Write `manifest.json`: config, versions, commit, machine, and `parts` (targets, engines, judge, prompts)."""
        return write_json(self.folder / "manifest.json", manifest(self.config, parts))

    def add_spend(self, name: str, spent: Spend) -> None:
        """Add to the spending of a judge of this run."""
        stored = self.ledger.get("", JUDGE_SPEND)
        paid = dict(stored or {})
        paid[name] = paid.get(name, Spend()) + spent
        self.ledger.put("", JUDGE_SPEND, paid)
        self.amend_manifest({"judge spend": JUDGE_SPEND.dump(paid)})

    def amend_manifest(self, parts: Parts) -> None:
        """Set `parts` in the existing manifest. An imported run without a manifest gets none."""
        path = self.folder / "manifest.json"
        if path.is_file():
            write_json(path, {**read_json_table(path, "manifest"), **parts})


def stored_config(folder: Path) -> RunConfig:
    """Return the config that a run was started with. Raises SteerbackError if the folder contains no such run."""
    if not os.path.isfile(folder / "ledger.sqlite"):
        siblings = sorted(p.parent.name for p in folder.parent.glob("*/ledger.sqlite"))
        known = f"existing runs: {', '.join(siblings)}" if siblings else "it contains no runs"
        raise SteerbackError(f"no run {folder.name!r} in {folder.parent};{did_you_mean(folder.name, siblings)} {known}")
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        stored = ledger.get("", CONFIG)
    if stored is None:
        if (folder / "manifest.json").is_file():
            raise SteerbackError(
                f"run {folder.name!r} has a manifest, but its ledger.sqlite is empty; restore it from a copy"
            )
        raise SteerbackError(f"run {folder.name!r} has no config: it was stopped before it started; run it again")
    return parse_config(stored, f"config of {folder}")


def find_run(name_or_path: str, root: Path) -> Path:
    """Return the folder of a run, from its name (under `root`) or its path."""
    path = Path(name_or_path)
    if os.path.isfile(path / "ledger.sqlite"):  # Path.is_file would raise for a name that no file can have
        return path
    return root / name_or_path


def finished_runs(names: Sequence[str] | None, root: Path) -> list[Path]:
    """Return the folders of the named runs, or of all finished runs under `root`."""
    if names:
        return [find_run(name, root) for name in names]
    finished = sorted(path.parent for path in root.glob("*/summary.json") if (path.parent / "ledger.sqlite").is_file())
    if not finished:
        raise SteerbackError(f"no finished run in {root}; name the runs, or set their folder with --runs")
    return finished


def new_run(name: str, root: Path) -> Path:
    """Return the folder of a new run under `root`. Raises SteerbackError if the name cannot be a file name."""
    _name_is_plain(name)
    return root / name


@contextmanager
def new_or_nothing(folder: Path) -> Iterator[None]:
    """Remove a new run's folder if the code in the block fails. A folder that existed before stays."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def plain(text: str) -> str:
    """Return the text with `_` in place of each character that a run's name may not contain."""
    return re.sub(r"[^\w.@+-]", "_", text).lstrip(".-")


def _acquire(folder: Path) -> IO[str]:
    try:  # O_NOFOLLOW: a symbolic link could point to any file of the user, and so could a hard link
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        lock = open(handle, "r+")  # noqa: SIM115 - stays open as long as the run
    except OSError as error:
        why = "its .lock is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
        raise SteerbackError(f"run folder {folder} cannot be written: {why}") from None
    if os.fstat(handle).st_nlink > 1:
        lock.close()
        raise SteerbackError(f"run folder {folder} cannot be written: its .lock is a hard link; remove it")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise SteerbackError(
            f"run {folder.name!r} is in use by process {holder}; wait for it or choose another --name"
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
    if not re.fullmatch(r"[\w.@+-]+", name) or name.startswith((".", "-")) or len(name.encode()) > LONGEST_NAME:
        raise SteerbackError(
            f"run name {name[:80]!r} may contain only letters, digits and . _ - @ +, not begin with . or -, "
            f"and have at most {LONGEST_NAME} bytes"
        )


def fact_of(folder: Path, target: str, fact: Fact[T]) -> tuple[T | None, str | None]:
    """Return a fact of another run (None if absent), and the folder of the run that it starts from (None if none)."""
    with Ledger(folder / "ledger.sqlite", read_only=True) as other:
        earlier = (other.get("", CONFIG) or {}).get("from_run")
        return other.get(target, fact), earlier if isinstance(earlier, str) else None
