"""Train SAEs for a model and make it a target: texts, activations, SAEs, labels, the doctor's checks, report.

All files are in the user's folder `targets/NAME`. An interrupted training resumes after the last complete text and
from the last checkpoint of the SAEs.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from steerback.config import Settings
from steerback.engines.base import finish
from steerback.errors import SteerbackError
from steerback.jobs.doctor import Examination, examine, without_directions
from steerback.jobs.loaded import LoadedTarget
from steerback.latents.corpus import TrainingText, corpus_line, corpus_requests, read_corpus, readings
from steerback.readers import read_json_table
from steerback.readers.tables import csv_text
from steerback.records import Request
from steerback.report.sae import LayerRow, SaePage, write_sae_page
from steerback.store.files import make_folder, write_atomic, write_json
from steerback.store.progress import Progress, make_progress
from steerback.targets import Target, resolve
from steerback.targets.directions import PRIOR
from steerback.targets.download import gigabytes
from steerback.targets.labels import COLUMNS
from steerback.targets.registry import default_layer, trained_folder
from steerback.targets.sae_training import SaeQuality, SaeTrainer, SaeTraining, sae_quality

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.engines.base import Engine
    from steerback.latents.activations import LossRecovered
    from steerback.targets.sae import Sae

HELD_OUT = 20
"""Every 20th text is held out from training."""
MEASURED = 48
"""Number of texts for the loss recovered, for held-out and for foreign texts each."""
LABELLING, CONTEXTS = 6_000, 1_500
"""Number of text pieces that are read for labels, and for contexts."""
PROGRESS, CHECKPOINT = 5.0, 60.0
"""Seconds between two lines of progress, and between two checkpoints."""
FASTER = 1_024
"""Batch rows for writing the corpus on a GPU. Studies use fewer, because their batch shape must not change."""

Say = Callable[[str], None]


class SaeJob(Settings):
    """Settings of a training. The same settings under the same name resume it."""

    target: str
    layers: tuple[int, ...] = ()
    """Layers (0-based) to train SAEs for; empty: the layer at 60 % of the depth."""
    tokens: int = Field(1_500_000, ge=1)
    """Number of tokens that the model writes. Each is read about twice, see `latents.corpus`."""
    new_tokens: int = Field(384, ge=8)
    """Token limit of each text that the model writes."""
    passes: int = Field(8, ge=1)
    """Number of passes over the activations."""
    texts: tuple[str, ...] = ()
    """Texts of the user that replace the texts of the model."""
    training: SaeTraining = SaeTraining()


@dataclass(frozen=True)
class LayerResult:
    """An SAE of one layer and its quality on held-out texts of the model (`own`) and on other texts (`foreign`)."""

    sae: Sae
    own: SaeQuality
    foreign: SaeQuality
    dead: float
    loss_own: LossRecovered
    loss_foreign: LossRecovered

    def to_json(self) -> dict[str, object]:
        """Return the numbers as a dictionary that can be written as JSON."""
        losses = {"own": self.loss_own, "foreign": self.loss_foreign}
        recovered = {name: {**asdict(loss), "share": loss.share} for name, loss in losses.items()}
        qualities = {"own": asdict(self.own), "foreign": asdict(self.foreign)}
        return {"layer": self.sae.layer, "dead": self.dead, "quality": qualities, "loss": recovered}


@dataclass(frozen=True)
class TrainedTarget:
    """A finished training: folder, name and TOML table of the target, SAEs, labels and the doctor's checks."""

    folder: Path
    name: str
    table: str
    results: tuple[LayerResult, ...]
    best: LayerResult
    labels: dict[int, str]
    contexts: dict[int, tuple[str, ...]]
    doctor: Examination
    facts: dict[str, object]

    @property
    def page(self) -> Path:
        """Path of the report."""
        return self.folder / "report.html"


