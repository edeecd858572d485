"""Commands about targets: list, show, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from steerback.cli.options import TargetName, Texts, announce_loading, argument, option, say, say_lines, say_table

if TYPE_CHECKING:
    from steerback.targets import Target


def targets(context: typer.Context, fit: bool = option("Show which targets this machine can run.", False)) -> None:
    """List the targets: built-in ones, and those of your file (--targets FILE)."""
    from steerback.figures.tables import Table
    from steerback.targets import list_targets

    if context.invoked_subcommand is not None:
        return None
    known = list_targets()
    if fit:
        from steerback.targets.fit import this_machine, verdict

        machine = this_machine()
        say(f"this machine: {machine.describe()}")
        note = "Estimated from the number of parameters. Without a GPU, more than a few billion are slow."
        return say_table(Table(("target", "fits"), [(t.name, verdict(t, machine)) for t in known], note, left=2))
    note = "Layers are 0-based. Where each value comes from: steerback targets show NAME. What fits here: --fit."
    minor = ("width", "labels", "boost prior", "SAE", "steer", "bf16", "read", "model", "fp8", "depth")
    return say_table(Table(COLUMNS, [_row(target) for target in known], note, left=3, minor=minor))


def show(name: str = argument("Target, e.g. llama-3.3-70b@authors, or its folder.", ...)) -> None:
    """Show all values of a target and their sources."""
    from steerback.figures.tables import Table
    from steerback.targets import resolve

    target = resolve(name)
    _check_sae(target)
    say(f"{target.name}: {target.summary}" if target.summary else target.name)
    say_table(Table(("key", "value", "from"), _values(target), left=3))


def doctor(
    target: TargetName,
    layer: int | None = option("Check this layer instead of the SAE's layer."),
    texts: Texts = None,
    json: Path | None = option("Also write the report to this file."),
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
    say_lines(report.lines())
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


def train_sae_command(
    target: str = argument("Target, folder of a model, or GGUF file.", ...),
    layers: str | None = option("Layers, counted from 0, e.g. 10,14,17. Default: 60 % of the depth."),
    name: str | None = option("Name of the new target. The same name again resumes."),
    texts: Texts = None,
    kind: str = option("Kind of SAE: jumprelu or topk.", "jumprelu"),
    latents: int = option("Number of latents.", 16_384, min=2),
    k: int = option("Active latents per position.", 64, min=1),
    tokens: int = option("Number of training tokens, which the model writes.", 1_500_000, min=1),
    new_tokens: int = option("Longest text, in tokens.", 384, min=8),
    passes: int = option("Passes over the activations.", 8, min=1),
    batch: int = option("Positions per training step.", 8_192, min=1),
    memory: float | None = option("GB of activations kept in memory.", min=0.001),
    engine: str = option("Engine that writes the texts: transformers or vllm.", "transformers"),
    device: str | None = option("cuda, mps or cpu. Default: the first available."),
    batch_size: int | None = option("Texts written at the same time.", min=1),
    seed: int = option("Seed of the SAE and the order of activations.", 0),
) -> None:
    """Train an SAE on texts of the model itself, label and check it, define a target."""
    from steerback.config import parse
    from steerback.jobs.sae_target import train_sae
    from steerback.jobs.sae_training import SaeJob
    from steerback.latents.texts import read_texts
    from steerback.targets.sae_training import SaeTraining

    options = {"kind": kind, "latents": latents, "k": k, "batch": batch, "seed": seed}
    training = parse(SaeTraining, options, "options of sae train")
    own = read_texts(texts) if texts is not None else ()
    job = SaeJob(
        target=target,
        layers=_numbers(layers),
        tokens=tokens,
        new_tokens=new_tokens,
        passes=passes,
        texts=own,
        training=training,
    )
    chosen = f"{Path(target).name.removesuffix('.gguf')}-sae" if name is None else name
    bound = None if memory is None else memory * 1e9
    made = train_sae(job, chosen, lambda line: say(line, flush=True), engine, bound, device, batch_size)
    say_lines(made.doctor.lines())
    if len(made.results) > 1:
        say(f"layer {made.best.sae.layer} explains foreign texts best; the others are {chosen}@layer-N")
    say(f"{len(made.labels)} of {made.best.sae.n_latents} latents have a label; report: {made.page}")
    say(f"\n{made.table}\nuse it: steerback run esr --target {chosen} --judge offline")


def _numbers(text: str | None) -> tuple[int, ...]:
    from steerback.errors import SteerbackError

    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise SteerbackError(f"--layers {text!r} should be numbers with commas between them, e.g. 10,14,17")
    return tuple(int(part) for part in parts)
