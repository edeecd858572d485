"""Residuals of texts as shuffled batches in bounded memory, and the loss when an SAE's output replaces them.

Only the words of prompt and answer are read. Special and template tokens are left out because they are equal in every
text. The first position is left out because it is an attention sink: its norm is many times that of the others, so it
would be most of the variance.
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
"""Positions with a norm above this multiple of the median are replaced: a few of them would be most of the variance."""

Batch = dict[int, Tensor]
"""Residuals (n, d) by layer, of the same positions."""


class ActivationStream:
    """Residuals of `layers` at all words of some texts, in random order, with at most `memory` bytes at a time.

    If all residuals fit, they are computed once; else each pass computes them again, part by part. The same seed gives
    the same batches, so that an interrupted training can resume.
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
        """Number of residuals per pass."""
        return sum(self.sizes)

    def steps(self, size: int, passes: int) -> int:
        """Return the number of batches of `size` in `passes` passes."""
        return passes * sum(n // size for n in self.sizes)

    def batches(self, size: int, passes: int, skip: int = 0) -> Iterator[Batch]:
        """Yield the batches of `passes` passes; the first `skip` batches are skipped without computing them."""
        for number in range(passes):
            for part, positions in enumerate(self.sizes):
                count = positions // size
                if skip >= count:
                    skip -= count
                    continue
                states = self.part(part)
                seed = 1 + number * len(self.parts) + part
                order = torch.randperm(positions, generator=self._generator(seed))
                for n in range(skip, count):
                    rows = order[n * size : (n + 1) * size]
                    yield {layer: h[rows.to(h.device)] for layer, h in states.items()}
                skip = 0

    def part(self, part: int) -> Batch:
        """Return the residuals of one part; the latest part stays in memory."""
        if self._kept is not None and self._kept[0] == part:
            return self._kept[1]
        self._kept = None  # release the old part first, so that memory never contains two
        states = collect(self.engine, [self._texts[n] for n in self.parts[part]], self.layers, self.sizes[part])
        self._kept = part, states
        return states

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + number)


@torch.inference_mode()
def collect(
    engine: TransformersEngine, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], layers: Sequence[int], n: int
) -> Batch:
    """Return the residuals of texts, given as (token ids, positions to keep), in any order; `n` positions in all.

    Outliers are replaced by other positions, so that the number of residuals stays `n`.
    """
    device, dtype, width = engine.runner.device, engine.runner.dtype, engine.runner.site.d_model
    residuals = {layer: torch.empty(n, width, dtype=dtype, device=device) for layer in layers}
    at = 0
    for number, states in engine.states([ids for ids, _ in texts], layers):
        chosen = torch.tensor(texts[number][1], device=device)
        for layer, h in states.items():
            residuals[layer][at : at + len(chosen)] = h[chosen]
        at += len(chosen)
    generator = torch.Generator().manual_seed(n)
    for h in residuals.values():
        norms = torch.cat([part.float().norm(dim=1) for part in torch.split(h, 65_536)])
        usual = norms <= OUTLIER * norms.median()
        if not usual.all():
            odd, even = (~usual).nonzero().flatten(), usual.nonzero().flatten()
            h[odd] = h[even[torch.randint(len(even), (len(odd),), generator=generator).to(device)]]
    return residuals


@dataclass(frozen=True, slots=True)
class LossRecovered:
    """Mean next-token loss at the words of texts, in nats: unchanged, with the SAE's output in place of the residual,
    and with zeros in place of the residual. The first position and template tokens are never replaced."""

    plain: float
    replaced: float
    zero: float

    @property
    def share(self) -> float:
        """Share of the loss difference between zeros and the unchanged model that the SAE recovers."""
        return (self.zero - self.replaced) / (self.zero - self.plain)


@torch.inference_mode()
def loss_recovered(engine: TransformersEngine, sae: Sae, texts: Sequence[TrainingText]) -> LossRecovered:
    """Return the next-token loss of texts with and without the SAE's output in place of its layer's residual."""
    runner, sums, count = engine.runner, [0.0, 0.0, 0.0], 0
    sae = sae.to(runner.device)
    block = runner.decoder.layers[sae.layer]
    for text in texts:
        ids, words = engine.words(runner.prompter.conversation(text.prompt, text.text))
        if len(words) < 2:
            continue
        tokens = torch.tensor([ids], device=runner.device)
        positions = torch.arange(len(ids), device=runner.device)[None]
        where = torch.zeros(len(ids), dtype=torch.bool, device=runner.device)
        where[list(words)] = True
        predicted = where[1:].clone()  # the loss counts only positions whose next token is a word
        for n, replace in enumerate((None, sae, 0.0)):
            handle = block.register_forward_hook(_replacing(replace, where))
            try:
                hidden = runner.hidden(tokens, positions, len(ids), None, Pass(positions, []))
                logits = runner.logits(hidden)[0, :-1].float()
            finally:
                handle.remove()
            losses = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
            sums[n] += float(losses[predicted].double().sum())
        count += int(predicted.sum())
    return LossRecovered(*(total / max(count, 1) for total in sums))


def _replacing(by: Sae | float | None, where: Tensor) -> Hook:
    """Return a hook that replaces a block's residual (1, T, d) at `where` by the SAE's output or a number."""

    def hook(_module: torch.nn.Module, _inputs: object, output: BlockOutput) -> BlockOutput | None:
        h = output[0] if isinstance(output, tuple) else output
        if by is None:
            return None
        put = by.decode(by.encode(h.float())).to(h.dtype) if isinstance(by, Sae) else torch.full_like(h, by)
        changed = torch.where(where[None, :, None], put, h)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
