"""Assignment of requests to rows in the worker, the contents of the rows, and the collection of results.

Tables are written only when requests arrive, once for all arrivals of a step. A step without arrivals copies one small
array of row numbers. Rows belong to requests, not to the runner's slots, so a preempted request keeps its row. This
module does not use vLLM's classes; an `EngineStep` describes the next step of a runner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerback.engines.interventions import LayerPlan, direction, plan_layers
from steerback.engines.vllm.settings import PHASES, Entry, TableSettings, Ticket
from steerback.engines.vllm.tables import CACHED, UNEDITED, LayerTable, Shared, receipts
from steerback.records import Intervention
from steerback.targets.sae import Sae

POOL_CHUNK = 1024
"""Tokens that are encoded over the whole SAE at one time, which limits the memory for (tokens, latents) activations."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that a runner sees for the first time, or for the first time after a preemption."""

    request: str
    args: Mapping[str, str] | None
    prompt_tokens: int
    cached: int


@dataclass(frozen=True, slots=True)
class EngineStep:
    """One step: requests in token order, the number of tokens of each, and the number of earlier tokens."""

    requests: Sequence[str]
    counts: NDArray[np.integer]
    before: NDArray[np.integer]


@dataclass(slots=True)
class Slot:
    """A request with a ticket, from its arrival until its results are fetched."""

    ticket: Ticket
    row: int
    prompt: int
    pooler: int = -1
    pooled: int = 0  # positions below this are pooled; they are skipped after a preemption
    columns: dict[int, int] = field(default_factory=dict)
    plans: tuple[dict[int, LayerPlan], ...] = ({}, {})  # edits by layer of the prompt and of the generated part

    @property
    def boundary(self) -> int:
        """First position that counts as generated."""
        return self.prompt if self.ticket.prompt is None else self.ticket.prompt


