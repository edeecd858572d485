"""The Ray engine of a target: sends requests to workers on a cluster, and resends the requests of workers that die.

Responses, receipts and fingerprint are those of the workers' engine, so a run's ledger does not depend on the machines.
This module does not know about judges, ledgers or experiments.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerback.engines.base import Arriving, EngineRecord
from steerback.engines.checks import checked
from steerback.engines.options import RayOptions
from steerback.engines.ray.actor import Batch, EngineMaker
from steerback.engines.ray.workers import PATIENCE, Worker, Workers, cause, connect, notice
from steerback.errors import SteerbackError, one_line
from steerback.records import Completion, Prefix, Receipt, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from steerback.engines.base import Over, Pooling, ReadAt
    from steerback.targets import Target

POLL = 1.0
"""Seconds between two checks for workers that have joined or that hang."""


class RayEngine:
    """Generate steered responses for one target with engines on the machines of a Ray cluster."""

    def __init__(
        self,
        target: Target,
        options: RayOptions,
        directions: Mapping[str, Tensor] | None,
        make: EngineMaker,
        say: Callable[[str], None] = notice,
    ) -> None:
        connect(options.address)
        self.options, self.say = options, say
        self.pool = Workers(target, options, directions, make, say)
        try:
            self.pool.first()
        except BaseException:
            self.close()
            raise
        assert self.pool.reference is not None
        self._record = self.pool.reference.record

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the workers' engine, the same as without Ray on such a machine."""
        return self.pool.fingerprint()

    def describe(self) -> EngineRecord:
        """Return the record of the first worker's engine."""
        return self._record

    async def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (key, completion) in completion order; requests of a worker that dies are sent to other workers.

        If `attempts` workers die with a request, it gets an empty completion with finish "error".
        """
        deal = Deal(self.pool, self.options, requests, more)
        try:
            async for done in deal.completions():
                yield done
        finally:
            await deal.cancel()

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        over: Over = "response",
        pool: Pooling = "max",
        at: ReadAt = "read",
    ) -> NDArray[np.float32]:
        """Return pooled activations, computed by all workers; see `Engine.activations`."""
        import numpy as np

        size = max(1, min(64, -(-len(prompts) // max(self.options.workers, 1))))
        chosen = None if latents is None else list(latents)
        starts = range(0, max(len(prompts), 1), size)  # without texts: one empty piece, for the checks and the shape
        pieces = [(list(prompts[n : n + size]), list(responses[n : n + size]), chosen, over, pool, at) for n in starts]
        return np.concatenate(self._everywhere("activations", pieces))

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,)."""
        norms: NDArray[np.float32] = self._everywhere("decoder_norms", [()])[0]
        return norms

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the character at which each token ends; see `Engine.token_ends`."""
        ends: list[int] = self._everywhere("token_ends", [(completion, prefix)])[0]
        return ends

    def close(self) -> None:
        """End the workers; the cluster keeps running."""
        self.pool.close()

    def _everywhere(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the workers' engine for each tuple of arguments; return the results in order."""
        import ray

        results: dict[int, Any] = {}
        waiting, tries = deque(range(len(calls))), Counter[int]()
        running: dict[Any, tuple[int, Worker, float]] = {}
        while len(results) < len(calls):
            while waiting and (worker := self._free()) is not None:
                n = waiting.popleft()
                running[getattr(worker.actor, method).remote(*calls[n])] = n, worker, time.monotonic()
                worker.open += 1
            ready, _ = ray.wait(list(running), timeout=POLL) if running else ([], [])
            late = [r for r, (_, _, since) in running.items() if time.monotonic() - since > self.options.deadline]
            for reference in {*ready, *late}:
                n, worker, _ = running.pop(reference)
                worker.open -= 1
                try:
                    results[n] = ray.get(reference, timeout=0)
                except (ray.exceptions.RayError, TimeoutError) as error:
                    if isinstance(mistake := cause(error), SteerbackError):
                        raise SteerbackError(str(mistake)) from error
                    tries[n] += 1
                    fell(self.pool, worker, error)
                    if tries[n] >= self.options.attempts:
                        raise SteerbackError(
                            f"{method} failed {tries[n]} times on the cluster, the last time: {one_line(error)[:200]}"
                        ) from error
                    waiting.append(n)
        return [results[n] for n in range(len(calls))]

    def _free(self) -> Worker | None:
        """Return the least busy worker with fewer than two open calls."""
        worker = self.pool.first()
        return worker if worker.open < 2 else None


