"""Processes that are killed or run out of disk, and the size of the campaign.

Children are forked from a server that has imported everything and computed nothing: a fork of the test process itself
would inherit torch's threads from other tests, which torch does not survive reliably.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerback.cli import main

SCALE = int(os.environ.get("STEERBACK_FAULTS", "1"))
"""How many times as much as the short form the campaign does; `make faults` sets it."""
PRELOADED = (
    *("torch", "transformers", "peft", "steerback.engines.transformers", "steerback.engines.scripted", "steerback.cli"),
    *("steerback.jobs.campaign", "steerback.figures.esr", "steerback.figures.style", "matplotlib.backends.backend_pdf"),
    *("matplotlib.backends.backend_agg", "steerback.published.authors", "steerback.report.export"),
    "steerback.finetuning.train",
)


def in_child(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    """Run `work(*arguments, calls)` in a process of its own; return its exit code and what it left in `calls`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    calls = context.Value("q", 0)
    child = context.Process(target=work, args=(*arguments, calls))
    child.start()
    child.join(300 * SCALE)  # a long campaign runs beside other work
    assert child.exitcode is not None
    return child.exitcode, calls.value


def command(words: list[str], said: Path, room: int | None = None, full: tuple[int, ...] = ()) -> int:
    """Run the command line in a process of its own and return its exit code; `said` gets what it prints.

    `room`: no file may grow beyond so many bytes, as on a disk that is full. `full`: the outputs (1, 2) that go to a
    full disk instead.
    """
    return in_child(_command, words, said, room, full)[0]


def _command(words: list[str], said: Path, room: int | None, full: tuple[int, ...], _: Any) -> None:
    read, write = os.pipe()
    worker = os.fork()
    if worker:  # this process keeps the text, as the limit holds for its files too
        os.close(write)
        with os.fdopen(read, "rb") as source:
            said.write_bytes(source.read())
        os._exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    os.close(read)
    for output in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY) if output in full else write, output)
    os.close(write)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    main(words)
