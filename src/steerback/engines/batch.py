"""Continuous batching with fixed shapes: requests enter and leave slots, and all slots decode together.

Prompts are prefilled in small groups, padded to a length that depends only on the prompt. Each decoding step runs all
slots. Every request therefore gets the same tensor shapes, and the same floating-point numbers, whatever its slot, its
neighbours or the order of arrival. This module uses the runner's forward pass; it does not load models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerback.engines.kv import FlatCache, PagedCache, PromptCache
from steerback.engines.runner import Runner
from steerback.engines.sampling import Sampler
from steerback.engines.steering import GROUP, Pass, Steering
from steerback.records import Completion, Request
from steerback.targets.sae import Sae

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


PAGE = 64
"""Positions per cache page on a CPU."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Tensor shapes of a batch; part of the engine's fingerprint, because other shapes give other floats."""

    rows: int
    prefill_rows: int = 8
    page: int | None = PAGE  # None: no pages

    @staticmethod
    def bucket(prompt: int) -> int:
        """Return the padded length of a prompt, which depends only on the prompt's length."""
        step = 16 if prompt <= 256 else 64
        return -(-prompt // step) * step


@dataclass(slots=True)
class DecodingSlot:
    """A request in progress."""

    request: Request
    prompt: int
    planned: tuple[tuple[int, ...], tuple[int, ...]]  # edited layers of the prompt and of the generated part
    tokens: list[int] = field(default_factory=list)
    checked: int = 0

    @property
    def boundary(self) -> int:
        """First position that gets the edits of the generated phase."""
        return self.request.boundary(self.prompt)


Item = tuple[Request, tuple[int, ...]]  # a request and its prompt tokens
BLOCK = 8
"""Decoding steps between two checks for finished rows. A row that ends within a block idles until the block ends."""


class Queue:
    """Waiting requests, grouped by padded prompt length; batches in several threads take from the same queue."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[int, deque[Item]] = {}
        for item in items:
            self._buckets.setdefault(Shape.bucket(len(item[1])), deque()).append(item)
        self.steps = max((request.sampling.max_new_tokens for request, _ in items), default=1)
        longest = max((len(ids) + request.sampling.max_new_tokens for request, ids in items), default=1)
        self.length = max(longest + BLOCK, *self._buckets, 1)

    def put(self, item: Item) -> bool:
        """Add a request and return True; return False if it is too long for the current batches."""
        request, ids = item
        steps, bucket = request.sampling.max_new_tokens, Shape.bucket(len(ids))
        if steps > self.steps or len(ids) + steps + BLOCK > self.length or bucket > self.length:
            return False
        with self._lock:
            self._buckets.setdefault(bucket, deque()).append(item)
        return True

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def take(self, free: int, rows: int, idle: bool) -> tuple[int, list[Item]]:
        """Return a bucket and up to `rows` of its requests for `free` slots, or no requests if waiting is better.

        A prefill costs the same for one prompt as for `rows` prompts, so a busy batch waits until enough slots are
        free.
        """
        with self._lock:
            left = len(self)
            if not left or not free or (not idle and free < min(rows, left)):
                return 0, []
            bucket = max(self._buckets, key=lambda b: len(self._buckets[b]))
            queue = self._buckets[bucket]
            return bucket, [queue.popleft() for _ in range(min(rows, free, len(queue)))]

    def drain(self) -> list[Item]:
        """Take all remaining requests out of the queue."""
        with self._lock:
            left = [item for queue in self._buckets.values() for item in queue]
            self._buckets.clear()
            return left


class DecodingBatch:
    """Slots that decode together; `advance` runs one block of steps and returns the finished responses."""

    def __init__(
        self, runner: Runner, queue: Queue, shape: Shape, sae: Sae | None, directions: Mapping[str, Tensor]
    ) -> None:
        self.runner, self.queue, self.shape = runner, queue, shape
        self._entering: list[Item] = []
        longest, steps = queue.length, queue.steps
        device, rows = runner.device, shape.rows
        self.slots: dict[int, DecodingSlot] = {}
        self._free = list(range(rows))
        self._cache = PagedCache(rows, longest, shape.page) if shape.page else FlatCache(rows, longest)
        self._sampler = Sampler(rows, runner.vocabulary, steps, device)
        self._first = Sampler(shape.prefill_rows, runner.vocabulary, steps, device)
        place = (longest, runner.site, sae, directions, device)
        self._prompts = Steering("prompt", shape.prefill_rows, *place)
        self._continued = Steering("generated", shape.prefill_rows, *place)  # for the last position of a prefix
        self._decode = Steering("generated", rows, *place)
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._steps = torch.zeros(rows, dtype=torch.long, device=device)
        self._live = torch.zeros(rows, dtype=torch.bool, device=device)

    @property
    def pending(self) -> bool:
        """Return True while requests are running or waiting."""
        return bool(self.slots or len(self.queue))

    def unfinished(self) -> list[Item]:
        """Return the requests that were taken but not finished, so that another batch can restart them."""
        running = {s.request.key: (s.request, self.runner.prompt_of(s.request)) for s in self.slots.values()}
        return [*(running | {item[0].key: item for item in self._entering}).values()]

    @torch.inference_mode()
    def advance(self) -> list[tuple[str, Completion]]:
        """Fill free slots, decode one block of steps in all slots, and release finished slots."""
        self._fill()
        left = max((s.request.sampling.max_new_tokens - len(s.tokens) for s in self.slots.values()), default=0)
        drawn = [self._step(ahead) for ahead in range(min(BLOCK, left))]
        if drawn:
            # One transfer to the host per block, because each transfer waits for the device.
            block = torch.stack(drawn, dim=1).tolist()
            for n, slot in self.slots.items():
                slot.tokens.extend(block[n])
        return [done for n in list(self.slots) if (done := self._finish(n)) is not None]

    def _fill(self) -> None:
        """Prefill waiting requests until no slot is free or the queue holds them back."""
        while True:
            bucket, self._entering = self.queue.take(len(self._free), self.shape.prefill_rows, not self.slots)
            if not self._entering:
                return
            self._prefill(bucket, self._entering)

    def _prefill(self, bucket: int, items: Sequence[Item]) -> None:
        rows, device = self.shape.prefill_rows, self.runner.device
        ids = torch.zeros(rows, bucket, dtype=torch.long)
        # Unused rows get length 1, so that `lengths - 1` is a valid position.
        lengths = torch.ones(rows, dtype=torch.long)
        for n, (_, prompt) in enumerate(items):
            ids[n, : len(prompt)] = torch.tensor(prompt)
            lengths[n] = len(prompt)
        ids, lengths = ids.to(device), lengths.to(device)
        live = torch.arange(rows, device=device) < len(items)
        planned, ends = [], lengths.clone()
        for n, (request, prompt) in enumerate(items):
            planned.append(self._prompts.admit(n, request))
            ends[n] = request.boundary(len(prompt))
            if request.prefix is not None:
                self._continued.admit(n, request)
            self._first.admit(n, request.sampling, request.seed, ids[n, : len(prompt)])
        positions = torch.arange(bucket, device=device).expand(rows, -1)
        valid = (positions < lengths[:, None]) & live[:, None]
        cache, parts = PromptCache(), [(self._prompts, valid & (positions < ends[:, None]))]
        if any(request.prefix is not None for request, _ in items):
            parts.append((self._continued, valid & (positions >= ends[:, None])))
        forward = Pass(positions.contiguous(), parts)
        hidden = self.runner.hidden(ids, positions[:1], bucket, cache, forward)
        last = hidden[torch.arange(rows, device=device), lengths - 1]
        tokens = self._first.draw(self.runner.logits(last), torch.zeros_like(lengths))
        slots = [self._free.pop(0) for _ in items]
        self._cache.admit(cache, list(range(len(items))), slots)
        for n, (slot, (request, prompt), token) in enumerate(zip(slots, items, tokens.tolist(), strict=False)):
            state = DecodingSlot(request, len(prompt), (planned[n], self._decode.admit(slot, request)), [token])
            self._enter(slot, n, state, prompt)
        for n in range(len(items)):
            self._prompts.release(n)
            self._continued.release(n)
            self._first.release(n)

    def _enter(self, slot: int, row: int, state: DecodingSlot, prompt: tuple[int, ...]) -> None:
        """Copy a prefilled row into its slot: tokens, sampling state, receipts and recordings."""
        known = torch.tensor([*prompt, *state.tokens], device=self.runner.device)
        self._sampler.admit(slot, state.request.sampling, state.request.seed, known)
        size = len(prompt)
        parts = [(self._prompts, slice(0, state.boundary), state.planned[0])]
        if state.boundary < size:
            parts.append((self._continued, slice(state.boundary, size), state.planned[1]))
        read = self.runner.site.record_layer(state.request.record)
        for steering, span, layers in parts:
            for layer in layers:
                self._decode.tally.at(layer)[slot, span] = steering.tally.at(layer)[row, span]
            if read is not None and state.request.record is not None:
                width = -(-len(state.request.record.latents) // GROUP) * GROUP
                self._decode.records[read].kept[slot, span, :width] = steering.records[read].kept[row, span, :width]
        self._tokens[slot] = state.tokens[0]
        self._positions[slot] = size
        self._steps[slot] = 1
        self._live[slot] = True
        self.slots[slot] = state

    def _step(self, ahead: int) -> Tensor:
        """Feed every slot its last token, `ahead` steps after the tokens in `slots`; return the next tokens (rows,)."""
        # An upper bound for all rows: which rows end within the block is not known yet.
        reached = {n: s.prompt + len(s.tokens) - 1 + ahead for n, s in self.slots.items()}
        self._cache.seek(self._positions, reached)
        positions = self._positions[:, None]
        forward = Pass(positions, [(self._decode, self._live[:, None])])
        hidden = self.runner.hidden(self._tokens[:, None], positions, self._cache.seen, self._cache, forward)
        self._tokens = self._sampler.draw(self.runner.logits(hidden[:, 0]), self._steps)
        self._positions = self._positions + self._live
        self._steps = self._steps + self._live
        return self._tokens

    def _finish(self, n: int) -> tuple[str, Completion] | None:
        slot = self.slots[n]
        end = self.runner.prompter.finish(slot.tokens, slot.request, self.runner.ends, slot.checked)
        slot.checked = len(slot.tokens)
        if end is None:
            return None
        size, text, reason = end
        receipt = self._decode.tally.receipt(n, slot.boundary, slot.prompt + size, slot.planned)
        completion = Completion(
            text=text,
            token_ids=tuple(slot.tokens[:size]),
            prompt_tokens=slot.prompt,
            finish=reason,
            receipt=receipt,
            activations=self._recorded(n, slot, slot.prompt + size - 1),
        )
        del self.slots[n]
        self._decode.release(n)
        self._sampler.release(n)
        self._live[n] = False
        self._positions[n] = 0
        self._free.append(n)
        return slot.request.key, completion

    def _recorded(self, n: int, slot: DecodingSlot, length: int) -> NDArray[np.float32] | None:
        record, layer = slot.request.record, self.runner.site.record_layer(slot.request.record)
        if record is None or layer is None:
            return None
        kept = self._decode.records[layer].kept[n, :length, : len(record.latents)]
        recorded: NDArray[np.float32] = kept.float().cpu().numpy().copy()
        return recorded
