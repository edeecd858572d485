"""Runs vLLM's asynchronous engine in a separate thread and never submits more than the worker's tables can hold.

The thread's event loop outlives the callers' loops and keeps running while a caller blocks. A job that needs rows,
columns or recording space waits in a first-come queue until finished jobs free them. Results of all jobs that finished
in the meantime are read from the worker at once. This module uses vLLM's client interface; it does not know about
targets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from multiprocessing import active_children
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from steerback.engines.base import WHILE_STARTING, EngineStopped
from steerback.engines.vllm.settings import Entry, TableSettings, Ticket

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from vllm import RequestOutput
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

Result = TypeVar("Result")

PAUSE, GLANCE = 0.02, 0.002
"""Seconds between two readings of results (each stops the worker for about a millisecond), and between two checks
whether jobs that should finish first are still running."""
LOOK = 0.05
"""Seconds between two looks for the process of an engine that starts."""
RELEASE = 5
"""Seconds in which cancelled jobs must free their rows before the engine ends."""


class SamplingFields(TypedDict, total=False):
    """The fields of vLLM's SamplingParams that steerback sets."""

    temperature: float
    top_p: float
    repetition_penalty: float
    max_tokens: int
    seed: int
    stop: list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    logprobs: int
    prompt_logprobs: int


@dataclass(frozen=True, slots=True)
class VllmJob:
    """One request in vLLM's form, with the LoRA adapter that answers it (None: the model alone)."""

    ticket: Ticket
    token_ids: tuple[int, ...]
    sampling: SamplingFields
    adapter: LoRARequest | None = None


@dataclass(frozen=True, slots=True)
class VllmAnswer:
    """vLLM's output, and the worker's entry (receipt, recordings) if the job's ticket has instructions."""

    output: RequestOutput
    entry: Entry | None


