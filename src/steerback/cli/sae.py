"""Command `sae train`: train a sparse autoencoder for a model that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerback.cli.options import Texts, add, new_group, say


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = new_group("Sparse autoencoders: train one for a model that has none.")
    add(group, train)
    app.add_typer(group, name="sae")


def train(
    target: Annotated[str, typer.Argument(help="Target, folder of a model, or GGUF file.")],
    layers: Annotated[
        str | None, typer.Option(help="Layers, counted from 0, e.g. 10,14,17. Default: 60 % of the depth.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new target. The same name again resumes.")] = None,
    texts: Texts = None,
    kind: Annotated[str, typer.Option(help="Kind of SAE: jumprelu or topk.")] = "jumprelu",
    latents: Annotated[int, typer.Option(min=2, help="Number of latents.")] = 16_384,
    k: Annotated[int, typer.Option(min=1, help="Active latents per position.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Number of training tokens, which the model writes.")] = 1_500_000,
    new_tokens: Annotated[int, typer.Option(min=8, help="Longest text, in tokens.")] = 384,
    passes: Annotated[int, typer.Option(min=1, help="Passes over the activations.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Positions per training step.")] = 8_192,
    memory: Annotated[float | None, typer.Option(min=0.001, help="GB of activations kept in memory.")] = None,
    engine: Annotated[str, typer.Option(help="Engine that writes the texts: transformers or vllm.")] = "transformers",
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu. Default: the first available.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Texts written at the same time.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the SAE and the order of activations.")] = 0,
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
    chosen = name or f"{Path(target).name.removesuffix('.gguf')}-sae"
    bound = None if memory is None else memory * 1e9
    made = train_sae(job, chosen, lambda line: say(line, flush=True), engine, bound, device, batch_size)
    for line in made.doctor.lines():
        say(line)
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
