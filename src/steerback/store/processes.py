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
    """Return whether a copy of this process can work beside it: on Linux, with a second core, and without torch.

    A process with torch's threads cannot be forked safely.
    """
    return sys.platform == "linux" and (os.cpu_count() or 1) > 1 and "torch" not in sys.modules


def beside(work: Callable[[], T], worth: bool = True) -> Callable[[], T]:
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
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.close(source)
            if os.getppid() == parent:
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
        found: T = pickle.loads(content)
        return found

    return result
