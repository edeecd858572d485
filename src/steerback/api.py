"""What `import steerback` offers; the command line calls the same functions."""

from __future__ import annotations

from steerback.jobs.fork import fork
from steerback.jobs.loaded import LoadedTarget, load_target

__all__ = ["LoadedTarget", "fork", "load_target"]
