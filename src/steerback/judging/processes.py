"""Other processes that judge, so that an engine's driver keeps its own process; they know no particular judge."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from steerback.judging.base import JudgeItem
from steerback.store.processes import helpers

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

CORES, MOST = 2, 8
"""Cores for each process, and the largest number of processes. One fewer starts: its cores are for the engine."""

J = TypeVar("J")
T = TypeVar("T")


class Processes(Generic[J]):
    """Processes with a judge each; their number follows from the cores that this process may use.

    They start in the background and end with this process.
    """

    def __init__(self, make: Callable[[], J]) -> None:
        """Start them; each makes its judge by a call of `make`, which is pickled."""
        from joblib.externals import loky

        self._parent = os.getpid()
        self._pool: Executor | None = None
        self._started: Future[int] | None = None
        if (begun := helpers(min(loky.cpu_count() // CORES - 1, MOST), partial(_begin, make))) is not None:
            self._pool, self._started = begun

    def starting(self) -> Future[int] | None:
        """Return what is done when the first process has started; None if there are none, or if this is a fork."""
        return self._started if self._pool is not None and os.getpid() == self._parent else None

    def start(
        self, work: Callable[[J, Sequence[JudgeItem]], Sequence[T]], batch: Sequence[JudgeItem]
    ) -> Future[Sequence[T]] | None:
        """Let a process judge a batch; None if there is none, or none has started yet, or this is a fork."""
        if self._pool is None or (starting := self.starting()) is None or not starting.done():
            return None
        return self._pool.submit(_work, work, batch)

    def stop(self) -> None:
        """Use the processes no more, because one of them has ended."""
        self._pool = None


_own: Any
"""The judge of a process of `Processes`."""


def _begin(make: Callable[[], object]) -> None:
    global _own
    _own = make()


def _work(work: Callable[[Any, Sequence[JudgeItem]], Sequence[T]], batch: Sequence[JudgeItem]) -> Sequence[T]:
    return work(_own, batch)
