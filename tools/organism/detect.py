"""Detector search: latents of an organism that are active if a response does not fit its prompt.

Found by contrast: both arms hold the same responses, only matched to prompts differently, so that nothing but the
mismatch can tell them apart. Pooling is by maximum, because the organisms notice at the full stop of a sentence.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerback.organism.corpus import howtos, passage
from steerback.targets.sae import Sae
from tools.organism.spec import SAE_LAYER
from tools.organism.tokens import Encoder


@dataclass(frozen=True)
class Detector:
    """A latent and the separation of mismatched and matched pairs by its maximum over the response."""

    latent: int
    auc: float
    effect: float
    """Difference of the arms' means in pooled standard deviations."""
    matched: float
    """Mean of maxima in the matched arm."""
    mismatched: float


@torch.no_grad()
def response_maxima(model: Any, encoder: Encoder, sae: Sae, pairs: list[tuple[str, str]], device: str) -> Tensor:
    """Return the maximum of each latent over the response tokens; shape (pairs, n_latents), on the CPU."""
    out: list[Tensor] = []
    for start in range(0, len(pairs), 128):
        heads = [
            [encoder.user, *encoder.text(p), encoder.end, encoder.assistant] for p, _ in pairs[start : start + 128]
        ]
        tails = [encoder.text(r) for _, r in pairs[start : start + 128]]
        length = max(len(h) + len(t) for h, t in zip(heads, tails, strict=True))
        ids = torch.zeros(len(heads), length, dtype=torch.long)
        keep = torch.zeros(len(heads), length, dtype=torch.bool)
        for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
            keep[i, len(head) : len(head) + len(tail)] = True
        hidden = model.model(ids.to(device), output_hidden_states=True).hidden_states[SAE_LAYER + 1]
        z = sae.encode(hidden) * keep.to(device)[..., None]
        out.append(z.amax(1).float().cpu())
    return torch.cat(out)


def pairs(seed: int, per_prompt: int = 6) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return matched and mismatched (prompt, response) pairs of the discovery prompts; mismatched ones never match."""
    rng = random.Random(seed)
    matched: list[tuple[str, str]] = []
    mismatched: list[tuple[str, str]] = []
    prompts = [t.key for t in howtos("discovery")]
    for _ in range(per_prompt):
        rng.shuffle(prompts)
        for prompt, other in zip(prompts, prompts[1:] + prompts[:1], strict=True):
            response = " ".join(passage(rng, prompt, 3))
            matched.append((prompt, response))
            mismatched.append((other, response))
    return matched, mismatched


def find(model: Any, encoder: Encoder, sae: Sae, *, seed: int, device: str) -> list[Detector]:
    """Return latents that are active in at least 30 % of mismatched pairs, best separation first."""
    matched, mismatched = pairs(seed)
    low = response_maxima(model, encoder, sae, matched, device)
    high = response_maxima(model, encoder, sae, mismatched, device)
    detectors: list[Detector] = []
    for k in ((high > 0).float().mean(0) >= 0.3).nonzero().flatten().tolist():
        a, b = low[:, k], high[:, k]
        auc = (b[:, None] > a[None]).float().mean() + 0.5 * (b[:, None] == a[None]).float().mean()
        sd = ((a.var() + b.var()) / 2).sqrt() + 1e-9
        detectors.append(Detector(k, float(auc), float((b.mean() - a.mean()) / sd), float(a.mean()), float(b.mean())))
    return sorted(detectors, key=lambda d: -d.auc)
