"""Measure several small models on a CPU in parallel, with one process per target and one shared ledger.

A model of this size uses one core, and batches in one process would compete for Python's interpreter lock. Responses
are the same as in one process, because they depend only on the batch shape.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from steerback.engines import TransformersOptions, make_engine
from steerback.engines.options import SMALL
from steerback.errors import SteerbackError
from steerback.store.processes import can_fork, end_with
from steerback.targets.fit import gpus

if TYPE_CHECKING:
    from steerback.jobs.check import PreparedRun
    from steerback.targets import Target


def possible(job: PreparedRun) -> bool:
    """Return True if the targets of the job can be measured in parallel: several small models on the CPU, a free judge.

    The process must be able to fork (`can_fork`).
    """
    options, targets = job.engine, job.targets
    return (
        can_fork()
        and len(targets) > 1
        and job.makers.engine is make_engine
        and job.config.judge.startswith("offline")
        and isinstance(options, TransformersOptions)
        and options.workers is None
        and (options.device == "cpu" or (options.device is None and not gpus()))
        and all(t.adapter is None and (t.parameters() or SMALL) < SMALL for t in targets)
    )


def each(targets: Sequence[Target], work: Callable[[Target], None]) -> None:
    """Call `work` for each target in a child process, with at most one process per core.

    If a target fails, the others finish first; then the first SteerbackError is raised.
    """
    context = multiprocessing.get_context("fork")
    cores = min(os.cpu_count() or 1, len(targets))
    waiting, errors, running = list(targets), list[str](), list[tuple[BaseProcess, Connection]]()
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_child, args=(waiting.pop(0), work, sender, os.getpid(), cores)
                )
                process.start()
                sender.close()
                running.append((process, receiver))
            wait([process.sentinel for process, _ in running])
            ended = [(process, receiver) for process, receiver in running if not process.is_alive()]
            running = [one for one in running if one not in ended]
            errors += [_reason(process, receiver) for process, receiver in ended if process.exitcode]
    finally:  # the terminal sends an interrupt to the children as well, and they commit their work
        for process, _ in running:
            process.join()
    if errors:
        raise SteerbackError("; ".join(dict.fromkeys(errors)))


def _reason(process: BaseProcess, receiver: Connection) -> str:
    try:
        return str(receiver.recv())
    except EOFError:  # the process has printed its messages already
        return f"the process of a target ended with exit code {process.exitcode}"


def _child(target: Target, work: Callable[[Target], None], sender: Connection, parent: int, processes: int) -> None:
    end_with(parent)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    try:
        work(target)
    except SteerbackError as error:
        sender.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
