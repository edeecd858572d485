"""The worker's side of the Ray engine: a process on a machine of the cluster with one loaded engine.

It does not know about other workers, retries or the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from steerback.engines.base import EngineRecord, Over, Pooling, ReadAt
from steerback.engines.interventions import Site
from steerback.engines.options import EngineOptions, TransformersOptions
from steerback.errors import SteerbackError
from steerback.records import Completion, Prefix, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from steerback.engines.base import Engine
    from steerback.targets import Target

EngineMaker = Callable[["Target", EngineOptions, "Mapping[str, Tensor] | None"], "Engine"]
"""`engines.make_engine`; passed as an argument because that module imports this one."""
Batch = tuple[str, list[tuple[str, Completion]]]
"""The worker's fingerprint, and the (request key, completion) pairs that were generated under it."""
Answers = asyncio.Queue["tuple[str, Completion] | BaseException"]
"""Queue of the answers to one call."""
BATCH_SIZE, BATCH_SECONDS = 32, 0.05
"""Limits of a batch of completions. Messages are batched because one message costs more than a short completion."""
PACKAGES = ("steerback", "torch", "transformers", "vllm", "numpy")


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """Identity of a worker: its machine, its engine's record and fingerprint, and its package versions.

    `rows` is the number of requests that decode together.
    """

    node: str
    fingerprint: str
    record: EngineRecord
    versions: dict[str, str]
    site: Site | None
    rows: int


class EngineActor:
    """A loaded engine that Ray can call; call `load` first.

    All open requests share one `generate` of the engine, so that the requests of a later call join its batches.
    """

    def __init__(
        self, make: EngineMaker, target: Target, options: EngineOptions, directions: Mapping[str, Tensor] | None
    ) -> None:
        self._make, self._target, self._options, self._directions = make, target, options, directions
        self._arrived: list[Request] = []
        self._open: dict[str, tuple[str, Answers]] = {}
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        # A transformers engine cannot read activations while it decodes.
        self._turn: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
        if isinstance(options, TransformersOptions):
            self._turn = asyncio.Semaphore(1)

    async def load(self) -> LoadedWorker:
        """Load the target. Raises SteerbackError with the machine's name if a part is missing or does not fit."""
        node = f"{socket.gethostname()} ({_address()})"
        try:
            self.engine: Engine = self._make(self._target, self._options, self._directions)
        except SteerbackError as error:
            raise SteerbackError(f"{node}: {error}") from None
        runner = getattr(self.engine, "runner", None)
        settings = getattr(self.engine, "settings", None)
        shape = getattr(self.engine, "shape", settings)
        return LoadedWorker(
            node=node,
            fingerprint=self.engine.fingerprint,
            record=self.engine.describe(),
            versions={"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}},
            site=getattr(runner or settings, "site", None),
            rows=getattr(shape, "rows", 64) * getattr(self.engine, "workers", 1),
        )

    async def ping(self) -> bool:
        """Return at once; the call shows the driver that the machine can be reached again."""
        return True

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Batch]:
        """Yield batches of completions; see `Engine.generate`."""
        answers: Answers = asyncio.Queue()
        for request in requests:
            key = request.key
            while key in self._open:  # still decodes for a driver that no longer waits for it
                key += "+"
            self._open[key] = request.key, answers
            self._arrived.append(replace(request, key=key))
        self._changed.set()
        if self._work is None:
            self._work = asyncio.create_task(self._answer())
        waiting = len(requests)
        while waiting:
            ready = [await answers.get()]
            if answers.qsize() + 1 < min(waiting, BATCH_SIZE):
                await asyncio.sleep(BATCH_SECONDS)
            ready += [answers.get_nowait() for _ in range(min(answers.qsize(), BATCH_SIZE - 1))]
            waiting -= len(ready)
            for one in ready:
                if isinstance(one, BaseException):
                    raise one
            yield self.engine.fingerprint, [one for one in ready if not isinstance(one, BaseException)]

    async def _answer(self) -> None:
        """Answer open requests until none is left; an error is the answer to all of them."""
        try:
            async with self._turn:
                while self._open:
                    first, self._arrived = self._arrived, []
                    async for key, completion in self.engine.generate(first, self._arriving):
                        name, answers = self._open.pop(key)
                        answers.put_nowait((name, completion))
                        self._changed.set()
        except BaseException as error:
            for _, answers in self._open.values():
                answers.put_nowait(error)
            self._open.clear()
            self._arrived.clear()
            raise
        finally:
            self._work = None

    async def _arriving(self) -> list[Request] | None:
        """Wait for further requests; None if all are answered, so that an idle engine releases its batches."""
        while self._open and not self._arrived:
            self._changed.clear()
            await self._changed.wait()
        arrived, self._arrived = self._arrived, []
        return arrived or None

    async def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None,
        over: Over,
        pool: Pooling,
        at: ReadAt,
    ) -> NDArray[np.float32]:
        """Return pooled activations, (n texts, n latents); see `Engine.activations`."""
        async with self._turn:
            return await asyncio.to_thread(
                self.engine.activations, prompts, responses, latents, over=over, pool=pool, at=at
            )

    async def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,)."""
        return self.engine.decoder_norms()

    async def token_ends(self, completion: Completion, prefix: Prefix | None) -> list[int]:
        """Return the character at which each token ends; see `Engine.token_ends`."""
        return self.engine.token_ends(completion, prefix)

    async def close(self) -> None:
        """Release the model and end the processes of the engine."""
        self.engine.close()


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
