"""Verbs about what is steered."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(targets)


def targets() -> None:
    """List what can be steered."""
    from steerback.targets import builtin_targets

    for target in builtin_targets():
        print(f"{target.name:<20} {target.summary}")
