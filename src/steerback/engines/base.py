"""The protocol that every engine keeps, and the record of what made a response. Knows nothing of judges or ledgers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, TypeVar, runtime_checkable

from steerback.records import Completion, Prefix, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Result = TypeVar("Result")
Pooling = Literal["max", "mean", "active"]
"""Over tokens: the largest activation, the mean one, or the share of tokens at which a latent is active."""

START_LOG: ContextVar[Path | None] = ContextVar("start_log", default=None)
"""File for the output of an engine's own libraries: while it starts, and of its processes from then on."""


ReadAt = Literal["read", "clamp"]
"""The layer at which activations are read: the target's read layer, or the one at which its clamps act."""


Over = Literal["response", "words", "all"]
"""Tokens that are pooled: those of the response, these and the user's words, or the whole conversation as the template
writes it, special and template tokens included."""


Arriving = Callable[[], Coroutine[object, None, Sequence[Request] | None]]
"""Waits for further requests while an engine works; None: no more will come."""


class EngineRecord(TypedDict):
    """Everything but the request that shapes a response, JSON-able: `Engine.describe()`.

    It is stored in the manifest and hashed into the fingerprint, so a key that is renamed ends the cache and makes
    old runs impossible to resume.
    """

    engine: str
    target: str


class ModelProvenance(TypedDict, total=False):
    """Names, commits and SHA-256 hashes of the model, adapter, tokenizer and SAE that were loaded."""

    model: str
    revision: str | None
    commit: str | None
    files: dict[str, str]
    tokenizer: str
    lora: dict[str, str]
    sae_source: dict[str, str | None]
    decoder_norms: dict[str, float]


class LayerNumbers(TypedDict):
    """Layers at which a target is steered, clamped and read."""

    steer: int
    sae: int
    read: int


class ModelRecord(EngineRecord, ModelProvenance):
    """The part of the record that all engines with a real model share."""

    arithmetic: str
    steerback: str
    torch: str
    device: str
    dtype: str
    layers: LayerNumbers
    prompt_format: str
    sae: str | None
    directions: dict[str, str]


@runtime_checkable
class Engine(Protocol):
    """Generates steered responses and reads activations for one target.

    `fingerprint` hashes everything but the request that shapes a completion (model, revision, SAE, engine and its
    version, dtype, batch shape, threads, version of the steering arithmetic); completions are cached under it.
    """

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> EngineRecord: ...

    def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (request key, completion) in completion order; those that `more` brings join as they come.

        Raises SteerbackError before anything is generated if a request is impossible (latent out of range, prompt
        too long, ...), naming the field.
        """
        ...

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        over: Over = "response",
        pool: Pooling = "max",
        at: ReadAt = "read",
    ) -> NDArray[np.float32]:
        """Return unsteered SAE activations at the layer `at`, pooled over tokens: (n texts, n latents).

        `latents` None means all latents of the SAE. `over` says which tokens are pooled; a text without such tokens
        gets zeros.
        """
        ...

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,). Raises SteerbackError without an SAE."""
        ...

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the character of `completion.text` at which each token ends, never decreasing: (n tokens,).

        A character of several tokens ends with its last token. `prefix` is the one that the completion continues.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Rereads(Engine, Protocol):
    """An engine that also reads activations along an existing response."""

    def reread(self, request: Request, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return what `request.record` asks for along prompt and response, steered as the request says.

        Shape (prompt tokens + fed-back tokens, recorded latents), as in `Completion.activations`.
        """
        ...


async def in_waves(
    generate: Callable[[Sequence[Request]], AsyncGenerator[tuple[str, Completion]]],
    requests: Sequence[Request],
    more: Arriving | None,
) -> AsyncIterator[tuple[str, Completion]]:
    """Serve requests that arrive later with an engine that takes none while it works: one call after another."""
    wave: Sequence[Request] | None = requests
    while wave is not None:
        async with contextlib.aclosing(generate(wave)) as answers:
            async for done in answers:
                yield done
        wave = None if more is None else await more()


def finish(work: Coroutine[object, None, Result]) -> Result:
    """Run a coroutine to its end and return its result, also where an event loop is running already (notebooks).

    There it runs in a thread of its own; an interrupt (a notebook's stop button) cancels it before it is raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    cancel: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = Future()

    async def cancellable() -> Result:
        task = asyncio.ensure_future(work)
        cancel.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(1, "steerback-loop") as pool:
        pool.submit(int).result()  # an interrupt while a thread starts would leave it running
        try:
            return pool.submit(asyncio.run, cancellable()).result()
        except KeyboardInterrupt:
            with contextlib.suppress(RuntimeError, TimeoutError):  # it has ended already, or never begun
                loop, task = cancel.result(5)
                loop.call_soon_threadsafe(task.cancel)
            raise