def train_sae(
    job: SaeJob,
    name: str,
    say: Say,
    engine: str = "transformers",
    memory: float | None = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> TrainedTarget:
    """Train SAEs for some layers of a target and define the target `name` with the best SAE; see `SaeJob`.

    `memory`: limit for the activations in memory, in bytes; None: 40 % of the device's free memory, at most 32 GB.
    """
    base = replace(without_directions(resolve(job.target)), sae=None, n_latents=0)
    folder = _begin(job, name)
    clock = Clock(say)
    texts = [TrainingText("", text) for text in job.texts]
    if not texts and engine != "transformers":
        with load_model(base, engine, device, batch_size) as writer:
            texts = write_corpus(job, base, folder / "corpus.jsonl", writer)
        clock.mark("model and texts")
    loaded = load_model(base, "transformers", device, batch_size)
    try:
        clock.mark("model")
        texts = texts or write_corpus(job, base, folder / "corpus.jsonl", loaded)
        clock.mark("texts")
        learner = Learner(loaded.engine, job, texts, memory, say)
        clock.mark("tokens")
        trainers = learner.train(folder / "checkpoint.pt")
        clock.mark("activations and training")
        results = tuple(learner.measure(trainer) for trainer in trainers.values())
        best = max(results, key=lambda r: r.foreign.explained)
        clock.mark("quality")
        table = _save(folder, name, base, results, best, learner)
        target = resolve(name)
        steered = _with_sae(loaded, target, best.sae)
        labels, contexts = _labels(folder, steered.engine, texts, learner, best)
        clock.mark("labels")
        doctor = examine(steered)
        clock.mark("doctor")
    finally:
        loaded.close()
    facts: dict[str, object] = {
        "job": job.model_dump(mode="json", exclude={"texts"}),
        "model": base.model,
        "texts": len(texts),
        "positions": learner.stream.positions,
        "steps": learner.steps,
        "seconds": clock.seconds,
        "layers": [r.to_json() for r in results],
        "best": best.sae.layer,
        "labels": len(labels),
        "engine": loaded.engine.describe(),
        "doctor": doctor.to_json(),
    }
    write_json(folder / "training.json", facts)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    made = TrainedTarget(folder, name, table, results, best, labels, contexts, doctor, facts)
    write_sae_page(made.page, _page(made, job, learner))
    return made


class Clock:
    """Measures the seconds of each stage and prints them at its end."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._last = say, time.monotonic()

    def mark(self, stage: str) -> None:
        """End a stage and print its seconds."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 1)
        self._say(f"{stage}: {self.seconds[stage]:.0f} s")
        self._last = now


def _begin(job: SaeJob, name: str) -> Path:
    """Return the folder of a new or resumed training. Raises SteerbackError if it belongs to another training."""
    if "/" in name or name.startswith(".") or not name.isprintable() or not name.strip():
        raise SteerbackError(f"--name {name!r} names a folder and a target: it cannot contain / or start with a dot")
    folder = make_folder(trained_folder(name))
    settings, path = job.model_dump(mode="json"), folder / "job.json"
    if path.is_file() and (stored := read_json_table(path, "training")) != settings:
        changed = ", ".join(sorted(k for k in settings if settings[k] != stored.get(k)))
        raise SteerbackError(
            f"the training of {name!r} has other values of {changed}; choose another --name, or delete {folder}"
        )
    write_json(path, settings)
    return folder


def write_corpus(job: SaeJob, base: Target, path: Path, writer: LoadedTarget) -> list[TrainingText]:
    """Let the model write the missing texts, store each when it is complete, and return all texts in order."""
    cap = min(job.new_tokens, base.max_new_tokens or job.new_tokens)
    wanted = corpus_requests(max(job.tokens // cap, 2), cap, base.prompt_format == "plain")
    done = read_corpus(path)
    missing = [request for request in wanted if request.key not in done]
    with closing(make_progress()) as progress:
        progress.stage("texts", len(wanted), len(wanted) - len(missing))
        if missing:
            finish(_write(writer, missing, path, done, progress))
    return [done[request.key] for request in wanted]


async def _write(
    loaded: LoadedTarget, missing: Sequence[Request], path: Path, done: dict[str, TrainingText], progress: Progress
) -> None:
    prompts = {request.key: request.prompt for request in missing}
    with path.open("a", encoding="utf-8") as file:
        async for key, completion in loaded.engine.generate(missing):
            done[key] = TrainingText(prompts[key], completion.text)
            file.write(corpus_line(key, done[key]))
            file.flush()
            progress.update(generated=1)


def load_model(base: Target, engine: str, device: str | None, batch_size: int | None) -> LoadedTarget:
    """Load a model into an engine, with larger batches on a GPU than in a study."""
    from steerback.engines import check_engine, make_engine
    from steerback.engines.batch import Shape
    from steerback.engines.loading import batch_rows
    from steerback.engines.transformers import TransformersEngine

    options: dict[str, object] = {"device": device} if engine == "transformers" else {}
    made = make_engine(base, check_engine(engine, options, batch_size))
    if isinstance(made, TransformersEngine) and made.runner.device.type == "cuda":
        made.shape = Shape(batch_size or batch_rows(made.runner, FASTER), 32, made.shape.page)
    return LoadedTarget(base, made)


def _with_sae(loaded: LoadedTarget, target: Target, sae: Sae) -> LoadedTarget:
    """Return the target with its SAE. The loaded model is used again."""
    from steerback.engines.loading import assemble
    from steerback.engines.transformers import TransformersEngine

    engine = loaded.engine
    assert isinstance(engine, TransformersEngine)
    runner = engine.runner
    runner.hooks.remove()
    made = assemble(target, runner.model, runner.prompter.tokenizer, sae.to(runner.device))
    return LoadedTarget(target, TransformersEngine(made, 8))


class Learner:
    """Reads activations of the training texts, trains the SAEs on them and measures their quality."""

    def __init__(
        self, engine: Engine, job: SaeJob, texts: Sequence[TrainingText], memory: float | None, say: Say
    ) -> None:
        from steerback.engines.loading import free_memory
        from steerback.engines.transformers import TransformersEngine
        from steerback.latents.activations import ActivationStream
        from steerback.latents.texts import usual_texts

        assert isinstance(engine, TransformersEngine)
        self.engine, self.job, self.say = engine, job, say
        site = engine.runner.site
        self.layers = tuple(dict.fromkeys(job.layers or (default_layer(site.n_layers),)))
        for layer in self.layers:
            if not 0 <= layer < site.n_layers:
                raise SteerbackError(f"--layers {layer} is outside 0..{site.n_layers - 1}, the layers of this model")
        kind, free = free_memory(engine.runner.device)
        bound = min(0.4 * free, 32e9) if memory is None else memory
        held_out = texts[::HELD_OUT]
        learned = [text for n, text in enumerate(texts) if n % HELD_OUT]
        if not learned:
            raise SteerbackError("one text is too few to train an SAE on")
        self.stream = ActivationStream(engine, readings(learned), self.layers, bound, job.training.seed)
        self.own = readings(held_out)
        self.foreign = [TrainingText("", text) for text in usual_texts(resolve(job.target))]
        self.batch = min(job.training.batch, max(self.stream.sizes))
        self.steps = self.stream.steps(self.batch, job.passes)
        say(
            f"{len(texts)} texts, {self.stream.positions:,} positions a pass in {len(self.stream.sizes)} parts of at "
            f"most {gigabytes(bound)} of {kind}; {self.steps:,} steps of {self.batch:,}; layers "
            f"{', '.join(map(str, self.layers))}"
        )

    def train(self, checkpoint: Path | None) -> dict[int, SaeTrainer]:
        """Return the trained SAEs by layer. Resume from `checkpoint` if it belongs to this training.

        If `checkpoint` is None, no checkpoints are written.
        """
        import torch

        options, first = self.job.training.model_copy(update={"batch": self.batch}), self.stream.part(0)
        trainers = {layer: SaeTrainer(_sample(h), layer, options, self.steps) for layer, h in first.items()}
        del first
        if checkpoint is not None and checkpoint.is_file():
            saved = torch.load(checkpoint, map_location=self.engine.runner.device, weights_only=True)
            if all(layer in saved and trainers[layer].load(saved[layer]) for layer in self.layers):
                self.say(f"resumes at step {trainers[self.layers[0]].done:,}")
        done = trainers[self.layers[0]].done
        began = reported = saved_at = time.monotonic()
        for n, batch in enumerate(self.stream.batches(self.batch, self.job.passes, done), done + 1):
            lost = {layer: trainers[layer].step(h) for layer, h in batch.items()}
            now = time.monotonic()
            if now - reported >= PROGRESS or n == self.steps:
                left = (now - began) / (n - done) * (self.steps - n)
                self.say(f"step {n:,} of {self.steps:,}: {_states(trainers, lost)}; {left:.0f} s left")
                reported = now
            if checkpoint is not None and now - saved_at >= CHECKPOINT and n < self.steps:
                _checkpoint(checkpoint, trainers)
                saved_at = now
        return trainers

    def measure(self, trainer: SaeTrainer) -> LayerResult:
        """Return the quality of a trained SAE on held-out texts of the model and on foreign texts."""
        from steerback.latents.activations import collect, loss_recovered

        sae = trainer.sae()

        def quality(texts: Sequence[TrainingText]) -> SaeQuality:
            read = [self.engine.words(self.engine.runner.prompter.conversation(t.prompt, t.text)) for t in texts]
            read = [text for text in read if text[1]]
            residuals = collect(self.engine, read, (sae.layer,), sum(len(words) for _, words in read))
            return sae_quality(sae, [residuals[sae.layer]])

        dead = float((trainer.idle >= trainer.options.dead_after).float().mean())
        result = LayerResult(
            sae,
            quality(self.own),
            quality(self.foreign),
            dead,
            *(loss_recovered(self.engine, sae, texts[:MEASURED]) for texts in (self.own, self.foreign)),
        )
        self.say(
            f"layer {sae.layer}: explained variance {result.own.explained:.3f} on its own texts, "
            f"{result.foreign.explained:.3f} on foreign ones; L0 {result.foreign.l0:.0f}; loss recovered "
            f"{result.loss_own.share:.3f} and {result.loss_foreign.share:.3f}; dead {dead:.1%}"
        )
        return result

    def norms(self) -> dict[int, float]:
        """Return the median residual norm of each layer over a sample of the activations."""
        return {layer: float(_sample(h).norm(dim=1).median()) for layer, h in self.stream.part(0).items()}

    def density(self, sae: Sae) -> list[float]:
        """Return the share of positions at which each latent is active, over at most 262,144 positions."""
        import torch

        h = _sample(self.stream.part(0)[sae.layer], 262_144)
        counts = torch.stack([(sae.encode(part) > 0).sum(0) for part in torch.split(h, 4_096)]).sum(0)
        return [float(share) for share in (counts / len(h)).cpu()]


def _sample(h: Tensor, n: int = 65_536) -> Tensor:
    """Return up to `n` rows of residuals as float32, drawn at random because rows are sorted by text length."""
    import torch

    return h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))[:n].to(h.device)].float()


