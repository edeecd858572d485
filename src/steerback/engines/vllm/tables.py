"""Steering on the device: tables with one row per request, and decoder layers that read the tables.

Layers use only plain tensor arithmetic on fixed storage, so that torch.compile can fuse it and CUDA graphs can replay
it. Row 0 is the null row for padding and for requests without interventions. Each row has two entries, one for prompt
and one for generated positions. This module does not know about requests or vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steerback.engines.vllm.settings import Entry, TableSettings
from steerback.errors import SteerbackError
from steerback.targets.sae import Sae

UNEDITED = -1.0
"""Mark of a position without an edit; other marks are the norm of the edit."""
CACHED = -2.0
"""Mark of a position from the prefix cache, which was computed with the same interventions."""


@dataclass(frozen=True, eq=False)
class Shared:
    """Storage for all edited layers; R rows (with the null row), U columns, T tokens, d model width.

    row (T,): row of each token of this step; prompt (R,): prompt length; encoder (d, U), bias (U,), threshold (U,),
    decoder (U, d): the latents in use; latent (U,): their numbers; start, width, until (R,): place of a row's record;
    slot (R, U): each column's place in that record, -1 for none; kept (n,): all records, with entry 0 as dummy target.
    """

    row: Tensor
    prompt: Tensor
    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    latent: Tensor
    start: Tensor
    width: Tensor
    until: Tensor
    kept: Tensor

    @classmethod
    def empty(cls, settings: TableSettings, tokens: int, device: torch.device) -> Shared:
        rows, d = settings.rows + 1, settings.site.d_model
        columns = settings.columns if settings.sae else 0

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def real(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            row=whole(tokens),
            prompt=whole(rows),
            encoder=real(d, columns),
            bias=real(columns),
            threshold=real(columns),
            decoder=real(columns, d),
            latent=whole(columns),
            start=whole(rows),
            width=whole(rows),
            until=whole(rows),
            kept=real(1 + (settings.rows * settings.room if columns else 0)),
        )


@dataclass(frozen=True, eq=False)
class LayerTable:
    """Edits of one layer: add (2R, d); active (2R,), whether the entry edits; value and removed (2R, U), its clamps.

    marks (R * L,): norm of the executed edit at each position of each row; slot (R, U): columns that a row records at
    this layer; residual (T, d): unedited residual at this layer (T = 0 if no text is pooled).
    """

    add: Tensor
    active: Tensor
    value: Tensor
    removed: Tensor
    slot: Tensor
    marks: Tensor
    residual: Tensor

    @classmethod
    def empty(
        cls, settings: TableSettings, device: torch.device, pooled: int = 0, dtype: torch.dtype = torch.float32
    ) -> LayerTable:
        """Return empty tables; `pooled` is the number of tokens per step whose residuals are kept in `dtype`."""
        rows = settings.rows + 1
        columns = settings.columns if settings.sae else 0
        return cls(
            add=torch.zeros(2 * rows, settings.site.d_model, device=device),
            active=torch.zeros(2 * rows, dtype=torch.bool, device=device),
            value=torch.zeros(2 * rows, columns, device=device),
            removed=torch.zeros(2 * rows, columns, device=device),
            slot=torch.full((rows, columns), -1, dtype=torch.int32, device=device),
            marks=torch.full((rows * settings.length,), UNEDITED, device=device),
            residual=torch.zeros(pooled, settings.site.d_model, dtype=dtype, device=device),
        )


class Steered(nn.Module):
    """Mixin for the class of a decoder layer: edits and records the layer's output residual.

    The layer's output is (hidden, residual), whose sum is the residual stream, or the stream itself. The buffers are
    the tables of `Shared` and `LayerTable`, and for a TopK SAE its whole encoder.
    """

    steerback_positions: int
    steerback_length: int
    steerback_kind: str | None
    steerback_k: int
    steerback_reads: bool

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...  # every buffer is a tensor

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = super().forward(*args, **kwargs)
        positions = kwargs["positions"] if "positions" in kwargs else args[self.steerback_positions]
        if isinstance(out, tuple):
            return (edit(self, positions, out[0], out[1]), *out[1:])
        return edit(self, positions, out, None)


def edit(layer: Steered, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Return `hidden` (T, d) with this step's edits; write marks, records and the unedited residual."""
    row = layer.steerback_row[: hidden.shape[0]]
    entry = 2 * row + (positions >= layer.steerback_prompt[row]).long()
    delta = layer.steerback_add[entry]
    if layer.steerback_kind is not None:
        h = hidden.float() if residual is None else hidden.float() + residual.float()
        z = _read(layer, h)
        clamped = layer.steerback_value[entry] - layer.steerback_removed[entry] * z
        delta = delta + clamped @ layer.steerback_decoder
        _record(layer, row, positions, z)
        if layer.steerback_reads:
            at = torch.arange(hidden.shape[0], device=hidden.device)
            layer.steerback_residual.index_put_((at,), h.to(layer.steerback_residual.dtype))
    norm = torch.sqrt((delta * delta).sum(dim=-1))
    at = torch.where(layer.steerback_active[entry], row * layer.steerback_length + positions, 0)
    layer.steerback_marks.index_put_((at,), norm)
    return (hidden.float() + delta).to(hidden.dtype)


