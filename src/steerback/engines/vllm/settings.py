"""Data that engine and worker exchange: table settings before a model is loaded, and a ticket for each request.

`TableSettings` are vLLM's `additional_config`, whose hash is part of the key of its compile cache. An unsteered engine
therefore never loads a steered graph, nor the reverse. Tickets are JSON-able. This module does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypedDict

from pydantic import TypeAdapter

from steerback.engines.base import Pooling
from steerback.engines.interventions import Phase, Site
from steerback.records import Intervention, digest
from steerback.targets.target import SaeSource

KEY = "steerback"
"""Key of tickets in a request's `extra_args`."""

PHASES: tuple[Phase, Phase] = ("prompt", "generated")


class Entry(TypedDict, total=False):
    """A worker's results for one request: edited prompt and generated positions, the mean norm of the edits, and the
    recorded or pooled float32 values (from the first worker only)."""

    prompt: int
    generated: int
    norm: float
    record: bytes
    pooled: bytes


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Sizes of the tables and sources of their contents.

    rows: requests that may run at one time, each with a recording; columns: distinct latents that may be clamped or
    recorded at one time, over all running requests; room: float32 values that one request may record (positions x
    latents); poolers: texts that may be pooled over the whole SAE at one time (0: no pooling); length: positions of a
    request; kind and k: those of the SAE; directions: a safetensors file.
    """

    site: Site
    layers: tuple[int, ...]
    rows: int
    columns: int
    room: int
    poolers: int
    length: int
    arithmetic: str
    version: str
    sae: SaeSource | None = None
    kind: str | None = None
    k: int | None = None
    directions: str | None = None

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Layers at which texts can be pooled."""
        return tuple(sorted({self.site.read_layer, self.site.sae_layer})) if self.poolers else ()

    def compute_hash(self) -> str:
        """Return a hash of what shapes the compiled graph, so that all SAEs of a kind and all directions share it."""
        shape = asdict(self) | {"sae": self.sae is not None, "directions": None}
        shape["site"] = [self.site.d_model, self.pooled_layers, self.site.n_latents if self.kind == "topk" else 0]
        return digest(shape)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request's instructions to the worker, sent with each request. `key` is unique in an engine's lifetime.

    `prompt` is the first generated position (None: the request's prompt length), `until` the last possible position +
    1. `pool` lists [first, last + 1) ranges of positions that are pooled over all latents by method `how`. `layer` is
    the layer of the recording or pooling.
    """

    key: str
    edits: tuple[Intervention, ...] = ()
    record: tuple[int, ...] = ()
    layer: int = -1
    until: int = 0
    prompt: int | None = None
    pool: tuple[tuple[int, int], ...] = ()
    how: Pooling = "max"

    @property
    def empty(self) -> bool:
        """Return True if the worker can ignore this request."""
        return not (self.edits or self.record or self.pool)

    def latents(self) -> frozenset[int]:
        """Return the latents that need a column: clamped, scaled or recorded ones."""
        clamped = {i.latent for i in self.edits if i.mode != "add" and isinstance(i.latent, int)}
        return frozenset(clamped | set(self.record))

    def salt(self, prompt_tokens: int) -> str | None:
        """Return a salt that separates this request's blocks in the prefix cache from blocks with other edits.

        None for a request without edits. If the edits differ between prompt and generated positions, the salt contains
        the boundary, because it changes the states of the same tokens. Recorded or pooled positions must be computed,
        so such a request shares no blocks.
        """
        if self.empty:
            return None
        body: list[object] = [[i.mode, i.latent, i.value, i.positions, i.layer] for i in self.edits]
        if any(i.positions != "all" for i in self.edits):
            body.append(prompt_tokens if self.prompt is None else self.prompt)
        if self.record or self.pool:
            body.append(self.key)
        return digest(body)

    def as_args(self) -> dict[str, str]:
        """Return the form for `SamplingParams.extra_args`: one string, because vLLM deep-copies its arguments."""
        return {KEY: TICKETS.dump_json(self).decode()}

    @classmethod
    def from_args(cls, args: Mapping[str, str] | None) -> Ticket | None:
        """Return the ticket in a request's `extra_args`, or None."""
        return TICKETS.validate_json(args[KEY]) if args and KEY in args else None


TICKETS = TypeAdapter(Ticket)
