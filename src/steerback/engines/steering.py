"""Interventions on a batch: tables with one row per slot, a hook on the decoder layers that applies them, and receipts.

The arithmetic is that of `steerback.engines.interventions`. Each row can have different edits, but all rows use the
same tensor shapes, so that a row's numbers do not depend on its neighbours. This module does not know about sampling.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerback.engines.interventions import Clamp, LayerPlan, Phase, Site, added_vector, clamp_delta, plan_layers
from steerback.records import Receipt, Request
from steerback.targets.sae import Sae

GROUP = 8
"""Group size in which latents are read and clamped: a fixed shape, independent of other rows."""


class Columns:
    """Latents of each row, padded to groups; computes their activations z_k (rows, Q, k) from h (rows, Q, d)."""

    def __init__(self, sae: Sae, rows: int, device: torch.device) -> None:
        self.sae, self.rows, self.device = sae, rows, device
        self.groups: list[dict[str, Tensor]] = []

    def set(self, row: int, latents: Sequence[int], clamps: Sequence[Clamp] = ()) -> None:
        """Set the latents of a row, and their clamp values if any."""
        while len(self.groups) * GROUP < len(latents):
            self.groups.append(self._empty())
        for n, group in enumerate(self.groups):
            own = list(latents[n * GROUP : (n + 1) * GROUP])
            for tensor in group.values():
                tensor[row] = 0
            group["threshold"][row] = float("inf")  # an infinite threshold makes unused columns read 0
            if not own:
                continue
            size = len(own)
            group["latent"][row, :size] = torch.tensor(own, device=self.device)
            group["encoder"][row, :, :size] = self.sae.W_enc[:, own].to(group["encoder"])
            group["bias"][row, 0, :size] = self.sae.b_enc[own].to(group["bias"])
            group["threshold"][row, 0, :size] = self.sae.threshold[own].to(group["threshold"])
            group["used"][row, 0, :size] = 1
            if clamps:
                group["decoder"][row, :size] = self.sae.W_dec[own].to(group["decoder"])
                _, values, removed = torch.tensor(clamps[n * GROUP : n * GROUP + size], dtype=torch.float64).T
                group["value"][row, 0, :size] = values.to(group["value"])
                group["removed"][row, 0, :size] = removed.to(group["removed"])

    def read(self, x: Tensor) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield each group with its activations z (rows, Q, GROUP) of x; TopK has to encode all latents first."""
        full = self.sae.encode(x) if self.sae.kind == "topk" else None
        for group in self.groups:
            if full is None:
                z = self.sae.activate(torch.baddbmm(group["bias"], x, group["encoder"]), group["threshold"])
            else:
                z = full.gather(2, group["latent"][:, None].expand(-1, x.shape[1], -1)) * group["used"]
            yield group, z

    def _empty(self) -> dict[str, Tensor]:
        d, rows = self.sae.d_model, self.rows
        shapes = {
            "encoder": (rows, d, GROUP),
            "decoder": (rows, GROUP, d),
            "bias": (rows, 1, GROUP),
            "threshold": (rows, 1, GROUP),
            "value": (rows, 1, GROUP),
            "removed": (rows, 1, GROUP),
            "used": (rows, 1, GROUP),
        }
        group = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        group["threshold"].fill_(float("inf"))
        group["latent"] = torch.zeros(rows, GROUP, dtype=torch.long, device=self.device)
        return group


