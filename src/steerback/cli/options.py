"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("runs")
RunsDir = Annotated[Path, typer.Option("--runs", help="Folder that holds the run folders.")]
RunName = Annotated[str, typer.Argument(help="Name of a run under --runs, or path of its folder.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the shared cache.")]
