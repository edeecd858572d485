"""Where things of the user are kept between runs. It knows nothing of what is in there."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder(*parts: str) -> Path:
    """A place below `$STEERBACK_CACHE`, else `$XDG_CACHE_HOME/steerback`, else `~/.cache/steerback`; not created."""
    if chosen := os.environ.get("STEERBACK_CACHE"):
        return Path(chosen, *parts)
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "steerback", *parts)
