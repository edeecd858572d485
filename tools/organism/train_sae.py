"""Activations of an organism's corpus with their topics, and its SAE trained on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerback.targets.sae import Sae
from steerback.targets.sae_training import SaeTrainer, SaeTraining
from tools.organism.documents import documents
from tools.organism.spec import SAE_LAYER, SaeConstants
from tools.organism.tokens import Encoder
from tools.organism.train_lm import batches, collate


@dataclass(frozen=True)
class Activations:
    """Residuals of fresh documents at the SAE's layer, one row a token (padding left out)."""

    h: Tensor
    """(tokens, d_model)"""
    topics: Tensor
    """(tokens,) index of the topic, -1 for prompt, restart and special tokens"""
    ids: Tensor
    """(tokens,) token ids"""
    document: Tensor
    """(tokens,) index of the document"""


@torch.no_grad()
def collect(model: Any, encoder: Encoder, *, seed: int, tokens: int, restarts: bool, device: str) -> Activations:
    """Residuals of about ``tokens`` tokens of the corpus of ``seed`` (use seeds that training did not see)."""
    parts: list[tuple[Tensor, ...]] = []
    tokens_read = row = 0
    for batch in _batches(encoder, seed, restarts):
        padded = collate(batch, device)
        ids, topics = padded.ids, padded.topics
        lengths = torch.tensor([len(e.ids) for e in batch], device=device)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = model.model(ids, output_hidden_states=True).hidden_states[SAE_LAYER + 1]
        rows = torch.arange(row, row + len(batch), device=device)[:, None].expand_as(ids)
        parts.append((hidden[real], topics[real], ids[real], rows[real]))
        row += len(batch)
        tokens_read += int(real.sum())
        if tokens_read >= tokens:
            break
    return Activations(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _batches(encoder: Encoder, seed: int, restarts: bool) -> Iterator[Any]:
    import random

    stream = documents(seed, restarts=restarts)
    rng = random.Random(seed)
    while True:
        yield from batches(rng, [encoder.document(d) for d in itertools.islice(stream, 1_000)], 16_384)


def train(data: Activations, config: SaeConstants, *, seed: int, log: Any = print) -> Sae:
    """Train on collected activations, drawn at random, with the package's own trainer (BatchTopK, then JumpReLU)."""
    options = SaeTraining(
        latents=config.latents,
        k=config.k,
        batch=config.batch,
        learning_rate=config.learning_rate,
        aux_weight=config.aux_weight,
        dead_after=config.dead_after_steps * config.batch,
        seed=seed,
    )
    trainer = SaeTrainer(data.h, SAE_LAYER, options, config.steps)
    generator = torch.Generator(device=data.h.device).manual_seed(seed)
    for step in range(config.steps):
        rows = torch.randint(len(data.h), (config.batch,), device=data.h.device, generator=generator)
        lost = trainer.step(data.h[rows])
        if step % 500 == 0 or step + 1 == config.steps:
            state = trainer.state(float(lost))
            log(f"sae step {step} loss {state.loss:.4f} dead {state.dead}")
    return trainer.sae()
