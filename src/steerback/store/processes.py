"""Faster work on large ledgers: a second process, and a pause of the garbage collector."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TypeVar

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


@contextmanager
def _beside(results: Callable[[], Iterable[T]]) -> Iterator[Iterator[T]]:
    """Start a copy of this process and give what it yields, which ends early if the copy fails."""
    source, sink = os.pipe()
    with suppress(OSError):  # the copy can be a megabyte ahead; users have a limit for the sum of their pipes
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 2**20)
    parent, child = os.getpid(), os.fork()
    if not child:
        status = 1
        try:
            end_with(parent)
            os.close(source)
            with os.fdopen(sink, "wb") as file:
                for result in results():
                    pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
                    file.flush()
            status = 0
        finally:
            os._exit(status)
    os.close(sink)

    def received() -> Iterator[T]:
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                yield pickle.load(reader)

    try:
        with os.fdopen(source, "rb") as reader:
            yield received()
    finally:
        os.waitpid(child, 0)


def second_process(work: Callable[[], T], worth: bool = True) -> Callable[[], T]:
    """Start `work` in a copy of this process and return a function that waits for its result.

    `work` opens its own databases. It runs in this process, when the result is requested, if it is not `worth` a
    second process, if `can_fork` is false, or if the second process failed: an error of `work` is then raised here.
    """
    if not (worth and can_fork()):
        return work
    stack = ExitStack()
    received = stack.enter_context(_beside(lambda: [work()]))

    def result() -> T:
        with stack:
            done = [*received]
        return done[0] if done else work()

    return result


def in_turns(work: Callable[[Sequence[Item]], Iterable[T]], items: Sequence[Item], worth: bool = True) -> Iterator[T]:
    """Yield the results of `work`, one for each item, in the order of the items.

    A second process works on every second item, under the conditions of `second_process`.
    """
    if not (worth and can_fork() and len(items) > 1):
        yield from work(items)
        return
    others = items[1::2]

    def theirs(received: Iterator[T]) -> Iterator[T]:
        number = 0
        for result in received:
            number += 1
            yield result
        yield from work(others[number:]) if number < len(others) else ()

    with _beside(lambda: work(others)) as received:
        results = iter(work(items[::2])), theirs(received)
        for number in range(len(items)):
            yield next(results[number % 2])


def in_halves(work: Callable[[Sequence[Item]], T], items: Sequence[Item], worth: bool = True) -> tuple[T, T]:
    """Return the results of `work` for every second item from the first on, and for the others (`second_process`)."""
    rest = second_process(lambda: work(items[1::2]), worth and len(items) > 1)
    return work(items[::2]), rest()
