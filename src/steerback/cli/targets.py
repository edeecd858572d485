"""Commands about targets: list, show, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerback.cli.options import TargetName, Texts, add, announce_loading, new_group, say

if TYPE_CHECKING:
    from steerback.targets import Target


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = new_group("List the models that can be steered.", targets)
    add(group, show)
    app.add_typer(group, name="targets")
    add(app, doctor)


def targets(
    context: typer.Context,
    fit: Annotated[bool, typer.Option("--fit", help="Show which targets this machine can run.")] = False,
) -> None:
    """List the targets: built-in ones, and those of your file (--targets FILE)."""
    from steerback.figures.tables import Table, terminal_width
    from steerback.targets import list_targets

    if context.invoked_subcommand is not None:
        return
    known = list_targets()
    if fit:
        from steerback.targets.fit import this_machine, verdict

        machine = this_machine()
        say(f"this machine: {machine.describe()}")
        note = "Estimated from the number of parameters. Without a GPU, more than a few billion are slow."
        say(
            Table(("target", "fits"), [(t.name, verdict(t, machine)) for t in known], note, left=2).text(
                terminal_width()
            ),
            end="",
        )
        return
    note = "Layers are 0-based. Where each value comes from: steerback targets show NAME. What fits here: --fit."
    minor = ("width", "labels", "boost prior", "SAE", "steer", "bf16", "read", "model", "fp8", "depth")
    say(Table(COLUMNS, [_row(target) for target in known], note, left=3, minor=minor).text(terminal_width()), end="")


def show(name: Annotated[str, typer.Argument(help="Target, e.g. llama-3.3-70b@authors, or its folder.")]) -> None:
    """Show all values of a target and their sources."""
    from steerback.figures.tables import Table, terminal_width
    from steerback.targets import resolve

    target = resolve(name)
    _check_sae(target)
    say(f"{target.name}: {target.summary}" if target.summary else target.name)
    say(Table(("key", "value", "from"), _values(target), left=3).text(terminal_width()), end="")


def doctor(
    target: TargetName,
    layer: Annotated[int | None, typer.Option(help="Check this layer instead of the SAE's layer.")] = None,
    texts: Texts = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
) -> None:
    """Check layer, SAE and steering of a target. Exit code 1 if a check failed."""
    from steerback.api import load_target
    from steerback.jobs.doctor import examine, without_directions
    from steerback.latents.texts import read_texts
    from steerback.store.files import write_json
    from steerback.targets import resolve

    own = read_texts(texts) if texts is not None else None
    announce_loading(target)
    with load_target(without_directions(resolve(target)), "transformers") as loaded:
        report = examine(loaded, layer, own)
    for line in report.lines():
        say(line)
    if json is not None:
        write_json(json, report.to_json())
    if report.verdict == "failed":
        raise typer.Exit(1)


def _check_sae(target: Target) -> None:
    """Raise SteerbackError for an unknown SAE format, or for a local SAE that does not fit the target."""
    if target.sae is None:
        return
    from steerback.engines.checks import site_of
    from steerback.targets.sae_files import format_of, load_sae

    format_of(target.sae)
    if Path(target.sae.location).expanduser().exists():
        sae = load_sae(target.sae)
        if target.n_layers is not None and target.d_model is not None:
            site_of(target.with_directions(()), target.n_layers, target.d_model, sae, ())


COLUMNS = ("target", "model", "SAE", "width", "steer", "read", "depth", "labels", "bf16", "fp8", "boost prior")


def _row(target: Target) -> tuple[str, ...]:
    return (
        target.name,
        _place(target.model),
        "-" if target.sae is None else _place(target.sae.location),
        str(target.n_latents or "-"),
        *(str(layer) if layer >= 0 else "-" for layer in (target.steer_layer, target.read_layer)),
        "-" if target.n_layers is None else f"{100 * target.steer_layer / target.n_layers:.1f} %",
        _labels(target),
        *(_memory(target, form) for form in ("bfloat16", "fp8")),
        _prior(target),
    )


def _place(location: str) -> str:
    """Return a hub id unchanged, and the name of a folder."""
    return Path(location).name if Path(location).is_absolute() else location


def _labels(target: Target) -> str:
    if target.n_latents and (count := len(target.labels())):
        return str(count)
    return "to be fetched" if target.label_source else "none"


def _memory(target: Target, form: str) -> str:
    from steerback.targets.download import gigabytes

    needed = target.memory(form)
    return "-" if needed is None else gigabytes(needed)


def _prior(target: Target) -> str:
    prior = target.boost_prior
    return f"N({prior.mean:g}, {prior.sd:g}) on [{prior.low:g}, {prior.high:g}]"


def _values(target: Target) -> list[tuple[str, str, str]]:
    """Return (key, value, source) of each value of a target."""
    known: dict[str, str] = dict(target.provenance)
    clamp = target.clamp_layer if target.clamp_layer is not None else target.sae_layer
    values: dict[str, object] = {
        "model": target.model,
        "revision": target.revision or "the newest; its commit is recorded",
        "dtype": target.dtype,
        "sae": "none" if target.sae is None else _source(target),
        "sae_layer": target.sae_layer,
        "n_latents": target.n_latents or None,
        "steer_layer": target.steer_layer,
        "read_layer": target.read_layer,
        "clamp_layer": clamp,
        "n_layers": target.n_layers,
        "d_model": target.d_model,
        "n_parameters": target.parameters(),
        "boost_prior": _prior(target),
        "labels": _labels(target),
        "label_source": target.label_source,
        "directions": ", ".join(target.directions()) or None,
        "prompt_format": target.prompt_format,
        "max_new_tokens": target.max_new_tokens,
        "discovery_prompts": target.discovery_prompts,
        "random_sets": target.random_sets,
    }
    values |= {f"memory as {form}": _memory(target, form) for form in ("bfloat16", "fp8")}
    return [
        (key, f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value), _origin(key, target, known))
        for key, value in values.items()
        if value is not None or key in known
    ]


def _source(target: Target) -> str:
    assert target.sae is not None
    parts = [target.sae.format, target.sae.location, target.sae.file, target.sae.revision and f"@{target.sae.revision}"]
    return " ".join(part for part in parts if part)


def _origin(key: str, target: Target, known: dict[str, str]) -> str:
    if key in known:
        return known[key]
    if key.startswith("memory"):
        return "derived: parameters x bytes, 5 % more, 1.5 GB for caches"
    if key == "labels":
        return "counted"
    if key == "clamp_layer" and target.clamp_layer is None:
        return "derived: the SAE's layer"
    fields = type(target).__dataclass_fields__
    if key in fields and getattr(target, key) == fields[key].default:
        return "default"
    return "the target's files" if target.labels_folder is not None else "given"
