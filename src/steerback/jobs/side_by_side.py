"""Do the work of small models on a CPU in several processes: the targets of a run, or the steps of a campaign.

A model of this size uses one core, and batches in one process would compete for Python's interpreter lock. Responses
are the same as in one process, because they depend only on the batch shape.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Generic, TypeVar

from steerback.engines import TransformersOptions, make_engine
from steerback.engines.options import SMALL
from steerback.errors import SteerbackError
from steerback.store.processes import can_fork, end_with
from steerback.targets.fit import gpus

if TYPE_CHECKING:
    from steerback.jobs.check import PreparedRun

T = TypeVar("T")
R = TypeVar("R")


def possible(job: PreparedRun) -> bool:
    """Return True if parts of the job can be done in parallel: small models on the CPU, and a free judge.

    The process must be able to fork (`can_fork`).
    """
    options = job.engine
    return (
        can_fork()
        and job.makers.engine is make_engine
        and job.config.judge.startswith("offline")
        and isinstance(options, TransformersOptions)
        and options.workers is None
        and (options.device == "cpu" or (options.device is None and not gpus()))
        and all(t.adapter is None and (t.parameters() or SMALL) < SMALL for t in job.targets)
    )


@dataclass
class _Worker(Generic[T]):
    """A child process, the parent's end of its pipe, and its current task."""

    process: BaseProcess
    pipe: Connection
    task: T | None = None


def each(
    tasks: Sequence[T], work: Callable[[T], R], ready: Callable[[T], bool] = lambda _: True
) -> Iterator[tuple[T, R | SteerbackError]]:
    """Do `work` for each task in child processes. Yield each task with its result, or with the error, as it ends.

    At most one process per core, each does one task after another. Of the tasks that are `ready`, the first starts
    first. Results are pickled.
    """
    context, waiting, workers = multiprocessing.get_context("fork"), list(tasks), list[_Worker[T]]()
    cores = min(os.cpu_count() or 1, len(tasks))

    def idle() -> _Worker[T] | None:
        """Return a worker without a task: an existing one, or a new one as long as there are cores for it."""
        free = next((worker for worker in workers if worker.task is None), None)
        if free is None and len(workers) < cores:
            ours, theirs = context.Pipe()
            inherited = [*(worker.pipe for worker in workers), ours]
            process = context.Process(target=_child, args=(theirs, inherited, tasks, work, os.getpid(), cores))
            process.start()
            theirs.close()
            workers.append(free := _Worker(process, ours))
        return free

    try:
        while True:
            while (task := next(filter(ready, waiting), None)) is not None and (worker := idle()) is not None:
                waiting.remove(task)
                worker.task = task
                worker.pipe.send(tasks.index(task))
            busy = [worker for worker in workers if worker.task is not None]
            if not busy:
                return
            ended = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ended]:
                done, worker.task = worker.task, None
                assert done is not None
                yield done, _result(worker, workers)
    finally:  # the terminal sends an interrupt to the children as well, and they commit their work
        for worker in workers:
            worker.pipe.close()
            worker.process.join()


def _result(worker: _Worker[T], workers: list[_Worker[T]]) -> R | SteerbackError:
    """Return what a worker has sent. If it has ended, an error, and the worker is removed from the list."""
    try:
        result: R | SteerbackError = worker.pipe.recv()
        return result
    except EOFError:  # the process has printed its messages already
        worker.process.join()
        workers.remove(worker)
        return SteerbackError(f"the process of a target ended with exit code {worker.process.exitcode}")


def _child(
    pipe: Connection,
    inherited: Sequence[Connection],
    tasks: Sequence[T],
    work: Callable[[T], R],
    parent: int,
    processes: int,
) -> None:
    """Do the tasks whose numbers arrive, until the parent closes the pipe."""
    end_with(parent)
    for other in inherited:  # ends of the parent, whose copies would keep pipes open
        other.close()
    for name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT"):  # of torch, and of the judges
        os.environ[name] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        while True:
            try:
                number = pipe.recv()
            except EOFError:
                return
            try:
                result: R | SteerbackError = work(tasks[number])
            except SteerbackError as error:
                result = error
            with suppress(BrokenPipeError):  # the parent has stopped
                pipe.send(result)
    except KeyboardInterrupt:
        sys.exit(130)
