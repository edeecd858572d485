"""Workers of the Ray engine: start, comparison, monitoring and replacement.

A worker is refused if its weights, SAE or package versions differ from those of the first one, because its responses
would come from another model. This module does not know about requests.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from steerback.engines.base import EngineStopped
from steerback.engines.options import EngineOptions, RayOptions, TransformersOptions, VllmOptions
from steerback.engines.ray.actor import EngineActor, EngineMaker, LoadedWorker
from steerback.errors import SteerbackError, one_line, visible
from steerback.records import digest

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.targets import Target

MAY_DIFFER = frozenset(
    {"device", "threads", "batch", "workers", "halved_on_out_of_memory", "arguments", "replicas", "runner"}
)
"""Fields of an engine's record that may differ between workers, because they change only the last bits of floats."""
FAILURES = 3
"""Number of consecutive workers that may end without a completion before the run stops."""
PATIENCE = 10.0
"""Seconds between two messages that no worker is ready yet."""


def notice(line: str) -> None:
    """Print one line about the cluster to standard error, separate from results."""
    print(visible(line), file=sys.stderr, flush=True)


@dataclass(slots=True, eq=False)
class Worker:
    """One actor, as seen by the driver. `open` counts its running requests, `heard` is the time of its last answer."""

    number: int
    actor: Any  # ray.actor.ActorHandle is untyped
    starting: Any  # ray.ObjectRef of its `load`
    options: EngineOptions
    loaded: LoadedWorker | None = None
    away: Any = None  # ray.ObjectRef of a `ping` while its machine is unreachable
    open: int = 0
    heard: float = field(default_factory=time.monotonic)
    completed: int = 0

    @property
    def name(self) -> str:
        """Number and machine, for messages."""
        return f"worker {self.number}" + (f" on {self.loaded.node}" if self.loaded else "")