class Slots:
    """Rows, columns and records of one worker."""

    def __init__(
        self,
        settings: TableSettings,
        shared: Shared,
        tables: Mapping[int, LayerTable],
        sae: Sae | None,
        directions: Mapping[str, Tensor],
        whole: Sae | None = None,
    ) -> None:
        self.settings, self.shared, self.tables = settings, shared, dict(tables)
        self.sae, self.directions, self.whole = sae, directions, whole
        self.device = shared.row.device
        self._free_rows = list(range(settings.rows, 0, -1))
        self._free_columns = list(range(settings.columns - 1, -1, -1))
        self._free_poolers = list(range(settings.poolers - 1, -1, -1))
        self._columns: dict[int, list[int]] = {}  # latent -> [column, number of requests]
        self._dirty: dict[int, set[int]] = {layer: set() for layer in tables}  # rows with edits, now or earlier
        self._by_request: dict[str, Slot] = {}
        self._by_key: dict[str, list[str]] = {}
        self._mapping = np.zeros(0, dtype=np.int64)
        n_latents = settings.site.n_latents if settings.poolers else 0
        self.pooled = torch.zeros(settings.poolers, n_latents, device=self.device)
        self._pooling: list[tuple[Slot, Tensor]] = []
        on_gpu = self.device.type == "cuda"
        self._pooled_last = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._reader = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.preemptions = 0

    @property
    def transient_bytes(self) -> int:
        """Temporary memory of pooling, in bytes: the activations of a chunk and a mask of the same shape."""
        return 5 * POOL_CHUNK * self.pooled.shape[1]

    def state(self) -> dict[str, int]:
        """Return the free space of each table, and how often a request was computed again."""
        return {
            "rows": len(self._free_rows),
            "columns": len(self._free_columns),
            "poolers": len(self._free_poolers),
            "preemptions": self.preemptions,
        }

    # ---- arrivals

    def admit(self, arrivals: Iterable[Arrival]) -> None:
        """Assign rows to the requests that need one, and write their contents."""
        fresh: list[tuple[Slot, int]] = []
        latents: list[int] = []
        for arrival in arrivals:
            ticket = Ticket.from_args(arrival.args)
            if ticket is None or arrival.request in self._by_request:
                continue
            slot = Slot(ticket, self._free_rows.pop(), arrival.prompt_tokens)
            slot.plans = self._plans(ticket.edits)
            for latent in sorted(ticket.latents()):
                held = self._columns.get(latent)
                if held is None:
                    held = self._columns[latent] = [self._free_columns.pop(), 0]
                    latents.append(latent)
                held[1] += 1
                slot.columns[latent] = held[0]
            if ticket.pool and self.settings.poolers:  # one worker pools; the others only compute the text
                slot.pooler = self._free_poolers.pop()
            self._by_request[arrival.request] = slot
            self._by_key.setdefault(ticket.key, []).append(arrival.request)
            fresh.append((slot, arrival.cached))
        if fresh:
            self._write_columns(latents)
            self._write_rows([slot for slot, _ in fresh])
            for layer, table in self.tables.items():
                self._write_layer(layer, table, fresh)

    def _plans(self, edits: Sequence[Intervention]) -> tuple[dict[int, LayerPlan], ...]:
        """Return the edits by layer of prompt and generated positions; equal plans are computed only once."""
        if all(edit.positions == "all" for edit in edits):
            return (plan_layers(edits, "prompt", self.settings.site),) * 2
        return tuple(plan_layers(edits, phase, self.settings.site) for phase in PHASES)

    def _write_columns(self, latents: Sequence[int]) -> None:
        if not latents or self.sae is None:
            return
        at = self._send(torch.tensor([self._columns[k][0] for k in latents]))
        self.shared.encoder.index_copy_(1, at, self._send(self.sae.W_enc[:, latents].float()))
        self.shared.decoder.index_copy_(0, at, self._send(self.sae.W_dec[latents].float()))
        self.shared.bias.index_copy_(0, at, self._send(self.sae.b_enc[latents].float()))
        self.shared.threshold.index_copy_(0, at, self._send(self.sae.threshold[latents].float()))
        self.shared.latent.index_copy_(0, at, self._send(torch.tensor(latents)))

    def _write_rows(self, slots: Sequence[Slot]) -> None:
        rows = self._send(torch.tensor([s.row for s in slots]))
        for table, values in (
            (self.shared.prompt, [s.boundary for s in slots]),
            (self.shared.start, [self._record_start(s) for s in slots]),
            (self.shared.width, [len(s.ticket.record) for s in slots]),
            (self.shared.until, [s.ticket.until for s in slots]),
        ):
            table.index_copy_(0, rows, self._send(torch.tensor(values)))
        for slot in slots:
            first = self._record_start(slot)
            self.shared.kept[first : first + slot.ticket.until * len(slot.ticket.record)] = float("nan")
            if slot.pooler >= 0:
                self.pooled[slot.pooler] = 0

    def _record_start(self, slot: Slot) -> int:
        """Return the start of a slot's record; rows count from 1, and entry 0 is a dummy target."""
        return 1 + (slot.row - 1) * self.settings.room

    def _write_layer(self, layer: int, table: LayerTable, fresh: Sequence[tuple[Slot, int]]) -> None:
        """Write one layer's edits and marks for the rows of new requests."""
        dirty = self._dirty[layer]
        chosen: list[tuple[Slot, int, tuple[LayerPlan | None, ...]]] = []
        for slot, cached in fresh:
            plans = tuple(plan.get(layer) for plan in slot.plans)
            records = bool(slot.ticket.record) and slot.ticket.layer == layer
            if records or any(plans) or slot.row in dirty:
                chosen.append((slot, cached, plans))
                (dirty.add if records or any(plans) else dirty.discard)(slot.row)
        if not chosen:
            return
        rows = torch.tensor([slot.row for slot, _, _ in chosen])
        entries = self._send(torch.stack([2 * rows, 2 * rows + 1], dim=1).flatten())
        plans_flat = [(slot, plan) for slot, _, plans in chosen for plan in plans]
        active = torch.tensor([plan is not None for _, plan in plans_flat])
        table.active.index_copy_(0, entries, self._send(active))
        additions, which = self._additions([plan for _, plan in plans_flat])
        table.add.index_copy_(0, entries, self._send(additions)[self._send(which)])
        if table.value.shape[1]:
            self._write_clamps(table, entries, plans_flat)
            self._write_records(layer, table, self._send(rows), [slot for slot, _, _ in chosen])
        marks = table.marks.view(-1, self.settings.length)
        marks.index_fill_(0, self._send(rows), UNEDITED)
        for slot, cached, plans in chosen:
            for plan, first, last in zip(plans, (0, slot.boundary), (min(slot.boundary, cached), cached), strict=True):
                if plan is not None and first < last:
                    marks[slot.row, first:last] = CACHED

    def _additions(self, plans: Sequence[LayerPlan | None]) -> tuple[Tensor, Tensor]:
        """Return sums of additions (k, d), one per distinct plan, and the index of each plan's sum (n,)."""
        first: dict[int, int] = {}
        which = [first.setdefault(id(plan), len(first)) for plan in plans]
        out = torch.zeros(len(first), self.settings.site.d_model)
        distinct = dict(zip(which, plans, strict=True))
        terms = [(n, *term) for n, plan in distinct.items() if plan is not None for term in plan.add]
        if terms:
            sums, keys, boosts = zip(*terms, strict=True)
            vectors = torch.stack([direction(key, self.sae, self.directions) for key in keys]).float()
            out.index_add_(0, torch.tensor(sums), torch.tensor(boosts)[:, None] * vectors)
        return out, torch.tensor(which)

    def _write_clamps(self, table: LayerTable, entries: Tensor, plans: Sequence[tuple[Slot, LayerPlan | None]]) -> None:
        value = np.zeros((len(plans), table.value.shape[1]), dtype=np.float32)
        removed = np.zeros_like(value)
        for n, (slot, plan) in enumerate(plans):
            if plan is not None and plan.clamp:
                at = [slot.columns[clamp.latent] for clamp in plan.clamp]
                value[n, at] = [clamp.value for clamp in plan.clamp]
                removed[n, at] = [clamp.removed for clamp in plan.clamp]
        table.value.index_copy_(0, entries, self._send(torch.from_numpy(value)))
        table.removed.index_copy_(0, entries, self._send(torch.from_numpy(removed)))

    def _write_records(self, layer: int, table: LayerTable, rows: Tensor, slots: Sequence[Slot]) -> None:
        place = np.full((len(slots), table.slot.shape[1]), -1, dtype=np.int32)
        for n, slot in enumerate(slots):
            if slot.ticket.record and slot.ticket.layer == layer:
                place[n, [slot.columns[latent] for latent in slot.ticket.record]] = range(len(slot.ticket.record))
        table.slot.index_copy_(0, rows, self._send(torch.from_numpy(place)))

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # ---- steps

    def step(self, batch: EngineStep) -> None:
        """Write the row of each token of the next step."""
        slots = [self._by_request.get(request) for request in batch.requests]
        rows = [0 if slot is None else slot.row for slot in slots]
        self._pooling = []
        if not any(rows):
            self.idle()
            return
        mapping = np.repeat(np.array(rows, dtype=np.int64), batch.counts)
        if self.settings.poolers:
            self._plan_pooling(batch)
        if np.array_equal(mapping, self._mapping):
            return
        size = max(len(mapping), len(self._mapping))  # entries of the previous step that are now unused become null
        padded = np.zeros(size, dtype=np.int64)
        padded[: len(mapping)] = mapping
        self.shared.row[:size].copy_(self._send(torch.from_numpy(padded)))
        self._mapping = mapping

    def idle(self) -> None:
        """Prepare for a step without steered requests, or for a dummy step."""
        if len(self._mapping):
            self.shared.row[: len(self._mapping)].zero_()
            self._mapping = np.zeros(0, dtype=np.int64)

    def _plan_pooling(self, batch: EngineStep) -> None:
        first = 0
        for request, count, before in zip(batch.requests, batch.counts.tolist(), batch.before.tolist(), strict=True):
            slot = self._by_request.get(request)
            if slot is not None and slot.pooler >= 0:
                low, high = max(before, slot.pooled), before + count
                slot.pooled = max(slot.pooled, high)
                wanted = [
                    np.arange(max(a, low), min(b, high)) - before + first
                    for a, b in slot.ticket.pool
                    if max(a, low) < min(b, high)
                ]
                if wanted:
                    self._pooling.append((slot, torch.from_numpy(np.concatenate(wanted))))
            first += count

    def after(self) -> None:
        """Pool activations of the step's texts; called after its forward pass was launched."""
        for slot, at in self._pooling:
            assert self.whole is not None
            total = self.pooled[slot.pooler]
            residual = self.tables[slot.ticket.layer].residual
            for first in range(0, len(at), POOL_CHUNK):
                z = _encode(self.whole, residual[self._send(at[first : first + POOL_CHUNK])].float())
                if slot.ticket.how == "max":
                    torch.maximum(total, z.amax(dim=0), out=total)
                else:
                    total += (z if slot.ticket.how == "mean" else z > 0).sum(dim=0)
        if self._pooling and self._pooled_last is not None:
            self._pooled_last.record()
        self._pooling = []

    # ---- results

    def fetch(self, wanted: Sequence[tuple[str, int]], records: bool) -> dict[str, list[Entry]]:
        """Return receipts and recordings of finished requests, and free their rows.

        `wanted` has (key, positions fed). The result has one entry per request of that key: edited prompt and generated
        positions, their mean norm, and the recorded or pooled values as bytes.
        """
        slots = [(k, self._by_request[r], fed) for k, fed in wanted for r in self._by_key.get(k, ())]
        out: dict[str, list[Entry]] = {key: [] for key, _ in wanted}
        if slots:
            with self._reading(any(slot.pooler >= 0 for _, slot, _ in slots)):
                fed = [(slot, n) for _, slot, n in slots]
                counted = self._receipts(fed)
                kept = self._recorded(fed) if records else []
                pooled = self._pooled([slot for slot, _ in fed]) if records else []
            for n, (key, _, _) in enumerate(slots):
                entry = counted[n]
                if records:
                    entry |= {"record": kept[n], "pooled": pooled[n]}
                out[key].append(entry)
        self.release([key for key, _ in wanted])
        return out

    @contextlib.contextmanager
    def _reading(self, pooled: bool) -> Iterator[None]:
        """Select a CUDA stream that reads in parallel with the running steps, so that the device does not idle.

        The results of a finished request are complete before its last token is known. Pooled activations are the
        exception: some runners sample before these are added.
        """
        if self._reader is None or self._pooled_last is None:
            yield
            return
        with torch.cuda.stream(self._reader):
            if pooled:
                self._reader.wait_event(self._pooled_last)
            yield

    def _receipts(self, slots: Sequence[tuple[Slot, int]]) -> list[Entry]:
        layers = sorted({layer for slot, _ in slots for plan in slot.plans for layer in plan})
        rows, longest = self._send(torch.tensor([s.row for s, _ in slots])), max(fed for _, fed in slots)
        marks = {
            n: self.tables[n].marks.view(-1, self.settings.length)[:, :longest].index_select(0, rows).cpu().numpy()
            for n in layers
        }
        return receipts([s.plans for s, _ in slots], [s.boundary for s, _ in slots], [fed for _, fed in slots], marks)

    def _recorded(self, slots: Sequence[tuple[Slot, int]]) -> list[bytes]:
        """Return the recordings of all requests at the positions they fed, with one read from the device."""
        parts = []
        for slot, fed in slots:
            first = self._record_start(slot)
            parts.append(self.shared.kept[first : first + min(fed, slot.ticket.until) * len(slot.ticket.record)])
        whole = torch.cat(parts).cpu().numpy()
        ends = np.cumsum([len(part) for part in parts])
        return [part.tobytes() for part in np.split(whole, ends[:-1])]

    def _pooled(self, slots: Sequence[Slot]) -> list[bytes]:
        """Return the pooled activations of all requests, with one read from the device."""
        rows = [slot.pooler for slot in slots if slot.pooler >= 0]
        read = iter(self.pooled[self._send(torch.tensor(rows, dtype=torch.long))].cpu().numpy())
        counts = [1 if s.ticket.how == "max" else sum(b - a for a, b in s.ticket.pool) for s in slots]
        return [
            b"" if s.pooler < 0 else (next(read) / np.float32(n)).tobytes() for s, n in zip(slots, counts, strict=True)
        ]

    def release(self, keys: Iterable[str]) -> None:
        """Free the rows of requests whose results are fetched or no longer needed."""
        for key in keys:
            for request in self._by_key.pop(key, ()):
                slot = self._by_request.pop(request)
                self._free_rows.append(slot.row)
                if slot.pooler >= 0:
                    self._free_poolers.append(slot.pooler)
                for latent in slot.columns:
                    held = self._columns[latent]
                    held[1] -= 1
                    if held[1] == 0:
                        self._free_columns.append(held[0])
                        del self._columns[latent]


def _encode(sae: Sae, h: Tensor) -> Tensor:
    """Return all activations (T, n) of h (T, d), computed in place to save memory."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # six times faster; bfloat16 residuals are coarser
    z = torch.addmm(sae.b_enc, h, sae.W_enc)
    torch.backends.cuda.matmul.allow_tf32 = before
    z.masked_fill_(z <= sae.threshold, 0)
    return z if sae.kind != "topk" else sae.activate(z, sae.threshold)
