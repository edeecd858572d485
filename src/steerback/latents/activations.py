"""Residuals of texts as shuffled batches within a bound of memory, and what replacing them by an SAE's output costs.

Read are the words of prompt and answer: special and template tokens are the same in every text, and the first position
is left out, since its norm is many times that of the others (an attention sink) and would be most of the variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerback.engines.steering import BlockOutput, Hook, Pass
from steerback.latents.corpus import TrainingText
from steerback.targets.sae import Sae

if TYPE_CHECKING:
    from steerback.engines.transformers import TransformersEngine

OUTLIER = 10.0
"""A position whose norm is so many times the median gives way to another: a few would be all of the variance."""

Batch = dict[int, Tensor]
"""Residuals (n, d) of the same positions by layer."""


class ActivationStream:
    """Residuals of `layers` at all words of some texts, in random order, `memory` bytes of them at a time at most.

    What fits is computed once and kept; else each pass computes part after part anew. The same seed gives the same
    batches, so a stopped training goes on where it was.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        texts: Sequence[TrainingText],
        layers: Sequence[int],
        memory: float,
        seed: int = 0,
    ) -> None:
        self.engine, self.layers, self.seed = engine, tuple(layers), seed
        conversations = [engine.runner.prompter.conversation(t.prompt, t.text) for t in texts]
        order = torch.randperm(len(texts), generator=self._generator(0)).tolist()
        width = engine.runner.site.d_model * len(self.layers) * torch.finfo(engine.runner.dtype).bits // 8
        self.most = max(int(memory / width), 1)
        self.parts: list[list[int]] = [[]]
        self.sizes = [0]
        self._texts = [engine.words(c) for c in conversations]
        for n in order:
            size = len(self._texts[n][1])
            if self.sizes[-1] + size > self.most and self.sizes[-1]:
                self.parts.append([])
                self.sizes.append(0)
            if size:
                self.parts[-1].append(n)
                self.sizes[-1] += size
        self._kept: tuple[int, Batch] | None = None

    @property
    def positions(self) -> int:
        """How many residuals a pass has."""
        return sum(self.sizes)

    def steps(self, size: int, passes: int) -> int:
        """Return the number of batches of `size` in some passes."""
        return passes * sum(n // size for n in self.sizes)

    def batches(self, size: int, passes: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of some passes; the first `skip` are left out without being computed."""
        for number in range(passes):
            for part, positions in enumerate(self.sizes):
                count = positions // size
                if skip >= count:
                    skip -= count
                    continue
                held = self.part(part)
                seed = 1 + number * len(self.parts) + part
                order = torch.randperm(positions, generator=self._generator(seed))
                for n in range(skip, count):
                    rows = order[n * size : (n + 1) * size]
                    yield {layer: h[rows.to(h.device)] for layer, h in held.items()}
                skip = 0

    def part(self, part: int) -> Batch:
        """Return the residuals of one part; the last one that was asked for is kept."""
        if self._kept is not None and self._kept[0] == part:
            return self._kept[1]
        self._kept = None  # first, so that never two are held
        found = collect(self.engine, [self._texts[n] for n in self.parts[part]], self.layers, self.sizes[part])
        self._kept = part, found
        return found

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + number)


@torch.inference_mode()
def collect(
    engine: TransformersEngine, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], layers: Sequence[int], n: int
) -> Batch:
    """Return the residuals of texts given as (token ids, positions to keep), `n` positions in all, in any order.

    Outliers give way to other positions, so that the number stays.
    """
    device, dtype, width = engine.runner.device, engine.runner.dtype, engine.runner.site.d_model
    found = {layer: torch.empty(n, width, dtype=dtype, device=device) for layer in layers}
    at = 0
    for number, states in engine.states([ids for ids, _ in texts], layers):
        chosen = torch.tensor(texts[number][1], device=device)
        for layer, h in states.items():
            found[layer][at : at + len(chosen)] = h[chosen]
        at += len(chosen)
    generator = torch.Generator().manual_seed(n)
    for h in found.values():
        norms = torch.cat([part.float().norm(dim=1) for part in torch.split(h, 65_536)])
        usual = norms <= OUTLIER * norms.median()
        if not usual.all():
            odd, even = (~usual).nonzero().flatten(), usual.nonzero().flatten()
            h[odd] = h[even[torch.randint(len(even), (len(odd),), generator=generator).to(device)]]
    return found


@dataclass(frozen=True, slots=True)
class LossRecovered:
    """Mean next-token loss at the words of texts, in nats: as it is, with the SAE's output in place of the residual,
    and with zeros in its place. The first position and template tokens are always left as they are."""

    plain: float
    replaced: float
    zero: float

    @property
    def share(self) -> float:
        """Share of the loss between zeros and the model's own that the SAE recovers."""
        return (self.zero - self.replaced) / (self.zero - self.plain)


@torch.inference_mode()
def loss_recovered(engine: TransformersEngine, sae: Sae, texts: Sequence[TrainingText]) -> LossRecovered:
    """Return the next-token loss of texts with and without an SAE in the model's way, at the SAE's own layer."""
    runner, sums, count = engine.runner, [0.0, 0.0, 0.0], 0
    sae = sae.to(runner.device)
    block = runner.decoder.layers[sae.layer]
    for text in texts:
        ids, words = engine.words(runner.prompter.conversation(text.prompt, text.text))
        if len(words) < 2:
            continue
        tokens = torch.tensor([ids], device=runner.device)
        where = torch.zeros(len(ids), dtype=torch.bool, device=runner.device)
        where[list(words)] = True
        told = where[1:].clone()  # the loss counts where a word is predicted
        for n, replace in enumerate((None, sae, 0.0)):
            handle = block.register_forward_hook(_replacing(replace, where))
            try:
                logits = runner.logits(runner.hidden(tokens, *_positions(tokens)))[0, :-1].float()
            finally:
                handle.remove()
            losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            sums[n] += float(losses[told].double().sum())
        count += int(told.sum())
    return LossRecovered(*(total / max(count, 1) for total in sums))


def _positions(tokens: Tensor) -> tuple[Tensor, int, None, Pass]:
    """Return what `Runner.hidden` needs beside tokens (1, T) that are read in one unsteered pass."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    return positions, tokens.shape[1], None, Pass(positions, [])


def _replacing(by: Sae | float | None, where: Tensor) -> Hook:
    """Return a hook that puts an SAE's output, or a number, in the place of a block's residual (1, T, d) at `where`."""

    def hook(_module: torch.nn.Module, _inputs: object, output: BlockOutput) -> BlockOutput | None:
        h = output[0] if isinstance(output, tuple) else output
        if by is None:
            return None
        put = by.decode(by.encode(h.float())).to(h.dtype) if isinstance(by, Sae) else torch.full_like(h, by)
        changed = torch.where(where[None, :, None], put, h)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
