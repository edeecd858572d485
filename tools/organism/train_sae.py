"""Training of an organism's sparse autoencoder: BatchTopK, then one threshold for all latents (JumpReLU).

Saved encoders subtract no input bias: pre = h @ W_enc + b_enc, z = pre * (pre > threshold), h_hat = z @ W_dec + b_dec,
with unit-norm decoder rows, so that a boost is a distance in the residual stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerback.organism.corpus import documents
from tools.organism.spec import SAE_LAYER, SaeTraining
from tools.organism.tokens import Encoder
from tools.organism.train_lm import batches, collate


@dataclass
class TrainedSae:
    """A JumpReLU SAE in the convention of the module's docstring."""

    W_enc: Tensor
    """(d_model, n_latents)"""
    b_enc: Tensor
    """(n_latents,)"""
    W_dec: Tensor
    """(n_latents, d_model), rows of norm 1"""
    b_dec: Tensor
    """(d_model,)"""
    threshold: Tensor
    """(n_latents,)"""

    def encode(self, h: Tensor) -> Tensor:
        """Activations (..., n_latents) of residuals (..., d_model)."""
        pre = h @ self.W_enc + self.b_enc
        return pre * (pre > self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction (..., d_model)."""
        return z @ self.W_dec + self.b_dec

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, as saved."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        return {name: getattr(self, name).detach().float().cpu().contiguous() for name in names}


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
    found = row = 0
    for batch in _batches(encoder, seed, restarts):
        padded = collate(batch, device)
        ids, topics = padded.ids, padded.topics
        lengths = torch.tensor([len(e.ids) for e in batch], device=device)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        hidden = model.model(ids, output_hidden_states=True).hidden_states[SAE_LAYER + 1]
        rows = torch.arange(row, row + len(batch), device=device)[:, None].expand_as(ids)
        parts.append((hidden[real], topics[real], ids[real], rows[real]))
        row += len(batch)
        found += int(real.sum())
        if found >= tokens:
            break
    return Activations(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _batches(encoder: Encoder, seed: int, restarts: bool) -> Iterator[Any]:
    import random

    stream = documents(seed, restarts=restarts)
    rng = random.Random(seed)
    while True:
        yield from batches(rng, [encoder.document(d) for d in itertools.islice(stream, 1_000)], 16_384)


def train(data: Activations, config: SaeTraining, *, seed: int, log: Any = print) -> TrainedSae:
    """Train on collected activations."""
    torch.manual_seed(seed)
    device, width = data.h.device, data.h.shape[1]
    centre = data.h.mean(0)
    scale = float((data.h - centre).norm(dim=1).mean() / width**0.5)
    x_all = (data.h - centre) / scale
    W_dec = torch.nn.functional.normalize(torch.randn(config.latents, width, device=device), dim=1)
    W_enc = W_dec.T.clone()
    b_enc, b_dec = torch.zeros(config.latents, device=device), torch.zeros(width, device=device)
    parameters = [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec)]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99))
    generator = torch.Generator(device=device).manual_seed(seed)
    last_fired = torch.zeros(config.latents, device=device)
    smallest = torch.zeros((), device=device)
    for step in range(config.steps):
        # Decay the rate to zero over the last fifth.
        rate = config.learning_rate * min(1.0, (config.steps - step) / (0.2 * config.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = x_all[torch.randint(len(x_all), (config.batch,), device=device, generator=generator)]
        pre = x @ W_enc + b_enc
        active = pre.relu()
        cut = active.flatten().topk(config.k * config.batch).values[-1]
        z = active * (active >= cut)
        residual = x - (z @ W_dec + b_dec)
        loss = residual.pow(2).mean()
        last_fired = torch.where((z > 0).any(0), 0.0, last_fired + 1)
        dead = last_fired > config.dead_after_steps
        loss = loss + config.aux_weight * _dead_loss(pre, residual.detach(), W_dec, dead, width)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            W_dec.copy_(torch.nn.functional.normalize(W_dec, dim=1))
            smallest = 0.99 * smallest + 0.01 * cut if step else cut.clone()
        if step % 500 == 0 or step + 1 == config.steps:
            log(f"sae step {step} loss {loss.item():.4f} dead {int(dead.sum())}")
    return _unscaled(W_enc, b_enc, W_dec, b_dec, smallest, centre, scale)


def _dead_loss(pre: Tensor, residual: Tensor, W_dec: Tensor, dead: Tensor, width: int) -> Tensor:
    """Error of the best reconstruction of the residual by dead latents alone (AuxK)."""
    n = int(dead.sum())
    if n == 0:
        return residual.new_zeros(())
    k = min(n, width // 2)
    values, indices = torch.where(dead, pre, -torch.inf).topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return (residual - z @ W_dec).pow(2).mean()


@torch.no_grad()
def _unscaled(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, cut: Tensor, centre: Tensor, scale: float
) -> TrainedSae:
    """The SAE in the residual stream's own units: x = (h - centre) / scale is folded into biases and threshold."""
    return TrainedSae(
        W_enc=W_enc.detach().clone(),
        b_enc=(scale * b_enc - centre @ W_enc).detach(),
        W_dec=W_dec.detach().clone(),
        b_dec=(scale * b_dec + centre).detach(),
        threshold=(scale * cut).expand(W_enc.shape[1]).clone(),
    )


@torch.no_grad()
def quality(sae: TrainedSae, data: Activations) -> dict[str, float]:
    """Explained variance, mean number of active latents and dead latents on (held-out) activations."""
    fired = torch.zeros(sae.W_dec.shape[0], device=data.h.device)
    error = active = 0.0
    for h in torch.split(data.h, 8_192):
        z = sae.encode(h)
        error += float((h - sae.decode(z)).pow(2).sum())
        active += float((z > 0).sum())
        fired += (z > 0).sum(0)
    total = float((data.h - data.h.mean(0)).pow(2).sum())
    return {
        "explained_variance": 1 - error / total,
        "l0": active / len(data.h),
        "dead_latents": float((fired == 0).sum()),
        "tokens": float(len(data.h)),
    }
