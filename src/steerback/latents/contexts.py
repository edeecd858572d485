"""Top contexts of latents: the snippet around each activation peak, the word at the peak, and the activation.

    contexts = top_contexts(engine, texts, n=8)
    contexts.of(17)     # [Context(before="The lava ", word="flows", after=" into the sea.", activation=12.3), ...]

A latent gets at most one context per text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.engines.transformers import TransformersEngine

AROUND = 60
"""Characters of a snippet on each side of the word."""
CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Context:
    """The peak of a latent in one text."""

    before: str
    word: str
    after: str
    activation: float

    @property
    def text(self) -> str:
        """The snippet as one text."""
        return f"{self.before}{self.word}{self.after}".strip()

    @property
    def marked(self) -> str:
        """The snippet with the peak word between « and »."""
        return f"{self.before}«{self.word}»{self.after}".strip()


@dataclass
class Contexts:
    """Top contexts of all latents.

    `values` (n_latents, n) are activations in descending order, 0 for a missing context. `text` and `token` of the
    same shape are the text's number and the position in it. `tokens` maps a text's number to its token ids.
    """

    values: NDArray[np.float32]
    text: NDArray[np.int64]
    token: NDArray[np.int64]
    tokens: dict[int, tuple[int, ...]]
    decode: Callable[[Sequence[int]], tuple[str, list[int]]]
    _ends: dict[int, tuple[str, list[int]]] = field(default_factory=dict)

    def of(self, latent: int) -> list[Context]:
        """Return the contexts of a latent, most active first; an empty list if it was never active."""
        row = zip(self.values[latent], self.text[latent], self.token[latent], strict=True)
        return [self._at(int(text), int(token), float(value)) for value, text, token in row if value > 0]

    def active(self) -> NDArray[np.int64]:
        """Return the latents that were active in any text, most active first."""
        peaks = self.values[:, 0]
        order = np.argsort(-peaks, kind="stable")
        return order[: int((peaks > 0).sum())]

    def _at(self, text: int, token: int, value: float) -> Context:
        if text not in self._ends:
            self._ends[text] = self.decode(self.tokens[text])
        whole, ends = self._ends[text]
        start, end = ends[token - 1] if token else 0, ends[token]
        start += len(whole[start:end]) - len(whole[start:end].lstrip())
        if re.search(r"\w", whole[start:end]):  # extend the token to the whole word
            while start and re.match(r"\w", whole[start - 1]):
                start -= 1
            while end < len(whole) and re.match(r"\w", whole[end]):
                end += 1
        left, right = max(start - AROUND, 0), min(end + AROUND, len(whole))
        while left and left < start and not whole[left - 1].isspace():
            left += 1
        while right < len(whole) and right > end and not whole[right].isspace():
            right -= 1
        return Context(whole[left:start], whole[start:end], whole[end:right], value)


def top_contexts(engine: TransformersEngine, texts: Sequence[str], n: int = 8, layer: int | None = None) -> Contexts:
    """Return the contexts of the `n` highest peaks of each latent, each in another text.

    `layer` reads another layer than the SAE's, for diagnosis. Memory is n_latents x n plus one chunk of tokens x
    n_latents; it does not grow with the number of texts.
    """
    import torch

    sae = engine.sae
    if sae is None:
        raise SteerbackError("contexts of latents need an SAE, but this target has none")
    at = sae.layer if layer is None else layer
    device = engine.runner.device
    values = torch.zeros(sae.n_latents, n, device=device)
    where = torch.zeros(2, sae.n_latents, n, dtype=torch.long, device=device)
    tokens, decode = dict[int, tuple[int, ...]](), engine.runner.prompter.with_ends
    for number, ids, states in engine.residuals([""] * len(texts), texts, (at,)):
        tokens[number] = ids
        peak, token = torch.zeros_like(values[:, 0]), torch.zeros_like(where[0, :, 0])
        for first in range(0, len(ids), CHUNK_TOKENS):
            best = engine.encoder.encode(states[at][first : first + CHUNK_TOKENS]).max(dim=0)
            height, place = best.values.float().to(device), best.indices.to(device) + first
            token = torch.where(height > peak, place, token)
            peak = torch.maximum(height, peak)
        # merge this text's peak with the n largest so far
        values, order = torch.cat([values, peak[:, None]], dim=1).topk(n, dim=1)
        here = torch.stack([torch.full_like(token, number), token])[..., None]
        where = torch.cat([where, here], dim=2).gather(2, order.expand(2, -1, -1))
    return Contexts(values.cpu().numpy(), where[0].cpu().numpy(), where[1].cpu().numpy(), tokens, decode)
