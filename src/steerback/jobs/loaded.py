"""A target in memory: one response at a time, several of one prompt, or activations along a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from steerback.engines.base import finish
from steerback.errors import SteerbackError, unknown
from steerback.records import Completion, Intervention, LatentKey, Recording, Request, Sampling
from steerback.targets import Target, resolve

if TYPE_CHECKING:
    from steerback.engines.base import Engine


@dataclass(frozen=True)
class LoadedTarget:
    """A target in memory, ready to answer. Use it as a context manager, or call `close`."""

    target: Target
    engine: Engine

    def generate(
        self,
        prompt: str,
        latent: LatentKey | None = None,
        boost: float | None = None,
        *,
        interventions: Sequence[Intervention] = (),
        seed: int = 44,
        temperature: float = 0.6,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        prefill: str = "",
        system: str | None = None,
        record: Sequence[int] = (),
    ) -> Completion:
        """Return one response, steered by adding `boost` of `latent` (an index, its label, or a direction) if given.

        `interventions` are carried out besides. Raises SteerbackError for anything impossible, naming the field.
        """
        longest = max_new_tokens or self.target.max_new_tokens or 512
        sampling = Sampling(temperature, top_p, repetition_penalty, longest, tuple(stop))
        (response,) = self.responses(
            1,
            prompt,
            latent,
            boost,
            interventions=interventions,
            seed=seed,
            sampling=sampling,
            prefill=prefill,
            system=system,
            record=record,
        )
        return response

    def responses(
        self,
        n: int,
        prompt: str,
        latent: LatentKey | None = None,
        boost: float | None = None,
        *,
        interventions: Sequence[Intervention] = (),
        seed: int = 44,
        sampling: Sampling | None = None,
        prefill: str = "",
        system: str | None = None,
        record: Sequence[int] = (),
    ) -> list[Completion]:
        """Return `n` responses to one prompt with seeds `seed`, `seed` + 1, ..., decoded together; see `generate`."""
        if n < 1:
            raise SteerbackError(f"n {n}: has to be at least 1")
        if (latent is None) != (boost is None):
            raise SteerbackError("latent and boost belong together: give both, or neither for an unsteered response")
        edits = tuple(interventions)
        if latent is not None and boost is not None:
            edits = (Intervention("add", self.latent(latent), boost), *edits)
        sampling = sampling or Sampling(max_new_tokens=self.target.max_new_tokens or 512)
        recording = Recording(tuple(record)) if record else None
        first = Request("0", prompt, seed, sampling, edits, prefill, system, recording)
        return self.complete([replace(first, key=str(i), seed=seed + i) for i in range(n)])

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Return responses to several requests, decoded together, in the order of the requests."""

        async def run() -> list[Completion]:
            done = {key: completion async for key, completion in self.engine.generate(requests)}
            return [done[request.key] for request in requests]

        return finish(run())

    def latent(self, name: LatentKey) -> LatentKey:
        """Return the index of a latent from its index, digits or label; names of directions stay as they are."""
        if isinstance(name, int) or name in self.target.directions():
            return name
        if name.isdecimal():
            return int(name)
        labels = self.target.labels()
        matches = [k for k, label in labels.items() if label.casefold() == name.casefold()]
        if len(matches) == 1:
            return matches[0]
        near = [f"{k} ({label})" for k, label in labels.items() if name.casefold() in label.casefold()]
        if len(matches) > 1 or near:
            raise SteerbackError(f"latent {name!r} fits several: {', '.join(near[:10])}; give the index")
        shown = list(labels.values())[:10]
        raise unknown("latent label", name, [*shown, "..."] if shown else ["an index (this target has no labels)"])

    def close(self) -> None:
        """Release the model."""
        self.engine.close()

    def __enter__(self) -> LoadedTarget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_target(name: str | Target, engine: str = "auto", batch_size: int = 8, **options: object) -> LoadedTarget:
    """Load a built-in target, a folder in our own format, or a `Target`; `options` are those of the engine.

    `batch_size` is small because responses are asked for one by one; a run uses a larger one, and as batch shape
    changes floats, its texts may differ from those given here.
    """
    from steerback.engines import check_engine, make_engine

    target = resolve(name) if isinstance(name, str) else name
    return LoadedTarget(target, make_engine(target, check_engine(engine, options, batch_size)))
