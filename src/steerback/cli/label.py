"""Commands about human labels: draw a sample to label, import the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steerback.cli.options import RUNS, RunName, RunsFolder, VerdictsOf, add, say
from steerback.store.files import make_folder


class _DrawByDefault(TyperGroup):
    """Group of commands in which `label RUN` means `label draw RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Put `draw` before arguments that name no verb. (`Any`: some releases of typer bring their own click.)"""
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["draw", *args])


def register(app: typer.Typer) -> None:
    """Add the commands."""
    label = typer.Typer(
        cls=_DrawByDefault,
        help="Label responses by hand. `label RUN` writes a labelling page.",
        no_args_is_help=True,
        context_settings={"ignore_unknown_options": True},
        rich_markup_mode=None,
    )
    add(label, draw, "draw")
    add(label, import_command, "import")
    app.add_typer(label, name="label")


def draw(
    name: RunName,
    size: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of responses in the sample.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 42,
    condition: Annotated[
        list[str] | None, typer.Option("--condition", help="Draw only from this condition. Repeatable.")
    ] = None,
    judge: VerdictsOf = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the files. Default: the run's folder.")] = None,
    runs: RunsFolder = RUNS,
) -> None:
    """Draw a blind sample of a run; write a labelling page and a spreadsheet."""
    from steerback.jobs.labelling import draw_sample
    from steerback.store.run import find_run

    place = None if out is None else make_folder(out, "choose another --out")
    sample = draw_sample(find_run(name, runs), size, seed, judge, condition or (), place)
    say(f"{sample.count} responses in random order:")
    say(f"  {sample.page}  (open it in a browser; press h for the keys, s to save)")
    say(f"  {sample.spreadsheet}  (the same for a spreadsheet)")
    say(f"then: steerback label import {name} FILE --by YOUR_NAME")


def import_command(
    name: RunName,
    file: Annotated[Path, typer.Argument(help="JSON file saved by the page, or the completed CSV file.")],
    by: Annotated[
        str, typer.Option("--by", metavar="NAME", help="Name of the labeller. The judge is called human:NAME.")
    ],
    runs: RunsFolder = RUNS,
) -> None:
    """Import labels as verdicts of judge human:NAME."""
    from steerback.jobs.labelling import import_labels
    from steerback.store.run import find_run

    done = import_labels(find_run(name, runs), file, by)
    say(f"{done.new} labels imported; {done.judge} has labelled {done.labelled} of {done.size} responses of the sample")
    say(f"see them with: steerback show {name} --judge {done.judge}")
    say(f"rates corrected by them: steerback figures {name}")
