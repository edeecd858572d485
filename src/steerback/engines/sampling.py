"""Sampling of the next token for all rows at once: repetition penalty, temperature, nucleus, inverse-CDF draw.

Each request gets one uniform number per token from a counter-based generator. A draw therefore depends only on the
row's logits, seed and token count, never on other rows or arrival order. This module does not know about models or
text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steerback.records import Sampling


def uniforms(seed: int, n: int) -> Tensor:
    """Return n uniform float64 numbers in [0, 1) for one request, a function of `seed` alone (Philox)."""
    generator = np.random.Generator(np.random.Philox(key=seed % 2**64))
    return torch.from_numpy(generator.random(n))


class Sampler:
    """Sampling settings and random numbers of `rows` slots."""

    def __init__(self, rows: int, vocabulary: int, length: int, device: torch.device) -> None:
        self._row = torch.arange(rows, device=device)
        # Apple GPUs have no float64, so their cumulative sums have float32 precision.
        self._exact = torch.float32 if device.type == "mps" else torch.float64
        self._draws = torch.zeros(rows, length, dtype=self._exact, device=device)
        self._temperature = torch.ones(rows, 1, device=device)
        self._greedy = torch.ones(rows, dtype=torch.bool, device=device)
        self._top_p = torch.ones(rows, 1, dtype=self._exact, device=device)
        self._penalty = torch.ones(rows, 1, device=device)
        self._seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
        self._settings: dict[int, Sampling] = {}
        self._wanted: dict[str, bool] | None = None  # operations that any active row needs

    def admit(self, row: int, sampling: Sampling, seed: int, prompt: Tensor) -> None:
        """Assign a request to a row; `prompt` (n,) are the first tokens that the repetition penalty counts."""
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
        """Reset a finished row; tokens drawn for idle rows are ignored."""
        self._settings.pop(row, None)
        self._wanted = None

    def draw(self, logits: Tensor, step: Tensor) -> Tensor:
        """Return next tokens (rows,) for logits (rows, vocabulary); `step` (rows,) is the token count of each row."""
        live = self._settings.values()
        wanted = self._wanted = self._wanted or {  # the other operations can be skipped without changing a result
            "penalty": any(s.repetition_penalty != 1 for s in live),
            "greedy": any(s.temperature == 0 for s in live),
            "random": any(s.temperature > 0 for s in live),
            "nucleus": any(s.top_p < 1 for s in live),
        }
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
    """Return the index (rows,) at which the cumulative weight (rows, n) first exceeds u (rows, 1) of the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round to total
    return torch.searchsorted(cumulative, below, right=True)[:, 0]  # right=True skips tokens of weight zero


def nucleus(weights: Tensor, u: Tensor, top_p: Tensor) -> Tensor:
    """Draw with `inverse_cdf` from the smallest set of likeliest tokens that reaches top_p (Holtzman et al. 2020)."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p * ordered.sum(dim=-1, keepdim=True), ordered, torch.zeros_like(ordered))
    return order.gather(1, inverse_cdf(kept, u)[:, None])[:, 0]
