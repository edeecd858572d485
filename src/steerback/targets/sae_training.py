"""Train a sparse autoencoder on a stream of activations: TopK, or BatchTopK with one threshold (JumpReLU).

    trainer = SaeTrainer(first_batch, layer=17, options=SaeTraining(latents=16_384), steps=3_000)
    for x in batches:             # (n, d) residuals, in random order
        trainer.step(x)
    sae = trainer.sae()           # the convention of `targets.sae`: no input bias, decoder rows of norm 1

TopK keeps the k largest activations of each position (Gao et al. 2024). BatchTopK keeps k per position on average
(Bussmann et al. 2024); the mean threshold in training becomes that of the JumpReLU. Dead latents are trained on the
residual error of the live latents (AuxK, Gao et al. 2024). This module knows nothing about models, texts or SAE files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from steerback.config import Settings
from steerback.errors import SteerbackError
from steerback.targets.sae import Sae

CUT_ROWS = 512
"""Rows of a batch that set BatchTopK's threshold: sorting the activations of all rows would dominate the time."""
DECAY = 0.2
"""Share of the steps, at the end, in which the learning rate falls to zero."""
WARMUP = 50
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class SaeTraining(Settings):
    """Settings of an SAE's training."""

    kind: Literal["topk", "jumprelu"] = "jumprelu"
    latents: int = Field(16_384, ge=2)
    k: int = Field(64, ge=1)
    """Active latents per position: exactly (topk) or on average (jumprelu)."""
    batch: int = Field(8_192, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    """None: 4e-4 for 8,192 latents, scaled by 1 / sqrt(latents)."""
    aux_weight: float = Field(1 / 32, ge=0)
    dead_after: int = Field(500_000, ge=1)
    """Number of positions without activity after which a latent counts as dead."""
    seed: int = 0

    @property
    def rate(self) -> float:
        """Learning rate of the training."""
        return self.learning_rate or 4e-4 * (8_192 / self.latents) ** 0.5


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Progress after a step: `loss` is the mean squared error / variance; `dead` counts dead latents."""

    step: int
    steps: int
    loss: float
    explained: float
    l0: float
    dead: int


class SaeTrainer:
    """An SAE in training, on the device of the activations; `save` and `load` make it resumable.

    The first batch determines centre and scale of the inputs. All random numbers come from the options' seed.
    """

    def __init__(self, first: Tensor, layer: int, options: SaeTraining, steps: int) -> None:
        if options.k > options.latents:
            raise SteerbackError(f"k {options.k} is more than the number of latents, {options.latents}")
        self.layer, self.options, self.steps, self.done = layer, options, steps, 0
        device, width, x = first.device, first.shape[1], first.float()
        self.centre = x.mean(0)
        self.scale = ((x - self.centre).square().mean()).sqrt().clamp(min=1e-12)
        generator = torch.Generator().manual_seed(options.seed)
        rows = normalize(torch.randn(options.latents, width, generator=generator), dim=1).to(device)
        self.W_dec, self.W_enc = rows.clone(), rows.T.contiguous()
        self.b_enc, self.b_dec = torch.zeros(options.latents, device=device), torch.zeros(width, device=device)
        self.parameters = [getattr(self, name).requires_grad_() for name in PARAMETERS]
        self._adam = torch.optim.Adam(self.parameters, options.rate, (0.9, 0.99), fused=device.type == "cuda" or None)
        self.idle = torch.zeros(options.latents, device=device)  # positions since each latent was last active
        self.cut = torch.zeros((), device=device)  # running mean of the smallest kept activation

    def step(self, x: Tensor) -> Tensor:
        """Train on a batch of residuals (n, d); return the unexplained share of its variance, a scalar."""
        rate = min(1.0, (self.done + 1) / WARMUP, (self.steps - self.done) / max(DECAY * self.steps, 1))
        for group in self._adam.param_groups:
            group["lr"] = self.options.rate * max(rate, 0.0)
        with _fast_products():
            x = (x.float() - self.centre) / self.scale
            pre = x @ self.W_enc + self.b_enc
            z, cut = self._sparse(pre)
            residual = x - (z @ self.W_dec + self.b_dec)
            error = residual.square().mean()
            alive = (z.detach() > 0).any(0)
            self.idle = torch.where(alive, 0.0, self.idle + len(x))
            loss = error + self.options.aux_weight * self._dead_loss(pre, residual.detach())
            self._adam.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        with torch.no_grad():  # the convention of `targets.sae`: decoder rows of norm 1
            self.W_dec.copy_(normalize(self.W_dec, dim=1))
            self.cut = cut if self.done == 0 else 0.95 * self.cut + 0.05 * cut
        self.done += 1
        return error.detach() / x.square().mean()

    def _sparse(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sparse activations and the smallest kept activation."""
        active, k = pre.relu(), self.options.k
        if self.options.kind == "topk":
            top = active.topk(k, dim=1)
            return torch.zeros_like(active).scatter(1, top.indices, top.values), top.values.detach()[:, -1].mean()
        rows = active.detach()[:CUT_ROWS]
        cut = rows.flatten().topk(min(k * len(rows), rows.numel())).values[-1]
        return active * (active >= cut), cut

    def _dead_loss(self, pre: Tensor, residual: Tensor) -> Tensor:
        """Return the error when dead latents alone reconstruct the residual (AuxK)."""
        dead = (self.idle >= self.options.dead_after).nonzero().flatten()
        if not len(dead) or not self.options.aux_weight:
            return residual.new_zeros(())
        active, k = pre[:, dead].relu(), min(len(dead), residual.shape[1] // 2)
        if k < len(dead):
            top = active.topk(k, dim=1)
            active = torch.zeros_like(active).scatter(1, top.indices, top.values)
        return (residual - active @ self.W_dec[dead]).square().mean()

    def state(self, unexplained: float, l0: float = float("nan")) -> TrainingState:
        """Return the progress; `unexplained` is the return value of `step`."""
        dead = int((self.idle >= self.options.dead_after).sum())
        return TrainingState(self.done, self.steps, unexplained, 1 - unexplained, l0, dead)

    @torch.no_grad()
    def sae(self) -> Sae:
        """Return the SAE in units of the residual stream: centre and scale are folded into biases and threshold."""
        sparse, n = self.options.kind == "jumprelu", self.options.latents
        weights = {name: getattr(self, name).detach().clone() for name in PARAMETERS}
        weights["b_enc"] = self.scale * weights["b_enc"] - self.centre @ weights["W_enc"]
        weights["b_dec"] = self.scale * weights["b_dec"] + self.centre
        threshold = (self.scale * self.cut if sparse else torch.zeros_like(self.cut)).expand(n).clone()
        return Sae(self.options.kind, self.layer, threshold=threshold, k=None if sparse else self.options.k, **weights)

    def save(self) -> dict[str, object]:
        """Return the full state of the training as tensors and numbers, which load with `weights_only`."""
        kept = (*PARAMETERS, "centre", "scale", "idle", "cut")
        tensors = {name: getattr(self, name).detach() for name in kept}
        return {"tensors": tensors, "adam": self._adam.state_dict(), "done": self.done, "options": self._key}

    def load(self, saved: dict[str, object]) -> bool:
        """Restore a state that `save` returned; return False and change nothing if it is from another training."""
        tensors, adam, done = saved.get("tensors"), saved.get("adam"), saved.get("done")
        if saved.get("options") != self._key or not isinstance(tensors, dict) or not isinstance(adam, dict):
            return False
        with torch.no_grad():
            for name, value in tensors.items():
                if name in PARAMETERS:
                    getattr(self, name).copy_(value)
                else:
                    setattr(self, name, value.to(self.centre.device))
        self._adam.load_state_dict(adam)
        self.done = int(str(done))
        return True

    @property
    def _key(self) -> str:
        return f"{self.options.model_dump_json()} layer {self.layer} steps {self.steps} width {len(self.centre)}"


@contextlib.contextmanager
def _fast_products() -> Iterator[None]:
    """Allow TF32 in float32 matrix products within the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class SaeQuality:
    """How well an SAE explains activations; `dead` is the share of latents that are never active in them."""

    explained: float
    l0: float
    dead: float
    positions: int


@torch.no_grad()
def sae_quality(sae: Sae, batches: Iterable[Tensor]) -> SaeQuality:
    """Return explained variance, mean number of active latents and share of dead latents over batches (n, d)."""
    error = active = count = squares = 0.0
    total: Tensor | float = 0.0
    fired: Tensor | None = None
    for batch in batches:
        for h in torch.split(batch, 4_096):
            h = h.float()
            z = sae.encode(h)
            on = z > 0
            error += float((h - sae.decode(z)).double().square().sum())
            active += float(on.sum())
            squares += float(h.double().square().sum())
            total = total + h.double().sum(0)
            count += len(h)
            fired = on.any(0) if fired is None else fired | on.any(0)
    if fired is None:
        raise SteerbackError("no activations to measure the SAE on; give more texts")
    spread = squares - float(torch.as_tensor(total).square().sum()) / count
    return SaeQuality(1 - error / spread, active / count, 1 - float(fired.float().mean()), int(count))
