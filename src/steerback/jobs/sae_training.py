"""Train SAEs of a model: texts by the model, their activations, training, and quality on held-out and foreign texts.

An interrupted training resumes after the last complete text and from the last checkpoint of the SAEs. This module
knows nothing about the files of the finished target; see `jobs.sae_target`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from steerback.config import Settings
from steerback.engines.base import finish
from steerback.errors import SteerbackError
from steerback.jobs.loaded import LoadedTarget
from steerback.latents.corpus import TrainingText, corpus_line, corpus_requests, read_corpus, readings
from steerback.records import Request
from steerback.store.files import write_atomic
from steerback.store.progress import Progress, make_progress
from steerback.targets import Target, resolve
from steerback.targets.download import gigabytes
from steerback.targets.registry import default_layer
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