def _states(trainers: dict[int, SaeTrainer], lost: dict[int, Tensor]) -> str:
    parts = []
    for layer, trainer in trainers.items():
        state = trainer.state(float(lost[layer]))
        where = f"layer {layer} " if len(trainers) > 1 else ""
        parts.append(f"{where}loss {state.loss:.4f}, explained variance {state.explained:.3f}, dead {state.dead}")
    return "; ".join(parts)


def _checkpoint(path: Path, trainers: dict[int, SaeTrainer]) -> None:
    import torch

    buffer = io.BytesIO()
    torch.save({layer: trainer.save() for layer, trainer in trainers.items()}, buffer)
    write_atomic(path, buffer.getvalue())


def _save(
    folder: Path, name: str, base: Target, results: Sequence[LayerResult], best: LayerResult, learner: Learner
) -> str:
    """Write the SAEs and the target's table. Return the table as TOML."""
    from steerback.targets.saelens import save_saelens

    for result in results:
        save_saelens(result.sae, folder / f"layer-{result.sae.layer}", base.model)
    norms = learner.norms()
    lines = [f"[{_quoted(name)}]", *_keys(base, folder, best, norms), "", f"[{_quoted(name)}.sae]"]
    lines += _source(folder, best.sae.layer)
    for result in results:
        if result is not best:
            layer, own = result.sae.layer, str(folder / f"layer-{result.sae.layer}")
            place = f"{_quoted(name)}.variants.layer-{layer}"
            lines += ["", f"[{place}]", f"sae_layer = {layer}", f"boost_prior = {_prior(norms[layer])}"]
            lines += [
                f"labels = {_quoted(own)}",
                "",
                f"[{place}.sae]",
                *_source(folder, layer),
            ]
    table = "\n".join(lines) + "\n"
    write_atomic(folder / "target.toml", table.encode("utf-8"))
    return table