@dataclass(frozen=True, slots=True)
class Event:
    """An answer to a call of a worker: completions, or the error that ended it."""

    worker: Worker
    requests: Sequence[Request]
    answer: Batch | BaseException


class Deal:
    """Requests of one call of `generate`: distribution to workers and collection of answers."""

    def __init__(
        self, pool: Workers, options: RayOptions, requests: Sequence[Request], more: Arriving | None = None
    ) -> None:
        self.pool, self.options = pool, options
        self.waiting: deque[Request] = deque()
        self.last_tries: deque[Request] = deque()
        self._alone: dict[Worker, str] = {}  # workers with a single request on its last attempt
        self.unanswered: set[str] = set()
        self.tries = Counter[str]()
        self.inbox: asyncio.Queue[Event | Sequence[Request] | None] = asyncio.Queue()
        self.tasks: set[asyncio.Task[None]] = set()
        self._add(requests)
        self._listening = None if more is None else asyncio.create_task(self._listen(more))
        self._looked = 0.0
        self._ready: list[Worker] = []
        self._said = time.monotonic()

    async def completions(self) -> AsyncIterator[tuple[str, Completion]]:
        """Yield each request's completion once."""
        while self.unanswered or self._listening is not None:
            self._look()
            self._send()
            try:
                event = await asyncio.wait_for(self.inbox.get(), POLL)
            except TimeoutError:
                continue
            if isinstance(event, Event):
                for done in self._taken(event):
                    yield done
            elif event is not None:
                self._add(event)
            elif self._listening is not None:
                await self._listening  # raises the error of `more`, if any
                self._listening = None

    def _add(self, requests: Sequence[Request]) -> None:
        if (known := self.pool.reference) is not None and known.site is not None:
            for _ in checked(requests, known.site):
                pass
        self.waiting.extend(requests)
        self.unanswered.update(request.key for request in requests)

    async def _listen(self, more: Arriving) -> None:
        """Put arriving requests into the inbox; None marks the end."""
        try:
            while (arrived := await more()) is not None:
                self.inbox.put_nowait(arrived)
        finally:
            self.inbox.put_nowait(None)

    def _taken(self, event: Event) -> Iterator[tuple[str, Completion]]:
        """Yield the new completions of an answer; resend the open requests of a call that failed."""
        if isinstance(event.answer, BaseException):
            yield from self._failed(event.worker, event.requests, event.answer)
            return
        fingerprint, batch = event.answer
        self.pool.noted(event.worker, fingerprint, len(batch))
        for key, completion in batch:
            if key in self.unanswered:  # false if a worker answers after it was abandoned
                self.unanswered.remove(key)
                event.worker.open -= 1
                yield key, completion

    async def cancel(self) -> None:
        """Stop waiting for workers; their unfinished results are lost."""
        tasks = [*self.tasks, *([self._listening] if self._listening is not None else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self.pool.workers:
            worker.open = 0

    def _look(self) -> None:
        """At most once a second, add workers that have joined and replace workers that do not answer."""
        now = time.monotonic()
        if now - self._looked < POLL and self._ready:
            return
        self._looked, self._ready = now, self.pool.ready()
        for worker in self._ready:
            if worker.open and now - worker.heard > self.options.deadline:
                self.pool.lost(worker, f"no response for {self.options.deadline:g} s")
        if self._ready:
            self._said = now
        elif now - self._said > PATIENCE:
            self._said = now
            self.pool.say(f"no worker is ready yet: {self.pool.shortage()}")

    def _send(self) -> None:
        """Send requests to every worker up to its limit, the least busy worker first.

        A request on its last attempt is sent last and alone, so that a request that kills workers takes no other
        request with it.
        """
        while self.waiting or self.last_tries:
            rooms = {w: self._room(w) for w in self._ready if w in self.pool.workers and w.away is None}
            worker = max(rooms, key=lambda w: rooms[w], default=None)
            if worker is None or rooms[worker] <= 0 or (worker.open and not self.waiting):
                return
            if self.waiting:
                size = self._piece(worker)
                if rooms[worker] < size:  # a message for each request would cost more than a short request
                    return
                self._hand(worker, [self.waiting.popleft() for _ in range(size)])
            else:
                request = self.last_tries.popleft()
                self._alone[worker] = request.key
                self._hand(worker, [request])

    def _hand(self, worker: Worker, part: Sequence[Request]) -> None:
        if not worker.open:
            worker.heard = time.monotonic()
        worker.open += len(part)
        task = asyncio.create_task(self._ask(worker, part))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _room(self, worker: Worker) -> int:
        if self._alone.get(worker) in self.unanswered:
            return 0
        return self._limit(worker) - worker.open

    def _limit(self, worker: Worker) -> int:
        """Return the maximum number of open requests: as many as decode together, and as many that are next."""
        assert worker.loaded is not None
        return self.options.in_flight or 2 * worker.loaded.rows

    def _piece(self, worker: Worker) -> int:
        """Return how many requests to send together; fewer at the end, so that all workers end together."""
        share = -(-len(self.waiting) // len(self._ready))
        return max(1, min(self._limit(worker) // 8, -(-share // 2)))

    async def _ask(self, worker: Worker, part: Sequence[Request]) -> None:
        """Send requests to a worker; put its answers, or its failure, into the inbox."""
        import ray

        try:
            answers = worker.actor.generate.options(num_returns="streaming").remote(part)
            async for reference in answers:
                self.inbox.put_nowait(Event(worker, part, await reference))
        except ray.exceptions.RayError as error:
            self.inbox.put_nowait(Event(worker, part, error))

    def _failed(self, worker: Worker, part: Sequence[Request], error: BaseException) -> list[tuple[str, Completion]]:
        """Resend a failed worker's open requests to others; return those that have no attempts left."""
        if isinstance(mistake := cause(error), SteerbackError):
            raise SteerbackError(str(mistake)) from error
        fell(self.pool, worker, error)
        given_up = []
        for request in part:
            if request.key not in self.unanswered:
                continue
            worker.open -= 1
            self.tries[request.key] += 1
            self._alone.pop(worker, None)
            if self.tries[request.key] < self.options.attempts:
                last = self.tries[request.key] == self.options.attempts - 1
                (self.last_tries if last else self.waiting).append(request)
                continue
            self.unanswered.remove(request.key)
            reason = f"[no response: {self.tries[request.key]} workers ended, the last one: {one_line(error)[:200]}]"
            given_up.append((request.key, Completion(reason, (), 0, "error", Receipt())))
            self.pool.say(f"request {request.key} is abandoned after {self.tries[request.key]} workers ended")
        self._looked = 0.0
        return given_up


def fell(pool: Workers, worker: Worker, error: BaseException) -> None:
    """Replace a worker that failed; keep one that is only unreachable until it answers again."""
    import ray

    if isinstance(error, ray.exceptions.ActorUnavailableError):
        pool.unreachable(worker)
        return
    rows = worker.loaded.rows if worker.loaded is not None else 1
    short = isinstance(error, ray.exceptions.OutOfMemoryError)
    pool.lost(worker, one_line(error)[:200], max(rows // 2, 1) if short else None)
