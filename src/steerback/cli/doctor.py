"""The verb that examines a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command()(doctor)


def doctor(
    target: Annotated[str, typer.Argument(help="A target, e.g. organism.")],
    layer: Annotated[int | None, typer.Option(help="Ask about this layer instead of the SAE's own.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts to read residuals from, one a line.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Check that a target's layer, SAE and steering are right; exit code 1 if a check failed, warnings are 0."""
    from steerback.api import load_target
    from steerback.jobs.doctor import examine, without_directions
    from steerback.latents.texts import read_texts
    from steerback.store.files import write_json
    from steerback.targets import resolve

    own = read_texts(texts) if texts is not None else None
    with load_target(without_directions(resolve(target)), "transformers") as loaded:
        report = examine(loaded, layer, own)
    for line in report.lines():
        print(line)
    if json is not None:
        write_json(json, report.to_json())
    if report.verdict == "failed":
        raise typer.Exit(1)