def connect(address: str | None) -> None:
    """Connect this process to a Ray cluster. Without an address, start a local cluster if none is running."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=None if address else False, logging_level=30)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SteerbackError(
            f"no Ray cluster at {address or 'this machine'} ({one_line(error)[:200]}); start one with `ray start "
            "--head`, or leave --ray-address out to use this machine alone"
        ) from error


class Workers:
    """The workers of one target."""

    def __init__(
        self,
        target: Target,
        options: RayOptions,
        directions: Mapping[str, Tensor] | None,
        make: EngineMaker,
        say: Callable[[str], None] = notice,
    ) -> None:
        self.target, self.options, self.say = target, options, say
        self._directions, self._make = directions, make
        self.reference: LoadedWorker | None = None
        self.failures = 0
        self._started = 0
        self.workers: list[Worker] = []
        for _ in range(options.workers):
            self.start()

    def start(self, options: EngineOptions | None = None) -> None:
        """Request one more worker from the cluster; it waits in Ray's queue until a machine has room."""
        import ray

        options = options or self.options.inner
        gpus = self.options.gpus
        actor = ray.remote(EngineActor).options(
            num_cpus=self.options.cpus_per_worker, num_gpus=gpus, max_restarts=0, max_concurrency=1000
        )
        handle = actor.remote(self._make, self.target, options, self._directions)
        self._started += 1
        self.workers.append(Worker(self._started, handle, handle.load.remote(), options))

    def ready(self, wait: float = 0.0) -> list[Worker]:
        """Return the workers that can accept requests; wait at most `wait` seconds for workers that are starting."""
        import ray

        pending = {w.starting: w for w in self.workers if w.loaded is None}
        pending |= {w.away: w for w in self.workers if w.away is not None}
        if pending:
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            if not done and wait:
                done, _ = ray.wait(list(pending), num_returns=1, timeout=wait)
            for reference in done:
                self._answered(pending[reference], reference)
        return [w for w in self.workers if w.loaded is not None and w.away is None]

    def first(self) -> Worker:
        """Return a ready worker; if necessary, wait for one and print why."""
        said = time.monotonic()
        while True:
            if ready := self.ready(wait=1.0):
                return min(ready, key=lambda worker: worker.open)
            if time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                self.say(f"no worker is ready yet: {self.shortage()}")

    def shortage(self) -> str:
        """Return the resources that the cluster lacks for the requested workers, as part of a sentence."""
        import ray

        total = ray.cluster_resources()
        need = f"{self.options.cpus_per_worker} CPU" + f" and {self.options.gpus} GPU" * bool(self.options.gpus)
        has = f"{total.get('CPU', 0):.0f} CPUs and {total.get('GPU', 0):.0f} GPUs"
        return f"{len(self.workers)} load the target or wait for a machine with {need}; the cluster has {has}"

    def lost(self, worker: Worker, reason: str, batch: int | None = None) -> None:
        """End a worker and start a replacement, with `batch` rows if set.

        Raises EngineStopped if several workers in a row ended before they completed a request.
        """
        if worker not in self.workers:
            return
        self._end(worker)
        self.failures = 0 if worker.completed else self.failures + 1
        if self.failures >= max(FAILURES, self.options.workers):
            raise EngineStopped(
                f"{self.failures} workers in a row ended without a response, the last one: {reason}; "
                "finished responses are kept; fix the cause and resume the run"
            )
        self.say(f"{worker.name} ended: {reason}; its open requests go to others, and a new worker starts")
        options = worker.options
        if batch and not isinstance(options, (TransformersOptions, VllmOptions)):
            batch = None
        self.start(options.model_copy(update={"batch_size": batch}) if batch else None)

    def unreachable(self, worker: Worker) -> None:
        """Send no requests to a worker whose machine does not answer, until it does."""
        if worker.away is None and worker in self.workers:
            self.say(f"{worker.name} cannot be reached; its open requests go to others until it answers")
            worker.away = worker.actor.ping.remote()

    def fingerprint(self) -> str:
        """Return the workers' common fingerprint, or a hash of all if they differ (other GPUs, smaller batches)."""
        prints = sorted({w.loaded.fingerprint for w in self.workers if w.loaded is not None})
        if not prints and self.reference is not None:
            return self.reference.fingerprint
        return prints[0] if len(prints) == 1 else digest(prints)

    def noted(self, worker: Worker, fingerprint: str, completions: int) -> None:
        """Count a worker's completions and record their fingerprint."""
        worker.heard = time.monotonic()
        worker.completed += completions
        self.failures = 0
        if worker.loaded is not None and worker.loaded.fingerprint != fingerprint:
            worker.loaded = replace(worker.loaded, fingerprint=fingerprint)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self._end(worker, gently=True)

    def _end(self, worker: Worker, gently: bool = False) -> None:
        import ray

        self.workers.remove(worker)
        if gently and worker.loaded is not None and worker.away is None:
            ray.wait([worker.actor.close.remote()], timeout=20)  # vLLM ends its own processes
        ray.kill(worker.actor)

    def _answered(self, worker: Worker, reference: Any) -> None:
        """Update the state of a worker that has loaded its target, can be reached again, or has failed."""
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            mistake = cause(error)
            if not isinstance(mistake, SteerbackError):
                return self.lost(worker, one_line(error)[:300])
            return self._refuse(worker, str(mistake))
        worker.away, worker.heard = None, time.monotonic()
        if isinstance(answer, LoadedWorker):
            worker.loaded = answer
            self.reference = self.reference or answer
            if different := differences(self.reference, answer):
                self._refuse(worker, f"{answer.node} differs from {self.reference.node} in {'; '.join(different)}")
        return None

    def _refuse(self, worker: Worker, reason: str) -> None:
        """End a worker for good; the run continues with the others, or ends if no worker is left."""
        self._end(worker)
        if not self.workers:
            raise EngineStopped(reason)
        self.say(f"{worker.name} is refused: {reason}; going on with {len(self.workers)}")


def cause(error: BaseException) -> BaseException:
    """Return the error that a worker raised, without Ray's wrapping."""
    return getattr(error, "cause", None) or error


def differences(one: LoadedWorker, other: LoadedWorker) -> list[str]:
    """Return "field: this -> that" for each difference between the models or packages of two workers."""
    changes = []
    for before, after in ((one.versions, other.versions), (dict(one.record), dict(other.record))):
        for name in sorted(before.keys() | after.keys()):
            if name not in MAY_DIFFER and before.get(name) != after.get(name):
                changes.append(f"{name}: {one_line(before.get(name))[:80]} -> {one_line(after.get(name))[:80]}")
    return changes