class LayerEdits:
    """Edits of one layer in one phase, with one row per slot."""

    def __init__(self, rows: int, d_model: int, sae: Sae | None, device: torch.device) -> None:
        self.add = torch.zeros(rows, 1, d_model, device=device)
        self.active = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.live: set[int] = set()
        self._clamped: set[int] = set()
        self._columns = None if sae is None else Columns(sae, rows, device)

    def set(self, row: int, plan: LayerPlan | None, sae: Sae | None, directions: Mapping[str, Tensor]) -> None:
        """Set the edits of a row; None removes them."""
        if plan is None and row not in self.live:
            return
        self.active[row] = plan is not None
        (self.live.add if plan is not None else self.live.discard)(row)
        self.add[row] = 0 if plan is None else added_vector(plan, sae, directions, self.add)
        clamp = () if plan is None else plan.clamp
        if self._columns is not None and (clamp or row in self._clamped):
            self._columns.set(row, [c.latent for c in clamp], clamp)
            (self._clamped.add if clamp else self._clamped.discard)(row)

    def delta(self, h: Tensor) -> Tensor:
        """Return the sum of all edits (rows, Q, d) in float32: clamps use the unedited h, then additions follow."""
        if not self._clamped or self._columns is None:
            return self.add
        total = self.add
        for group, z in self._columns.read(h.float()):
            total = clamp_delta(z, group["value"], group["removed"], group["decoder"]) + total
        return total


class Tally:
    """Record of executed edits: per layer, row and position the norm of the edit, or -1 if nothing was added."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self._rows, self._length, self._device = rows, length, device
        self._norms: dict[int, Tensor] = {}

    def at(self, layer: int) -> Tensor:
        """Return the norms (rows, length) of one layer."""
        if layer not in self._norms:
            self._norms[layer] = torch.full((self._rows, self._length), -1.0, device=self._device)
        return self._norms[layer]

    def clear(self, row: int) -> None:
        """Reset a row."""
        for norms in self._norms.values():
            norms[row] = -1

    def receipt(self, row: int, boundary: int, tokens: int, planned: Sequence[Sequence[int]]) -> Receipt:
        """Return the receipt of a finished row. A position counts if all layers in `planned` for its phase edited it.

        `boundary` is the first position of the generated phase. The last of the `tokens` was never fed back.
        """
        counts, total = [], 0.0
        spans = (slice(0, boundary), slice(boundary, max(tokens - 1, boundary)))
        for span, layers in zip(spans, planned, strict=True):
            norms = [self.at(layer)[row, span].double().cpu() for layer in layers]
            done = torch.stack([n >= 0 for n in norms]).all(dim=0) if norms else torch.zeros(0, dtype=torch.bool)
            counts.append(int(done.sum()))
            total += sum(float(n[done].sum()) for n in norms)
        return Receipt(counts[0], counts[1], total / sum(counts) if any(counts) else 0.0)


@dataclass
class Recorder:
    """Recorded activations of a batch at one layer, (rows, length, latents padded to groups) float32."""

    columns: Columns
    kept: Tensor

    def take(self, h: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Store z of the unedited residual h (rows, Q, d) at positions (rows, Q), if valid."""
        for n, (_, z) in enumerate(self.columns.read(h.float())):
            z = z * valid[..., None]
            self.kept[:, :, n * GROUP : (n + 1) * GROUP].scatter_(1, positions[..., None].expand_as(z), z)


