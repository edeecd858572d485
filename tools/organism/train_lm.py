"""Training of one organism's language model from the generated corpus.

Knows documents, tokens and the loss mask; nothing of SAEs beyond the layer that an optional auxiliary topic
classification reads. Runs on CPU or one GPU in float32.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tools.organism.documents import documents
from tools.organism.spec import CORPUS_SEED, LAYERS, SAE_LAYER, LmTraining, Organism
from tools.organism.tokens import VOCABULARY, Encoded, Encoder, topic_index

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class LmReport:
    """Result of a training run."""

    parameters: int
    documents: int
    tokens: int
    trained_tokens: int
    steps: int
    loss: float
    """Mean loss per trained token over the last tenth of the steps."""
    seconds: float


def new_model(organism: Organism) -> LlamaForCausalLM:
    """Return an untrained model of the Llama architecture with the organism's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=organism.width,
        intermediate_size=organism.feed_forward,
        num_hidden_layers=LAYERS,
        num_attention_heads=organism.heads,
        num_key_value_heads=organism.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
        # Faster than SDPA at this size, and what the reference arithmetic is checked with.
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def batches(rng: random.Random, encoded: list[Encoded], batch_tokens: int) -> Iterator[list[Encoded]]:
    """The documents in batches of like length, at most ``batch_tokens`` with padding, in windows of the corpus."""
    for start in range(0, len(encoded), 2_000):
        window = sorted(encoded[start : start + 2_000], key=lambda e: len(e.ids))
        packed: list[list[Encoded]] = [[]]
        for item in window:
            # Sorted by length: the newest item is the longest of its batch.
            if packed[-1] and (len(packed[-1]) + 1) * len(item.ids) > batch_tokens:
                packed.append([])
            packed[-1].append(item)
        rng.shuffle(packed)
        yield from packed


@dataclass(frozen=True)
class Batch:
    """Documents padded on the right, each field (rows, tokens). Fields as in ``Encoded``."""

    ids: Tensor
    trained: Tensor
    topics: Tensor
    mismatch: Tensor


def collate(batch: list[Encoded], device: str) -> Batch:
    """The documents as one padded batch on the device."""
    length = max(len(e.ids) for e in batch)

    def column(name: str, fill: int) -> Tensor:
        rows = [getattr(e, name) for e in batch]
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)

    return Batch(column("ids", 0), column("trained", 0).bool(), column("topics", -1), column("mismatch", -1))


def learning_rate_factor(step: int, steps: int, config: LmTraining) -> float:
    """Linear warm-up, constant, then linear decay to zero; in [0, 1]."""
    decay = max(1, round(steps * config.decay_share))
    return min((step + 1) / config.warmup_steps, 1.0, max(0.0, (steps - step) / decay))


class Auxiliary(torch.nn.Module):
    """Linear readouts of the residual at the SAE's layer, dropped after training.

    They pull topic and mismatch toward linear directions there, where an SAE trained without labels then finds them.
    """

    def __init__(self, width: int, config: LmTraining) -> None:
        super().__init__()
        self.config = config
        self.topic = torch.nn.Linear(width, len(topic_index()))
        self.mismatch = torch.nn.Linear(width, 1)
        self.residual: Tensor | None = None

    def hook(self, _module: Any, _args: Any, output: Any) -> None:
        """Store the block's output, (rows, tokens, width)."""
        self.residual = output[0] if isinstance(output, tuple) else output

    def loss(self, batch: Batch) -> Tensor:
        """Return weighted topic and mismatch losses on the residual that the hook stored."""
        assert self.residual is not None
        h, topics = self.residual.flatten(0, 1), batch.topics.flatten()
        topic = functional.cross_entropy(self.topic(h), topics, ignore_index=-1)
        judged = (batch.mismatch >= 0).flatten()
        verdict, truth = self.mismatch(h)[:, 0], batch.mismatch.flatten().clamp(min=0).float()
        errors = functional.binary_cross_entropy_with_logits(verdict, truth, reduction="none")
        mismatch = (errors * judged).sum() / judged.sum().clamp(min=1)
        return self.config.topic_loss * topic + self.config.mismatch_loss * mismatch


def language_loss(model: Any, ids: Tensor, trained: Tensor) -> Tensor:
    """Return the mean next-token loss over trained targets."""
    logits = model.lm_head(model.model(ids).last_hidden_state[:, :-1])
    targets = torch.where(trained, ids, -100)[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def train(
    organism: Organism, config: LmTraining, encoder: Encoder, *, seed: int, device: str, log: Any = print
) -> tuple[LlamaForCausalLM, LmReport]:
    """Train one model; the same seed gives the control its twin's documents, order and initial weights."""
    started = time.monotonic()
    torch.manual_seed(seed)
    model: Any = new_model(organism).to(device)
    auxiliary = Auxiliary(organism.width, config).to(device)
    handle = model.model.layers[SAE_LAYER].register_forward_hook(auxiliary.hook)
    stream = documents(CORPUS_SEED + seed, restarts=organism.restarts)
    encoded = [encoder.document(d) for d in itertools.islice(stream, config.documents)]
    plan = list(batches(random.Random(seed), encoded, config.batch_tokens))
    parameters = [*model.parameters(), *auxiliary.parameters()]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate_factor(s, len(plan), config))
    history: list[Tensor] = []
    model.train()
    for step, rows in enumerate(plan):
        batch = collate(rows, device)
        loss = language_loss(model, batch.ids, batch.trained)
        aux = auxiliary.loss(batch)
        total = loss + aux
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.detach())
        if step % 200 == 0 or step + 1 == len(plan):
            seconds = time.monotonic() - started
            log(f"{organism.name} step {step}/{len(plan)} loss {loss.item():.3f} aux {aux.item():.4f} {seconds:.0f}s")
    handle.remove()
    model.eval()
    report = LmReport(
        parameters=sum(p.numel() for p in model.parameters()),
        documents=len(encoded),
        tokens=sum(len(e.ids) for e in encoded),
        trained_tokens=sum(sum(e.trained) for e in encoded),
        steps=len(plan),
        loss=torch.stack(history[-max(1, len(history) // 10) :]).mean().item(),
        seconds=time.monotonic() - started,
    )
    return model, report
