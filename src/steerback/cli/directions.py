"""Verbs about named directions: make one from texts or from a file, list a target's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerback.errors import SteerbackError


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    group = typer.Typer(help="Named directions: steering without SAE latents.", no_args_is_help=True)
    group.command("make")(make)
    group.command("show")(show)
    app.add_typer(group, name="directions")


def make(
    target: Annotated[str, typer.Argument(help="The target to steer, e.g. organism.")],
    name: Annotated[str, typer.Argument(help="What to call it; the judge is told this name.")],
    positive: Annotated[Path | None, typer.Option(help="Texts that have it, one a line.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts that do not.")] = None,
    topic: Annotated[Path | None, typer.Option(help="Texts on a topic, against neutral ones.")] = None,
    file: Annotated[Path | None, typer.Option(help="A safetensors, npy or gguf file to take over.")] = None,
    layer: Annotated[int | None, typer.Option(help="0-based; default: the target's steer layer.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: where the target finds it by name.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a direction of this name.")] = False,
) -> None:
    """Make a direction: difference of means of two lists of texts, a topic against neutral texts, or from a file."""
    from dataclasses import replace

    from steerback.api import load_target
    from steerback.engines.transformers import TransformersEngine
    from steerback.latents import directions as making
    from steerback.latents.texts import read_texts, usual_texts
    from steerback.targets import resolve
    from steerback.targets.directions import save_direction, user_directions

    given = [option for option, value in (("--positive", positive), ("--topic", topic), ("--file", file)) if value]
    if len(given) != 1 or (positive is None) != (negative is None):
        raise SteerbackError("give --positive with --negative, or --topic, or --file: one way to make a direction")
    if not name.strip() or "/" in name or name.isdecimal():
        raise SteerbackError(
            f"direction name {name!r} must have a letter and no slash; it is a file's name and a label"
        )
    chosen = resolve(target).with_directions(())
    path = (out or user_directions(chosen.user_key)) / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise SteerbackError(f"{path} exists already; choose another name or add --overwrite")
    own = read_texts(positive or topic) if positive or topic else ()  # type: ignore[arg-type]
    other = tuple(t for t in usual_texts(chosen.name) if t not in own) if negative is None else read_texts(negative)
    at = chosen.steer_layer if layer is None else layer
    with load_target(chosen, "transformers") as loaded:
        assert isinstance(loaded.engine, TransformersEngine)
        if file is not None:
            vector, facts = making.from_file(loaded.engine, file, other, at)
        else:
            source = "difference of means" if negative else "topic minus neutral texts"
            vector, facts = making.from_texts(
                loaded.engine, own, other, at, f"{source}, {len(own)} and {len(other)} texts"
            )
    save_direction(path, vector, replace(facts, model=chosen.name))
    mean, sd, low, high = facts.prior() or (0.0, 0.0, 0.0, 0.0)
    print(f"{path}")
    print(f"layer {at}, norm {facts.norm:.4g}, residual norm there {facts.residual_norm:.4g} (median over tokens)")
    print(f"steered with at length 1; boost prior N({mean:.3g}, {sd:.3g}) on [{low:g}, {high:.3g}]")
    if at != chosen.steer_layer:
        print(f"{chosen.name} steers at layer {chosen.steer_layer}: give a target of your own steer_layer = {at}")
    where = "" if out is None else f' after directions = ["{out}"] in a target of your own'
    print(f'use it{where}: steerback run esr --target {chosen.name} --latents "{name}"')


def show(target: Annotated[str, typer.Argument(help="A target, e.g. organism.")]) -> None:
    """List a target's directions with their layers and norms."""
    from steerback.targets import resolve

    chosen = resolve(target)
    if not chosen.directions():
        print(f"{chosen.name} has no directions; make one with: steerback directions make {chosen.name} NAME ...")
    for name, file in chosen.direction_files:
        facts = chosen.direction_facts(name)
        known = [
            f"layer {facts.layer}" if facts.layer is not None else "",
            f"norm {facts.norm:.4g}" if facts.norm is not None else "",
            f"residual norm {facts.residual_norm:.4g}" if facts.residual_norm is not None else "",
            facts.source,
        ]
        print(f"{name:<20} {', '.join(filter(None, known)) or 'nothing known beside its vector'}  ({file})")