class Steering:
    """Edits and recordings of `rows` slots in one phase, with the record of executed edits."""

    def __init__(
        self,
        phase: Phase,
        rows: int,
        length: int,
        site: Site,
        sae: Sae | None,
        directions: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.phase, self.rows, self.length, self.site = phase, rows, length, site
        self.sae, self.directions, self.device = sae, directions, device
        self.tables: dict[int, LayerEdits] = {}
        self.records: dict[int, Recorder] = {}
        self.tally = Tally(rows, length, device)

    def admit(self, row: int, request: Request) -> tuple[int, ...]:
        """Assign a request's edits and recording to a row; return the layers edited in this phase."""
        plans = plan_layers(request.interventions, self.phase, self.site)
        for layer in plans:
            if layer not in self.tables:
                self.tables[layer] = LayerEdits(self.rows, self.site.d_model, self.sae, self.device)
        for layer, table in self.tables.items():
            table.set(row, plans.get(layer), self.sae, self.directions)
        self._admit_record(row, request)
        self.tally.clear(row)
        return tuple(plans)

    def release(self, row: int) -> None:
        """Empty a row; idle rows are never edited."""
        for table in self.tables.values():
            table.set(row, None, self.sae, self.directions)
        for record in self.records.values():
            record.columns.set(row, ())

    def _admit_record(self, row: int, request: Request) -> None:
        layer = self.site.record_layer(request.record)
        if request.record is not None and layer is not None:
            assert self.sae is not None  # `interventions.check` refuses recording without an SAE
            if layer not in self.records:
                columns = Columns(self.sae, self.rows, self.device)
                self.records[layer] = Recorder(columns, torch.zeros(self.rows, self.length, 0, device=self.device))
        for at, record in self.records.items():
            latents = request.record.latents if request.record is not None and at == layer else ()
            record.columns.set(row, latents)
            wanted = len(record.columns.groups) * GROUP
            if record.kept.shape[2] < wanted:
                more = torch.zeros(self.rows, self.length, wanted - record.kept.shape[2], device=self.device)
                record.kept = torch.cat([record.kept, more], dim=2)
            record.kept[row] = 0


@dataclass
class Pass:
    """One forward pass: the active tables, the position of each token, and a mask without padding and idle rows.

    `parts` pairs each Steering with a mask (rows, Q) of the positions in its phase.
    """

    positions: Tensor
    parts: Sequence[tuple[Steering, Tensor]]
    stop_after: int | None = None
    residual: dict[int, Tensor] = field(default_factory=dict)  # layers to keep, filled by the hook
    keep: frozenset[int] = frozenset()

    @property
    def alone(self) -> bool:
        """Return True if each row has one token in one phase; rows without edits then simply add zeros."""
        return len(self.parts) == 1 and self.positions.shape[1] == 1

    def at_layer(self, layer: int, h: Tensor) -> Tensor:
        """Return the edited residual (rows, Q, d) after `layer`."""
        if layer in self.keep:
            self.residual[layer] = h
        if layer == self.stop_after:
            raise Enough
        out = h
        for steering, where in self.parts:
            if layer in steering.records:
                steering.records[layer].take(h, self.positions, where)
            table = steering.tables.get(layer)
            if table is None or not table.live:
                continue
            delta = table.delta(h)
            edited = where & table.active
            norms = torch.linalg.vector_norm(delta, dim=-1).expand_as(edited)
            steering.tally.at(layer).scatter_(1, self.positions, norms.masked_fill(~edited, -1.0))
            steered = (h.float() + delta).to(h.dtype)
            # While decoding, rows without edits have a delta of 0. In a prefill, padding must be excluded.
            out = steered if self.alone else torch.where(edited[..., None], steered, out)
        return out


class Enough(Exception):
    """Raised by the hook after the last layer whose residual is needed."""


BlockOutput = Tensor | tuple[Tensor, ...]
"""Output of a decoder block: the residual stream, or a tuple that starts with it."""
Hook = Callable[[torch.nn.Module, object, BlockOutput], BlockOutput | None]


class Hooks:
    """Hooks on a model's decoder layers. Each thread sets a separate pass; without a pass the model runs unchanged."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self._thread = threading.local()
        self._handles = [layer.register_forward_hook(self._hook(n)) for n, layer in enumerate(layers)]

    @contextlib.contextmanager
    def during(self, forward: Pass) -> Iterator[None]:
        """Apply `forward` to this thread's forward passes within the block."""
        self._thread.current = forward
        try:
            yield
        finally:
            self._thread.current = None

    def _hook(self, layer: int) -> Hook:
        def hook(_module: torch.nn.Module, _inputs: object, output: BlockOutput) -> BlockOutput | None:
            current: Pass | None = getattr(self._thread, "current", None)
            if current is None:
                return None
            if isinstance(output, tuple):
                return (current.at_layer(layer, output[0]), *output[1:])
            return current.at_layer(layer, output)

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
