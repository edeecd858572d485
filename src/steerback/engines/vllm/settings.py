"""What engine and worker agree on before a model is loaded, and what travels with each request: plain JSON-able data.

`TableSettings` go into vLLM's `additional_config`, which is part of the key of its compile cache: a plain engine never
loads a steered graph, and a steered engine never a plain one. Knows nothing of vLLM itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from steerback.engines.base import Pooling
from steerback.engines.interventions import Phase, Site
from steerback.records import Intervention, LatentKey, Mode, Positions, digest

KEY = "steerback"
"""Under this name settings lie in `additional_config` and tickets in a request's `extra_args`."""

PHASES: tuple[Phase, Phase] = ("prompt", "generated")


@dataclass(frozen=True, slots=True)
class TableSettings:
    """Sizes of the tables and where their contents come from.

    rows: requests that may be in flight; columns: distinct latents that may be clamped or recorded at one time, over
    all requests in flight; room: float32 values that one request may record (positions x latents); recorders: requests
    that may record at one time; poolers: texts over which the whole SAE is pooled at one time (0: not prepared).
    """

    site: Site
    layers: tuple[int, ...]
    rows: int
    columns: int
    room: int
    recorders: int
    poolers: int
    length: int
    arithmetic: str
    version: str
    sae: Mapping[str, Any] | None = None
    directions: str | None = None

    def as_config(self) -> dict[str, Any]:
        """JSON-able form for `additional_config`."""
        return {KEY: asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TableSettings:
        """The settings of an engine's `additional_config`."""
        found = dict(config[KEY])
        site = dict(found.pop("site"))
        site["directions"] = tuple(site["directions"])
        found["layers"] = tuple(found["layers"])
        return cls(site=Site(**site), **found)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a worker is told about one request, small enough to be sent with each. `key` is unique in an engine's life.

    `prompt` is the first generated position (None: the request's own prompt length); `until` the last position + 1 it
    can reach; `pool` pairs [first, last + 1) of positions over which all latents are pooled, `how` the way.
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
        """The latents that need a column: those clamped and those recorded."""
        clamped = {i.latent for i in self.edits if i.mode == "clamp" and isinstance(i.latent, int)}
        return frozenset(clamped | set(self.record))

    def salt(self, prompt_tokens: int) -> str | None:
        """Keeps this request's blocks in the prefix cache apart from all that were computed otherwise.

        None for a plain request. Where prompt and generated positions are treated differently, the boundary belongs to
        it: the same tokens with another boundary are other states. What is recorded or pooled has to be computed, so
        such a request shares with none.
        """
        if self.empty:
            return None
        body: list[Any] = [_fields(i) for i in self.edits]
        if any(i.positions != "all" for i in self.edits):
            body.append(prompt_tokens if self.prompt is None else self.prompt)
        if self.record or self.pool:
            body.append(self.key)
        return digest(body)

    def as_args(self) -> dict[str, Any]:
        """Form that travels in `SamplingParams.extra_args`: one text, because vLLM copies its arguments deeply."""
        edits = [_fields(i) for i in self.edits]
        rest = {"key": self.key, "layer": self.layer, "until": self.until, "prompt": self.prompt, "how": self.how}
        return {KEY: json.dumps({"edits": edits, "record": self.record, "pool": self.pool, **rest})}

    @classmethod
    def from_args(cls, args: Mapping[str, Any] | None) -> Ticket | None:
        """The ticket in a request's `extra_args`, if there is one."""
        if not args or KEY not in args:
            return None
        found = json.loads(args[KEY])
        return cls(
            key=found["key"],
            edits=tuple(_edit(*e) for e in found["edits"]),
            record=tuple(found["record"]),
            layer=found["layer"],
            until=found["until"],
            prompt=found["prompt"],
            pool=tuple((a, b) for a, b in found["pool"]),
            how=found["how"],
        )


def _fields(edit: Intervention) -> list[Any]:
    return [edit.mode, edit.latent, edit.value, edit.positions, edit.layer]


@lru_cache(4096)
def _edit(mode: Mode, latent: LatentKey, value: float, positions: Positions, layer: int | None) -> Intervention:
    """The same clamps come with every request of a condition."""
    return Intervention(mode, latent, value, positions, layer)
