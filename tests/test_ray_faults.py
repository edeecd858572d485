"""Ray's workers and messages about unreachable ones or ones without memory, tested without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from steerback.engines import make_engine
from steerback.engines.options import EngineOptions, RayOptions
from steerback.engines.ray.actor import EngineActor, LoadedWorker
from steerback.engines.ray.engine import fell
from steerback.engines.ray.workers import Worker, Workers
from steerback.errors import SteerbackError
from steerback.records import Completion, Request
from steerback.targets import resolve

ray = pytest.importorskip("ray")


class Pool(Workers):
    """Workers whose actors are stand-ins; `sizes` are the batch sizes of the workers started so far."""

    def start(self, options: EngineOptions | None = None) -> None:
        options = options or self.options.inner
        actor = SimpleNamespace(ping=SimpleNamespace(remote=lambda: "ping"))
        loaded = LoadedWorker("node", "f", None, {}, None, 8)  # type: ignore[arg-type]
        self.workers.append(Worker(len(self.workers) + 1, actor, "load", options, loaded))

    def _end(self, worker: Worker, gently: bool = False) -> None:
        self.workers.remove(worker)


def pool(said: list[str]) -> Pool:
    options = RayOptions.model_validate({"engine": "transformers", "workers": 2})
    return Pool(resolve("organism"), options, None, make_engine, said.append)


def test_a_worker_out_of_reach_is_kept_and_gets_nothing_until_it_answers() -> None:
    said: list[str] = []
    workers = pool(said)
    first = workers.workers[0]
    for _ in range(2):
        fell(workers, first, ray.exceptions.ActorUnavailableError("no route to host", None))
    assert (workers.workers[0], first.away) == (first, "ping")
    assert said == ["worker 1 on node cannot be reached; its open requests go to others until it answers"]


def test_a_worker_whose_machine_is_out_of_memory_is_replaced_by_one_with_half_the_batch() -> None:
    said: list[str] = []
    workers = pool(said)
    first = workers.workers[0]
    fell(workers, first, ray.exceptions.OutOfMemoryError("host memory"))
    assert first not in workers.workers
    assert [getattr(w.options, "batch_size", None) for w in workers.workers][-1] == 4
    assert len(workers.workers) == 2
    assert "host memory" in said[0]
    fell(workers, workers.workers[0], ray.exceptions.ActorDiedError())
    assert getattr(workers.workers[-1].options, "batch_size", None) != 4


def test_requests_of_several_calls_join_one_generate_of_the_worker() -> None:
    """The engine is called once; an error answers every open call, and the next call works as before."""
    options = RayOptions.model_validate({"engine": "scripted", "options": {"raise_on": lambda r: r.key == "bad"}})
    actor = EngineActor(make_engine, resolve("organism"), options.inner, None)
    asked = [Request(f"r{i}", "How do I bake bread?", i) for i in range(40)]
    alone = make_engine(resolve("organism"), options.inner)
    started = 0

    async def call(requests: list[Request]) -> dict[str, Completion]:
        return {key: done async for _, batch in actor.generate(requests) for key, done in batch}

    async def run() -> None:
        nonlocal started
        actor.engine = alone
        generate = alone.generate

        def counted(*given: object) -> object:
            nonlocal started
            started += 1
            return generate(*given)  # type: ignore[arg-type]

        alone.generate = counted  # type: ignore[method-assign, assignment]
        parts = await asyncio.gather(call(asked[:3]), call(asked[3:30]), call(asked[30:]), call(asked[:2]))
        assert started == 1
        expected = {r.key: alone._complete(r) for r in asked}  # type: ignore[attr-defined]
        assert {key: done for part in parts[:3] for key, done in part.items()} == expected
        assert set(parts[3]) == {"r0", "r1"}  # asked twice at the same time, answered twice
        both = await asyncio.gather(
            call([*asked[:1], Request("bad", "x", 1)]), call(asked[1:3]), return_exceptions=True
        )
        assert all(isinstance(found, SteerbackError) for found in both)
        assert set(await call(asked[:5])) == {r.key for r in asked[:5]}

    asyncio.run(asyncio.wait_for(run(), 60))
