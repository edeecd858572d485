"""A second process for work on large ledgers."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


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
