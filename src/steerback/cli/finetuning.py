"""Commands of experiment 4: make examples, mix them, train adapters. `run finetuning` evaluates them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from steerback.cli.options import PROMPTS, Budget, argument, option, say
from steerback.errors import SteerbackError, unknown
from steerback.store.files import make_folder

DATA = Path("finetuning")

Folder = Annotated[Path, typer.Option("--data", help="Folder with examples and mixes.")]
TrainedTarget = Annotated[str, typer.Option("--target", "-t", help="Model to train, e.g. organism-control.")]
Ratios = Annotated[
    list[int] | None,
    typer.Option("--ratio", help="Share of self-corrections in percent. Repeatable. Default: 10, 20, ..., 90."),
]
Size = Annotated[int | None, typer.Option(min=1, help="Examples per mix. Default: the most that all mixes can have.")]
Seed = Annotated[int, typer.Option(help="Seed of subjects, drafts and mixes.")]


def data(
    target: TrainedTarget,
    budget: Budget,
    examples: int = option("Number of self-corrections, and of normal answers.", 1000, min=1),
    writer: str | None = option(
        "Model that writes the examples, e.g. anthropic/...; self: the target itself; corpus: built-in models."
    ),
    engine: str = option("Engine of --writer self: auto, transformers or vllm.", "auto"),
    prompts: Annotated[str, PROMPTS] = "evaluation",
    subjects: Path | None = option("File of off-topic subjects, lines of the form `subject: word, word`."),
    folder: Folder = DATA,
    ratio: Ratios = None,
    size: Size = None,
    seed: Seed = 42,
) -> None:
    """Write self-corrections and normal answers, check and mix them."""
    from steerback.data.prompts import load_prompts
    from steerback.engines.loading import load_tokenizer
    from steerback.engines.prompting import Prompter
    from steerback.finetuning.synthesize import CorpusWriter, Writer, synthesize, write_pools
    from steerback.targets import resolve

    resolved, asked = resolve(target), load_prompts(prompts)
    writer, limits = _checked_writer(writer, resolved.base, budget, subjects), budget.limits()
    prompter = Prompter(load_tokenizer(resolved), resolved.prompt_format)
    make_folder(folder, "choose another --data")
    made: Writer
    named = None if subjects is None else str(subjects)
    with ExitStack() as loaded:
        if writer == "corpus":
            made = CorpusWriter(asked, seed)
        elif writer == "self":
            from steerback.finetuning.writer import OwnWriter
            from steerback.jobs.doctor import without_directions
            from steerback.jobs.sae_training import load_model

            model = loaded.enter_context(load_model(without_directions(resolved), engine, None, None))
            made = OwnWriter(model.engine, named, seed)
        else:
            from steerback.finetuning.writer import LlmWriter

            made = LlmWriter(writer, folder, limits, named)
        pools = synthesize(made, asked, examples, seed, say=say)
    settings = {"target": resolved.name, "prompts": prompts, "seed": seed, "asked_for": examples}
    records = write_pools(folder, pools, prompter, {**settings, **made.describe()})
    for name, pool in records.items():
        rejected = ", ".join(f"{reason}: {n}" for reason, n in pool.rejected.items()) or "none"
        say(f"{name.replace('_', '-')}: {pool.examples} examples, {pool.prompts} prompts, ", end="")
        say(f"{pool.subjects} subjects; rejected: {rejected}")
    _mix(folder, ratio, size, seed)


def _checked_writer(writer: str | None, base: str, budget: Budget, subjects: Path | None) -> str:
    """Return the writer, by default the corpus of a built-in model. Raises SteerbackError for a wrong one."""
    if writer is None and not base.startswith("organism"):
        raise SteerbackError(
            "name the model that writes the examples with --writer, e.g. anthropic/claude-sonnet-4-5, or self"
        )
    if writer in (None, "corpus") and (budget != Budget() or subjects is not None):
        raise SteerbackError(
            "the built-in corpus has subjects and costs of its own; --subjects and limits need a --writer"
        )
    if writer == "self" and budget != Budget():
        raise SteerbackError(
            "--writer self asks no judge model, so limits of calls and costs do not apply; leave them out"
        )
    return writer or "corpus"


def mixes(folder: Folder = DATA, ratio: Ratios = None, size: Size = None, seed: Seed = 42) -> None:
    """Mix the examples again with other ratios or sizes."""
    _mix(folder, ratio, size, seed)


def _mix(folder: Path, ratio: list[int] | None, size: int | None, seed: int) -> None:
    from steerback.finetuning.mixes import RATIOS, make_mixes, read_pools, write_mixes

    corrections, normal = read_pools(folder)
    made, notes = make_mixes(corrections, normal, ratio or RATIOS, size, seed)
    path = write_mixes(folder, made, notes, seed)
    for mix in made:
        say(f"{mix.name}: {len(mix.training)} training and {len(mix.validation)} validation examples, ", end="")
        say(f"{mix.corrections} of {mix.size} self-corrections")
    for note in notes:
        say(note)
    say(path)


def train(
    target: TrainedTarget,
    chosen: list[str] | None = argument("Mixes (50 or mix-50) or files. Default: all mixes.", metavar="MIX..."),
    folder: Folder = DATA,
    out: Path | None = option("Folder of the adapters. Default: adapters, next to the mixes."),
    settings: list[str] | None = option(
        "Change a training setting, e.g. learning_rate=1e-4.", None, "--set", metavar="KEY=VALUE"
    ),
    processes: int = option("Number of training processes, one GPU each.", 1, min=1),
    export: str | None = option("axolotl: write configuration files for it instead of training."),
) -> None:
    """Train a LoRA adapter per mix. The same command resumes."""
    from steerback.finetuning.adapters import read_data, train_adapter
    from steerback.finetuning.launch import train_together
    from steerback.finetuning.settings import TrainingJob, TrainingSettings
    from steerback.readers.settings import assignment
    from steerback.targets import resolve

    resolved = resolve(target)
    changed = TrainingSettings().changed(**dict(assignment(text) for text in settings or ()))
    place = out or folder / "adapters"
    jobs = [
        TrainingJob(target=target, data=data, out=place / name, settings=changed)
        for name, data in _chosen(folder, chosen or [])
    ]
    if export is not None:
        if export != "axolotl":
            raise unknown("export", export, ["axolotl"])
        from steerback.finetuning.axolotl import export as write

        for job in jobs:
            say(write(job, resolved, place))
        return
    for job in jobs:
        read_data(job.data)  # a mistake in the last mix shows before the first is trained
    cards = []
    for number, job in enumerate(jobs, 1):
        head = f"[{number}/{len(jobs)}] {job.name}"
        say(head, flush=True)

        def tell(text: str, head: str = head) -> None:
            say(f"{head}: {text}", flush=True)

        cards.append(train_together(job, processes, tell) if processes > 1 else train_adapter(job, tell))
    say()
    for card in cards:
        ends = "".join(f", validation loss {loss.trained:.3f}" for loss in card.validation_loss)
        say(f"{card.name}: {card.training.steps} steps, {card.training.seconds:.0f} s{ends}")
    _draw([job.out for job in jobs], place)
    say(place)


def _draw(folders: list[Path], place: Path) -> None:
    from steerback.figures.finetuning import draw_losses
    from steerback.figures.style import save
    from steerback.finetuning.adapters import read_losses

    save(draw_losses({folder.name: read_losses(folder).model_dump() for folder in folders}), place, "losses")


def _chosen(folder: Path, names: list[str]) -> list[tuple[str, Path]]:
    """(name of the adapter, where its data is) of the mixes and files named; all mixes of the folder by default."""
    if not names:
        sources = sorted(folder.glob("mix-*/train.jsonl"), key=lambda p: (len(p.parent.name), p.parent.name))
        if not sources:
            raise SteerbackError(f"no mixes in {folder}; make them with: steerback finetune data")
        return [(path.parent.name, path.parent) for path in sources]
    chosen = []
    for name in names:
        inside = folder / (f"mix-{name}" if name.isdecimal() else name)
        path = inside if inside.exists() else Path(name)
        if not path.exists():
            known = sorted(p.parent.name for p in folder.glob("mix-*/train.jsonl"))
            raise unknown("mix or file", name, known or [f"(no mixes in {folder})"])
        chosen.append((path.stem if path.is_file() else path.name, path))
    return chosen
