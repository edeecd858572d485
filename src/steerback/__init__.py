"""steerback: measure, explain and change how language models resist activation steering.

Importing the package loads no heavy library; `load_target` and the engines import torch when they are used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from steerback.errors import VERSION as __version__

__all__ = [
    "Intervention",
    "SteerbackError",
    "__version__",
    "compare",
    "fork",
    "load_target",
    "open_run",
    "paper",
    "run",
]

# Switch off usage statistics of libraries, which read these variables at import. The user's values take precedence.
for _name in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from steerback.api import Intervention, SteerbackError, compare, fork, load_target, open_run, paper, run


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("steerback.api"), name)
    raise AttributeError(f"module 'steerback' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
