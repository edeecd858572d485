"""What engine and worker agree on before a model is loaded, and what travels with each request: plain JSON-able data.

`TableSettings` go into vLLM's `additional_config`, which is part of the key of its compile cache: a plain engine never
loads a steered graph, and a steered engine never a plain one. Knows nothing of vLLM itself.
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
"""Under this name settings lie in `additional_config` and tickets in a request's `extra_args`."""

PHASES: tuple[Phase, Phase] = ("prompt", "generated")


class Entry(TypedDict, total=False):
    """A worker's results for one request: edited prompt and generated positions with the mean norm of what was added,
    and the float32 values that were recorded or pooled (from the first worker alone)."""

    prompt: int
    generated: int
    norm: float
    record: bytes
    pooled: bytes


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Sizes of the tables and where their contents come from.

    rows: requests that may be in flight, each of which may record; columns: distinct latents that may be clamped or
    recorded at one time, over all requests in flight; room: float32 values that one request may record (positions x
    latents); poolers: texts over which the whole SAE is pooled at one time (0: not prepared); length: positions of a
    request; directions: a safetensors file.
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
    directions: str | None = None

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Return the layers at which texts can be pooled."""
        return tuple(sorted({self.site.read_layer, self.site.sae_layer})) if self.poolers else ()

    def as_config(self) -> dict[str, object]:
        """Return the JSON-able form for `additional_config`."""
        return {KEY: asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> TableSettings:
        """Return the settings in an engine's `additional_config`."""
        return TypeAdapter(cls).validate_python(config[KEY])


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request's instructions to the worker, small enough to be sent with each. `key` is unique in an engine's life.

    `prompt` is the first generated position (None: the request's own prompt length); `until` the last position + 1 it
    can reach; `pool` pairs [first, last + 1) of positions over which all latents are pooled, in the way `how`. `layer`:
    where is recorded or pooled.
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
        """Whether the worker has nothing to do for this request."""
        return not (self.edits or self.record or self.pool)

    def latents(self) -> frozenset[int]:
        """Return the latents that need a column: those clamped or scaled and those recorded."""
        clamped = {i.latent for i in self.edits if i.mode != "add" and isinstance(i.latent, int)}
        return frozenset(clamped | set(self.record))

    def salt(self, prompt_tokens: int) -> str | None:
        """Return what keeps this request's blocks in the prefix cache apart from those computed with other edits.

        None for a plain request. Where prompt and generated positions are treated differently, the boundary belongs to
        it: the same tokens with another boundary are other states. What is recorded or pooled has to be computed, so
        such a request shares with none.
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
        """Return the form for `SamplingParams.extra_args`: one text, because vLLM copies its arguments deeply."""
        return {KEY: TICKETS.dump_json(self).decode()}

    @classmethod
    def from_args(cls, args: Mapping[str, str] | None) -> Ticket | None:
        """Return the ticket in a request's `extra_args`, or None."""
        return TICKETS.validate_json(args[KEY]) if args and KEY in args else None


TICKETS = TypeAdapter(Ticket)