def _read(layer: Steered, h: Tensor) -> Tensor:
    """Return the activations (T, U) of the latents in use for the unedited residual (T, d) in float32."""
    if layer.steerback_kind == "topk":
        whole = (layer.steerback_whole_encoder, layer.steerback_whole_bias, layer.steerback_whole_threshold)
        z: Tensor = torch.ops.steerback.topk_columns(h, *whole, layer.steerback_latent, layer.steerback_k)
        return z
    pre = torch.addmm(layer.steerback_bias, h, layer.steerback_encoder)
    return pre * (pre > layer.steerback_threshold) + 0.0  # turn -0.0 into 0.0


def _record(layer: Steered, row: Tensor, positions: Tensor, z: Tensor) -> None:
    """Write z (T, U) into the records; columns that a row does not record go to the dummy entry."""
    slot = layer.steerback_slot[row].long()
    wanted = (slot >= 0) & (positions < layer.steerback_until[row])[:, None]
    line = layer.steerback_start[row] + positions * layer.steerback_width[row]
    layer.steerback_kept.index_put_((torch.where(wanted, line[:, None] + slot, 0),), z)


def steer_layer(layer: nn.Module, shared: Shared, table: LayerTable, settings: TableSettings, sae: Sae | None) -> None:
    """Turn a loaded decoder layer into a steered one, in place.

    The class is replaced instead of wrapping the module, because vLLM's loaders and LoRA rely on the names of the
    weights.
    """
    kind = type(layer)
    names = list(inspect.signature(kind.forward).parameters)[1:]
    if "positions" not in names:
        raise SteerbackError(
            f"{kind.__name__}.forward has no positions argument; this model class cannot be steered in vLLM"
        )
    layer.__class__ = type(f"Steered{kind.__name__}", (Steered, kind), {})
    assert isinstance(layer, Steered)
    layer.steerback_positions = names.index("positions")
    layer.steerback_length = settings.length
    layer.steerback_kind = None if sae is None else sae.kind
    layer.steerback_k = 0 if sae is None or sae.k is None else sae.k
    layer.steerback_reads = len(table.residual) > 0
    for source in (shared, table):
        for name, tensor in vars(source).items():
            layer.register_buffer(f"steerback_{name}", tensor, persistent=False)
    if sae is not None and sae.kind == "topk":
        register_topk()
        for name, tensor in (("encoder", sae.W_enc), ("bias", sae.b_enc), ("threshold", sae.threshold)):
            layer.register_buffer(f"steerback_whole_{name}", tensor, persistent=False)


TOPK_CHUNK = 512
"""Tokens that are encoded at one time if all latents are needed, which limits the memory."""


def register_topk() -> None:
    """Define the operator for TopK, which must encode all latents to select the largest but keeps only those in use."""
    if hasattr(torch.ops.steerback, "topk_columns"):
        return

    @torch.library.custom_op("steerback::topk_columns", mutates_args=())
    def topk_columns(h: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, latent: Tensor, k: int) -> Tensor:
        out = h.new_empty(h.shape[0], latent.shape[0])
        for first in range(0, h.shape[0], TOPK_CHUNK):
            part = slice(first, first + TOPK_CHUNK)
            pre = h[part] @ encoder + bias
            z = pre * (pre > threshold) + 0.0  # turn -0.0 into 0.0
            least = z.topk(min(k, z.shape[-1]), dim=-1).values[:, -1:]
            chosen = z[:, latent]
            out[part] = chosen * (chosen >= least)
        return out

    @topk_columns.register_fake
    def _(h: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, latent: Tensor, k: int) -> Tensor:
        return h.new_empty(h.shape[0], latent.shape[0])


def receipts(
    plans: Sequence[Sequence[Collection[int]]],
    boundaries: Sequence[int],
    fed: Sequence[int],
    marks: Mapping[int, NDArray[np.float32]],
) -> list[Entry]:
    """Return the edited prompt and generated positions and their mean norm, for n requests at once.

    plans: layers that edit each request's prompt and generated positions; boundaries: first generated position; fed:
    number of positions; marks: (n, longest) for every layer in `plans`. A position counts if every planned layer edited
    it. Positions from the prefix cache were edited when they were computed; they count, but their norm is unknown, so
    the mean is over the other positions (0.0 if there are none).
    """
    position = np.arange(max(fed))
    end, generated = np.array(fed)[:, None], position >= np.array(boundaries)[:, None]
    counts, computed, norm = [], np.zeros(len(fed)), np.zeros(len(fed))
    for phase, inside in enumerate((~generated, generated)):
        planned = {layer: np.array([layer in plan[phase] for plan in plans])[:, None] for layer in marks}
        some = np.array([bool(plan[phase]) for plan in plans])[:, None]
        done = inside & (position < end) & some
        for layer, edits in planned.items():
            done &= (marks[layer] != UNEDITED) | ~edits
        counts.append(done.sum(axis=1).tolist())
        for layer, edits in planned.items():
            done &= (marks[layer] != CACHED) | ~edits
        computed += done.sum(axis=1)
        for layer, edits in planned.items():
            norm += marks[layer].sum(axis=1, dtype=np.float64, where=done & edits)
    means = (norm / np.maximum(computed, 1)).tolist()
    return [{"prompt": p, "generated": g, "norm": n} for p, g, n in zip(*counts, means, strict=True)]
