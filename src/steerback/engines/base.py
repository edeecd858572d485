"""The protocol of all engines, and the record of the settings that shape a response.

This module does not know about judges or ledgers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

from steerback.errors import SteerbackError
from steerback.records import Completion, Prefix, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from steerback.targets import Target

Result = TypeVar("Result")
Pooling = Literal["max", "mean", "active"]
"""Pooling over tokens: the largest activation, the mean, or the share of tokens at which a latent is active."""

START_LOG: ContextVar[Path | None] = ContextVar("start_log", default=None)
"""Log file for the output of an engine's libraries and processes, from their start on."""
WHILE_STARTING: ContextVar[Callable[[], None] | None] = ContextVar("while_starting", default=None)
"""Work for the time in which an engine that has its own process only waits for its start."""


ReadAt = Literal["read", "clamp"]
"""Layer at which activations are read: the target's read layer, or the layer of its clamps."""


Over = Literal["response", "words", "all"]
"""Tokens to pool over: the response, the response and the user's words, or the whole conversation with all special
and template tokens."""


Arriving = Callable[[], Coroutine[object, None, Sequence[Request] | None]]
"""Wait for further requests while an engine works; None means that no more will come."""


EngineRecord = dict[str, object]
"""JSON-able settings, other than the request, that shape a response; returned by `Engine.describe()`.

Every record names its `engine` and `target`. That of an engine with a real model adds the versions of arithmetic and
packages, the layers, and the names, commits and hashes of the files that were loaded (`loading.provenance_of`). The
record is stored in the manifest and hashed into the fingerprint. Renaming a key therefore invalidates the cache, and
old runs can no longer be resumed.
"""


@runtime_checkable
class Engine(Protocol):
    """Generate steered responses and read activations for one target.

    `fingerprint` hashes everything except the request that shapes a completion: model, revision, SAE, engine and its
    version, dtype, batch shape, threads, and version of the steering arithmetic. Completions are cached under it.
    """

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> EngineRecord: ...

    def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (request key, completion) in completion order. Requests from `more` join while the engine runs.

        Raises SteerbackError before any generation if a request is impossible (latent out of range, prompt too long,
        ...). The message names the field.
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
        """Return unsteered SAE activations at layer `at`, pooled over tokens: (n texts, n latents).

        `latents=None` selects all latents of the SAE. `over` selects the tokens to pool; a text without such tokens
        gets zeros.
        """
        ...

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,). Raises SteerbackError without an SAE."""
        ...

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the character offset in `completion.text` at which each token ends: (n tokens,), non-decreasing.

        If several tokens form one character, it ends at the last of them. `prefix` is the prefix that the completion
        continues.
        """
        ...

    def close(self) -> None: ...


class EngineStopped(SteerbackError):
    """The engine's processes have ended; only a new engine can go on."""


@runtime_checkable
class Rereads(Engine, Protocol):
    """Engine that can also read activations along an existing response."""

    def reread(self, request: Request, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the activations that `request.record` selects along prompt and response, with the request's steering.

        Shape (prompt tokens + fed-back tokens, recorded latents), as in `Completion.activations`.
        """
        ...


@runtime_checkable
class Serves(Engine, Protocol):
    """Engine that can answer for several targets, which differ in their adapters, without a new start."""

    def serving(self, target: Target) -> Engine | None:
        """Return an engine for another target on the same processes, which it shares; None if that is impossible."""
        ...


def finish(work: Coroutine[object, None, Result]) -> Result:
    """Run a coroutine and return its result, even if an event loop is already running (notebooks).

    In a running loop the coroutine gets a separate thread. An interrupt, such as a notebook's stop button, cancels the
    coroutine first and is then raised.
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
        pool.submit(int).result()  # wait for the thread to start; an interrupt during the start would leave it running
        try:
            result = pool.submit(asyncio.run, cancellable())
            while not wait([result], timeout=0.2).done:
                pass  # an interrupt that arrives just before a wait does not end it
            return result.result()
        except KeyboardInterrupt:
            with contextlib.suppress(RuntimeError, TimeoutError):  # it has ended already, or never started
                loop, task = cancel.result(5)
                loop.call_soon_threadsafe(task.cancel)
            raise
