"""Command `view`: write the viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerback.cli.options import RUNS, RunsFolder, VerdictsOf, add, hold_many_records, say


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(app, view)


def view(
    names: Annotated[list[str], typer.Argument(help="Runs: names under --runs, or paths of folders.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: view.html in the run's folder.")
    ] = None,
    judge: VerdictsOf = None,
    record: Annotated[
        bool, typer.Option("--record", help="Load the target and record the activations of some responses.")
    ] = False,
    trial: Annotated[list[str] | None, typer.Option(help="With --record: record this trial. Repeatable.")] = None,
    stage: Annotated[
        list[str] | None, typer.Option(help="Show trials of this stage instead of the measured ones. Repeatable.")
    ] = None,
    max_trials: Annotated[int, typer.Option(min=1, help="Most trials to show. Larger runs are sampled.")] = 5000,
    browse: Annotated[bool, typer.Option("--open", help="Open the file in a browser.")] = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Write an HTML page of runs: rates, all trials, activations, calibration."""
    from steerback.errors import SteerbackError
    from steerback.jobs.execute import tools
    from steerback.jobs.view import ViewSettings, write_view
    from steerback.report.view_trials import STAGES
    from steerback.store.files import make_folder
    from steerback.store.run import find_run

    hold_many_records()
    if trial and not record:
        raise SteerbackError("--trial names trials whose activations are read; add --record")
    folders = [find_run(name, runs) for name in names]
    path = out or (folders[0] if len(folders) == 1 else runs) / "view.html"
    make_folder(path.parent, "choose another --out")
    settings = ViewSettings(judge, tuple(stage or STAGES), max_trials, record, tuple(trial or ()))
    with tools(cached=False) as (progress, _):
        write_view(folders, path, settings, progress)
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB; it needs no network)")
    if browse:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())
