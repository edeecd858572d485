"""Second processes, and faster work on large ledgers."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import shutil
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the collector of cyclic garbage. Trials have no cycles, and traversing them takes 30 % of their reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def can_fork() -> bool:
    """Return True if a fork can work at the same time: on Linux, with a second core, and before torch is loaded.

    A process with torch's threads cannot be forked safely.
    """
    return sys.platform == "linux" and (os.cpu_count() or 1) > 1 and "torch" not in sys.modules


def end_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, and end at once if the parent has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


IDLE = 120
"""Seconds without work after which a helper ends; the next work starts it again."""
QUIET = "ignore::UserWarning:joblib.externals.loky.backend.resource_tracker"


class SharedObject:
    """A pickled object in shared memory, for processes that this one starts; it is there as long as this exists."""

    def __init__(self, value: object) -> None:
        shared = os.memfd_create("steerback")
        weakref.finalize(self, os.close, shared)
        with open(shared, "wb", closefd=False) as file:
            pickle.dump(value, file, pickle.HIGHEST_PROTOCOL)
        self.place = os.getpid(), shared


def shared_object(place: tuple[int, int]) -> Any:
    """Return a copy of an object that the parent process shares, and that nobody else can have written."""
    parent, shared = place
    with open(f"/proc/{parent}/fd/{shared}", "rb") as file:
        return pickle.load(file)


def helpers(number: int, begin: Callable[[], object] = os.getpid) -> Executor | None:
    """Start processes that each call `begin`, which is pickled; None if there can be none.

    They share nothing with this process and end with it.
    """
    from joblib.externals import loky

    if number < 1 or sys.platform != "linux":  # `end_with` needs Linux
        return None
    warned = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = QUIET  # a killed run would end with loky's report of its semaphores
    try:
        known = os.getpid(), begin
        executor: Executor = loky.ProcessPoolExecutor(number, timeout=IDLE, initializer=_begin, initargs=known)
        executor.submit(os.getpid)  # they start now, in this environment
        return executor
    except OSError:  # no semaphores or no more processes here
        return None
    finally:
        del os.environ["PYTHONWARNINGS"]
        if warned is not None:
            os.environ["PYTHONWARNINGS"] = warned


def _begin(parent: int, begin: Callable[[], object]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    end_with(parent)
    begin()


def second_process(work: Callable[[], T], worth: bool = True) -> Callable[[], T]:
    """Start `work` in a copy of this process and return a function that waits for its result.

    `work` opens its own databases. It runs in this process, when the result is requested, if it is not `worth` a
    second process, if `can_fork` is false, or if the second process failed: an error of `work` is then raised here.
    """
    if not (worth and can_fork()):
        return work
    source, sink = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        status = 1
        try:
            end_with(parent)
            os.close(source)
            with os.fdopen(sink, "wb") as file:
                pickle.dump(work(), file, pickle.HIGHEST_PROTOCOL)
            status = 0
        finally:
            os._exit(status)
    os.close(sink)

    def result() -> T:
        with os.fdopen(source, "rb") as file:
            content = file.read()
        if os.waitpid(child, 0)[1]:
            return work()
        value: T = pickle.loads(content)
        return value

    return result


def in_halves(work: Callable[[Sequence[Item]], T], items: Sequence[Item], worth: bool = True) -> tuple[T, T]:
    """Return the results of `work` for every second item from the first on, and for the others (`second_process`)."""
    rest = second_process(lambda: work(items[1::2]), worth and len(items) > 1)
    return work(items[::2]), rest()


def write_by_two(
    file: BinaryIO, folder: Path, parts: Callable[[Sequence[Item]], Iterable[bytes]], items: Sequence[Item], worth: bool
) -> None:
    """Write the `parts` of all items into a file, one after the other.

    A second process writes those of the second half (`second_part`). `parts` opens its own databases.
    """
    middle = (len(items) + 1) // 2 if worth and can_fork() else len(items)
    with second_part(folder, lambda part: part.writelines(parts(items[middle:])), middle < len(items)) as append_rest:
        file.writelines(parts(items[:middle]))
        append_rest(file)


@contextmanager
def second_part(
    folder: Path, write: Callable[[BinaryIO], object], worth: bool = True
) -> Iterator[Callable[[BinaryIO], None]]:
    """Let a second process (`second_process`) `write` a part of a file into a temporary file in `folder`.

    Yields a function that waits for the process and appends the part to a file.
    """
    with tempfile.TemporaryFile(dir=folder) as part:

        def write_part() -> None:
            part.seek(0)
            part.truncate()
            write(part)
            part.flush()

        wait = second_process(write_part, worth)

        def append(file: BinaryIO) -> None:
            wait()
            part.seek(0)
            shutil.copyfileobj(part, file, 2**20)

        yield append