@dataclass(slots=True)
class Gate:
    """Counts the table space of running jobs, and admits a job only if its tables fit."""

    settings: TableSettings
    running: int = 0
    poolers: int = 0
    columns: Counter[int] = field(default_factory=Counter)
    waiting: list[Ticket] = field(default_factory=list)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _freed: asyncio.Event = field(default_factory=asyncio.Event)

    async def enter(self, ticket: Ticket) -> None:
        """Wait until the ticket's rows, columns and recording space are free; first come, first served."""
        self.waiting.append(ticket)
        try:
            async with self._turn:
                while not self._fits(ticket):
                    self._freed.clear()
                    await self._freed.wait()
                self._count(ticket, 1)
        finally:
            self.waiting.remove(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Free the space that `enter` reserved."""
        self._count(ticket, -1)
        self._freed.set()

    def _fits(self, ticket: Ticket) -> bool:
        new = sum(1 for latent in ticket.latents() if latent not in self.columns)
        return (
            self.running < self.settings.rows
            and len(self.columns) + new <= self.settings.columns
            and self.poolers + bool(ticket.pool) <= self.settings.poolers
        )

    def _count(self, ticket: Ticket, sign: int) -> None:
        self.running += sign
        self.poolers += sign * bool(ticket.pool)
        for latent in ticket.latents():
            self.columns[latent] += sign
            if not self.columns[latent]:
                del self.columns[latent]


class Driver:
    """One vLLM engine, which starts in the background. The methods are thread-safe."""

    def __init__(self, settings: TableSettings, start: Callable[[], AsyncLLM]) -> None:
        """Begin to start the engine; `ready` waits for it."""
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="steerback-vllm", daemon=True)
        self._thread.start()
        self._numbers = itertools.count()
        self._finished: list[tuple[VllmJob, RequestOutput, asyncio.Future[Entry]]] = []
        self._collecting: asyncio.Task[None] | None = None
        self._jobs: set[asyncio.Task[VllmAnswer]] = set()
        self._gate = Gate(settings)
        self.llm: AsyncLLM | None = None
        self._started = asyncio.run_coroutine_threadsafe(self._start(start), self._loop)

    async def _start(self, start: Callable[[], AsyncLLM]) -> None:
        self.llm = start()

    def ready(self) -> Driver:
        """Wait until the engine has started; raise the error of its start after closing it."""
        try:
            self._started.result()
        except BaseException:
            self.close()  # end a partly started engine after an interrupt
            raise
        return self

    def launched(self, before: Sequence[BaseProcess]) -> None:
        """Wait until the engine has a process that is not among `before`, or until its start has ended."""
        while set(active_children()) <= set(before) and not wait([self._started], LOOK).done:
            pass

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the engine's thread and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(self, job: VllmJob) -> Future[VllmAnswer]:
        """Start a job; cancelling the future aborts it. A key may be used again, even at the same time."""
        job = replace(job, ticket=replace(job.ticket, key=f"{next(self._numbers)}:{job.ticket.key}"))
        return asyncio.run_coroutine_threadsafe(self._run(job), self._loop)

    def call(self, method: str, *args: object) -> list[Any]:
        """Call a method of every worker."""
        return self.wait(self._call(method, *args))

    async def _call(self, method: str, *args: object) -> list[Any]:
        if self.llm is None:
            raise RuntimeError("this vLLM engine is closed")
        replies: list[Any] = await self.llm.collective_rpc(method, args=args)
        return replies

    async def _run(self, job: VllmJob) -> VllmAnswer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        task: asyncio.Task[VllmAnswer] | None = asyncio.current_task()
        assert task is not None
        assert self.llm is not None
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        await self._gate.enter(job.ticket)
        fetched = job.ticket.empty
        try:
            params = SamplingParams(
                **job.sampling,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=None if job.ticket.empty else job.ticket.as_args(),
            )
            params.skip_clone = True  # no other request uses these, so vLLM need not copy them deeply
            prompt: dict[str, object] = {"prompt_token_ids": list(job.token_ids)}
            if (salt := job.ticket.salt(len(job.token_ids))) is not None:
                prompt["cache_salt"] = salt
            stream = self.llm.generate(prompt, params, job.ticket.key, lora_request=job.adapter)
            output = [step async for step in stream][-1]
            entry = None
            if not job.ticket.empty:
                entry = await self._collect(job, output)
                fetched = True
            return VllmAnswer(output, entry)
        finally:
            try:
                if not fetched:
                    # Shielded: a cancelled job must still free its rows in the worker.
                    await asyncio.shield(self._call("steerback_release", [job.ticket.key]))
            finally:
                self._gate.leave(job.ticket)

    async def _collect(self, job: VllmJob, output: RequestOutput) -> Entry:
        """Return the worker's entry for a finished job; entries of several jobs are read together."""
        result: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        self._finished.append((job, output, result))
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._collect_all())
        return await result

    async def _collect_all(self) -> None:
        while self._finished:
            for _ in range(round(PAUSE / GLANCE)):
                await asyncio.sleep(GLANCE)
                # No other running job can finish, so waiting longer gains nothing.
                if len(self._finished) == self._gate.running:
                    break
            batch = [one for one in self._finished if not one[2].done()]  # without cancelled jobs
            self._finished = []
            wanted = [(job.ticket.key, positions_fed(output)) for job, output, _ in batch]
            try:
                workers = await self._call("steerback_fetch", wanted) if wanted else []
            except Exception as error:  # noqa: BLE001 - every job that waits for this reading gets the error
                for _, _, result in batch:
                    if not result.done():
                        result.set_exception(error)
                continue
            for job, _, result in batch:
                if result.done():
                    continue
                try:
                    result.set_result(_agreed(job.ticket.key, workers))
                except RuntimeError as error:
                    result.set_exception(error)

    def close(self) -> None:
        """End the engine and its processes; unfinished jobs are cancelled."""
        if self._thread.is_alive():
            try:
                self.wait(self._shutdown())
            finally:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    async def _shutdown(self) -> None:
        for task in self._jobs:
            task.cancel()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=RELEASE)
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        if self.llm is not None:
            self.llm.shutdown(timeout=20)
            self.llm = None
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def start(
    settings: TableSettings,
    launch: Callable[[], AsyncLLM],
    shares: Sequence[str],
    one_by_one: bool,
    meanwhile: Callable[[], None],
) -> list[Driver]:
    """Start an engine for each share of the GPUs (CUDA_VISIBLE_DEVICES), and wait for all of them.

    Each takes its GPUs from this process's environment, so the next one starts when it has a process, or, `one_by_one`,
    when it is ready. `meanwhile` is called when all have a process.
    """
    drivers: list[Driver] = []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        for share in shares:
            if len(shares) > 1:
                os.environ["CUDA_VISIBLE_DEVICES"] = share
            others = active_children()
            drivers.append(Driver(settings, launch))
            if one_by_one:
                drivers[-1].ready()
            drivers[-1].launched(others)
        meanwhile()
        if (further := WHILE_STARTING.get()) is not None:
            further()
        return [driver.ready() for driver in drivers]
    except BaseException:
        close(drivers)
        raise
    finally:
        if len(shares) > 1:
            os.environ.pop("CUDA_VISIBLE_DEVICES")
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible


def close(drivers: Sequence[Driver]) -> None:
    """End all drivers, even if one of them fails to end."""
    with contextlib.ExitStack() as ending:
        for driver in drivers:
            ending.callback(driver.close)


@contextlib.contextmanager
def one_line_if_dead() -> Iterator[None]:
    """Turn vLLM's error about its dead process into one line."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineStopped(
            "vLLM stopped (its messages are in the run's engine.log); finished responses are kept, resume the run"
        ) from error


def positions_fed(output: RequestOutput) -> int:
    """Return how many positions a finished request fed to the model; its last token is never fed."""
    return len(output.prompt_token_ids) + max(len(output.outputs[0].token_ids) - 1, 0)


def _agreed(key: str, workers: Sequence[Mapping[str, Sequence[Entry]]]) -> Entry:
    """Return the first worker's entry; under tensor parallelism all workers must have edited the same positions."""
    entries_of = [worker[key] for worker in workers]
    if any(len(entries) != 1 for entries in entries_of):
        raise RuntimeError(f"request {key!r} left {len(entries_of[0])} receipts in the worker instead of one")
    counts = {(entries[0]["prompt"], entries[0]["generated"]) for entries in entries_of}
    if len(counts) != 1:
        raise RuntimeError(f"request {key!r}: the workers edited different positions {sorted(counts)}")
    return entries_of[0][0]