def _keys(base: Target, folder: Path, best: LayerResult, norms: dict[int, float]) -> list[str]:
    layer = best.sae.layer
    made = (
        f"trained here: {time.strftime('%Y-%m-%d')}, explained variance {best.foreign.explained:.2f} on foreign texts"
    )
    keys: dict[str, str] = {
        "model": _quoted(base.model),
        "summary": _quoted(f"{base.name} with an SAE of layer {layer} made by steerback sae train"),
        **({"revision": _quoted(base.revision)} if base.revision else {}),
        "dtype": _quoted(base.dtype),
        "sae_layer": str(layer),
        "n_latents": str(best.sae.n_latents),
        "labels": _quoted(str(folder)),
        "boost_prior": _prior(norms[layer]),
        "prompt_format": _quoted(base.prompt_format),
        **({"max_new_tokens": str(base.max_new_tokens)} if base.max_new_tokens else {}),
        **({"planted": "true"} if base.planted else {}),
        "provenance": f'{{ sae = {_quoted(made)}, boost_prior = "derived: shares of the median residual norm" }}',
    }
    return [f"{key} = {value}" for key, value in keys.items()]


def _source(folder: Path, layer: int) -> list[str]:
    return ['format = "saelens"', f"location = {_quoted(str(folder / f'layer-{layer}'))}"]


