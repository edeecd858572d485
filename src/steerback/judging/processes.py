"""Other processes that judge, so that an engine's driver keeps its own process; they know no particular judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from steerback.judging.base import JudgeItem
from steerback.store.processes import SharedObject, helpers, shared_object

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

CORES, MOST = 2, 8
"""Cores for each process, and the largest number of processes. One fewer starts: its cores are for the engine."""

J = TypeVar("J")
T = TypeVar("T")

_early: list[Executor] = []
"""Processes that have been started before the judge is known."""


def start_early(module: str) -> None:
    """Start processes that import a module. The next `Processes` use them, and begin seconds earlier."""
    if not _early and (started := helpers(_number(), partial(import_module, module))) is not None:
        _early.append(started)


def _number() -> int:
    from joblib.externals import loky

    return min(int(loky.cpu_count()) // CORES - 1, MOST)


class Processes(Generic[J]):
    """Processes with a judge each; their number follows from the cores that this process may use.

    They start in the background and end with this process.
    """

    def __init__(self, make: Callable[[], J]) -> None:
        """Start them; each makes its judge by a call of `make`, which is pickled."""
        self._parent = os.getpid()
        self._pool = _early.pop() if _early else helpers(_number())
        self._started: Future[None] | None = None
        if self._pool is None:
            return
        try:
            self._make = SharedObject(make)  # each process reads it, so that this one need not send it to each
        except OSError:  # no memory, or no more open files: this process judges
            self._pool = None
        else:
            first, *_ = [self._pool.submit(_begin, self._make.place) for _ in range(_number())]
            self._started = first

    def starting(self) -> Future[None] | None:
        """Return what is done when the first process has its judge; None if there are none, or if this is a fork."""
        return self._started if self._pool is not None and os.getpid() == self._parent else None

    def start(
        self, work: Callable[[J, Sequence[JudgeItem]], Sequence[T]], batch: Sequence[JudgeItem]
    ) -> Future[Sequence[T]] | None:
        """Let a process judge a batch; None if there is none, or none has started yet, or this is a fork."""
        if self._pool is None or (starting := self.starting()) is None or not starting.done():
            return None
        return self._pool.submit(_work, self._make.place, work, batch)

    def stop(self) -> None:
        """Use the processes no more, because one of them has ended."""
        self._pool = None


_own: Any = None
"""The judge of a process of `Processes`."""


def _begin(place: tuple[int, int]) -> None:
    global _own
    if _own is None:
        _own = shared_object(place)()


def _work(
    place: tuple[int, int], work: Callable[[Any, Sequence[JudgeItem]], Sequence[T]], batch: Sequence[JudgeItem]
) -> Sequence[T]:
    _begin(place)
    return work(_own, batch)
