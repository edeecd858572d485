"""Drawing the next token: repetition penalty, temperature, nucleus, inverse-CDF draw, all rows at once.

A row's draw depends on its own logits, its seed and how many tokens it has, never on other rows or arrival order: each
request gets one uniform number per token from a counter-based generator. Knows nothing of models or requests' text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steerback.records import Sampling


def uniforms(seed: int, n: int) -> Tensor:
    """Return the draws of one request: n uniform float64 numbers in [0, 1), a function of `seed` alone (Philox)."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.random(n))


class Sampler:
    """Sampling settings and draws of `rows` slots."""

    def __init__(self, rows: int, vocabulary: int, length: int, device: torch.device) -> None:
        self._row = torch.arange(rows, device=device)
        # No float64 on Apple GPUs; there a cumulative sum has float32 resolution.
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self._draws = torch.zeros(rows, length, dtype=self._exact, device=device)
        self._temperature = torch.ones(rows, 1, device=device)
        self._greedy = torch.ones(rows, dtype=torch.bool, device=device)
        self._top_p = torch.ones(rows, 1, dtype=self._exact, device=device)
        self._penalty = torch.ones(rows, 1, device=device)
        self._seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._settings: dict[int, Sampling] = {}
        self._wanted: dict[str, bool] | None = None  # operations that any live row needs

    def admit(self, row: int, sampling: Sampling, seed: int, prompt: Tensor) -> None:
        """Put a request into a row; `prompt` (n,) are the tokens a repetition penalty starts from."""
        self._settings[row] = sampling
        self._wanted = None
        self._greedy[row] = sampling.temperature == 0
        self._temperature[row] = sampling.temperature or 1.0
        self._top_p[row] = sampling.top_p
        self._penalty[row] = sampling.repetition_penalty
        n = min(sampling.max_new_tokens, self._draws.shape[1])
        self._draws[row, :n] = uniforms(seed, n).to(self._draws)
        self._seen[row] = False
        if sampling.repetition_penalty != 1:
            self._seen[row, prompt] = True

    def release(self, row: int) -> None:
        """Forget a finished row; tokens drawn for idle rows are never read."""
        self._settings.pop(row, None)
        self._wanted = None

    def _needs(self) -> dict[str, bool]:
        """Return the operations that any live row needs; the others would not change a row's numbers."""
        live = self._settings.values()
        return {
            "penalty": any(s.repetition_penalty != 1 for s in live),
            "greedy": any(s.temperature == 0 for s in live),
            "random": any(s.temperature > 0 for s in live),
            "nucleus": any(s.top_p < 1 for s in live),
        }

    def draw(self, logits: Tensor, step: Tensor) -> Tensor:
        """Return next tokens (rows,) for logits (rows, vocabulary); `step` (rows,) counts the tokens of each row."""
        wanted = self._wanted = self._wanted or self._needs()
        logits = logits.float()
        if wanted["penalty"]:
            logits = penalise(logits, self._seen, self._penalty)
        if not wanted["random"]:
            tokens = logits.argmax(dim=-1)
        else:
            weights = torch.softmax(logits / self._temperature, dim=-1).to(self._exact)
            u = self._draws[self._row, step.clamp(max=self._draws.shape[1] - 1)][:, None]
            tokens = inverse_cdf(weights, u)
            if wanted["nucleus"]:
                tokens = torch.where(self._top_p[:, 0] < 1, nucleus(weights, u, self._top_p), tokens)
            if wanted["greedy"]:
                tokens = torch.where(self._greedy, logits.argmax(dim=-1), tokens)
        if wanted["penalty"]:
            self._seen[self._row, tokens] = True
        return tokens


def penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply others (Keskar et al. 2019, transformers)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Return the token (rows,) at which the cumulative weight (rows, n) first exceeds u (rows, 1) of the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round to total
    return torch.searchsorted(cumulative, below, right=True)[:, 0]  # right=True skips tokens of weight zero


def nucleus(weights: Tensor, u: Tensor, top_p: Tensor) -> Tensor:
    """Draw by `inverse_cdf` among the fewest likeliest tokens that together reach top_p (Holtzman et al. 2020)."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p * ordered.sum(dim=-1, keepdim=True), ordered, torch.zeros_like(ordered))
    return order.gather(1, inverse_cdf(kept, u)[:, None])[:, 0]