def _prior(norm: float) -> str:
    mean, sd, high = (share * norm for share in PRIOR)
    return f"{{ mean = {mean:.4g}, sd = {sd:.4g}, low = 0, high = {high:.4g} }}"


def _quoted(text: str) -> str:
    """Return a text as a TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _labels(
    folder: Path, engine: Engine, texts: Sequence[TrainingText], learner: Learner, best: LayerResult
) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
    """Label latents by their top words; write labels, contexts and the table of latents into the folder of the SAE."""
    import random

    from steerback.engines.transformers import TransformersEngine
    from steerback.latents.contexts import top_contexts
    from steerback.latents.labelling import snippets, top_words

    assert isinstance(engine, TransformersEngine)
    read = [reading.text for reading in readings(texts) if not reading.prompt]
    random.Random(0).shuffle(read)
    labels = top_words(engine, read[:LABELLING])
    contexts = snippets(top_contexts(engine, read[:CONTEXTS], n=5), labels)
    density = learner.density(best.sae)
    labelled = [(k, label, "steerback sae train") for k, label in sorted(labels.items())]
    _write_csv(folder / "labels.csv", COLUMNS, labelled)
    rows = [(k, labels.get(k, ""), f"{share:.6g}") for k, share in enumerate(density)]
    _write_csv(folder / "latents.csv", ("index", "label", "density"), rows)
    write_json(folder / "contexts.json", {str(k): list(v) for k, v in sorted(contexts.items())})
    return labels, contexts


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    write_atomic(path, csv_text(names, rows).encode("utf-8"))


def _page(made: TrainedTarget, job: SaeJob, learner: Learner) -> SaePage:
    rows = [
        LayerRow(
            r.sae.layer,
            r is made.best,
            (r.foreign.explained, r.own.explained),
            (r.foreign.l0, r.own.l0),
            r.dead,
            (r.loss_foreign.share, r.loss_own.share),
            (r.loss_foreign.plain, r.loss_foreign.replaced, r.loss_foreign.zero),
        )
        for r in made.results
    ]
    training = job.training
    summary = (
        f"An SAE of {training.latents:,} latents ({training.kind}, {training.k} active a position) of the residual "
        f"stream after layer {made.best.sae.layer} of {job.target}, made by steerback sae train."
    )
    kept = ("model", "texts", "positions", "steps", "seconds", "job")
    facts = [(key, json.dumps(made.facts[key], ensure_ascii=False).strip('"')) for key in kept]
    return SaePage(
        name=made.name,
        summary=summary,
        layers=rows,
        n_latents=made.best.sae.n_latents,
        dead_after=training.dead_after,
        measured=min(MEASURED, len(learner.foreign)),
        labels=made.labels,
        contexts=made.contexts,
        verdict=made.doctor.verdict,
        doctor=made.doctor.lines(),
        facts=facts,
        table=made.table,
    )
