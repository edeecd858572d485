"""Ray engine: completions per second through the driver, memory, overhead, and speed of two GPUs against one.

    python benchmarks/ray_engine.py throughput      # 64 workers with the scripted engine, simulated in 4 processes
    python benchmarks/ray_engine.py overhead        # one worker at 100 completions a second, with Ray and without
    python benchmarks/ray_engine.py gpu TARGET      # one engine, two workers, and replicas=2; or: gpu TARGET KIND ...

Each writes its part of benchmarks/results/ray_engine.json. Goals: at least 2,000 completions per second, flat memory
of the driver, at most 3 % overhead, and at least 1.9 times one engine on two GPUs.
"""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray

from steerback.engines import check_engine, make_engine
from steerback.engines.options import EngineOptions
from steerback.engines.ray import engine as ray_engine
from steerback.engines.ray.actor import EngineActor
from steerback.engines.ray.workers import Worker, Workers
from steerback.engines.scripted import PlantedModel
from steerback.records import Intervention, Request, Sampling
from steerback.targets import Target, resolve, user_tables

OUT = Path(__file__).parent / "results" / "ray_engine.json"
WORKERS, PROCESSES, REQUESTS, GPU_REQUESTS = 64, 4, 200_000, 2_048


class Planned(Sequence[Request]):
    """Lazy sequence of requests, so that measured memory is that of the engine alone."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, at: Any) -> Any:
        if not 0 <= at < self.n:
            raise IndexError(at)
        return Request(f"r{at}", "How do I bake bread?", at, Sampling(), (Intervention("add", at % 50, 10.0),))


@dataclass(frozen=True)
class Paced:
    """Scripted engine with one response every `seconds` seconds."""

    seconds: float
    model: PlantedModel = field(default_factory=PlantedModel)

    def __call__(self, request: Request) -> str:
        time.sleep(self.seconds)
        return self.model(request)


class Host:
    """Several workers in one process, because 64 processes take minutes to start on a machine of two cores.

    Each worker is an `EngineActor` with a separate engine, and the driver sends it the messages of a separate process.
    """

    def __init__(self, *arguments: Any) -> None:
        self.workers = [EngineActor(*arguments) for _ in range(WORKERS // PROCESSES)]

    async def load(self, number: int) -> Any:
        return await self.workers[number].load()

    async def generate(self, number: int, requests: Sequence[Request]) -> Any:
        async for batch in self.workers[number].generate(requests):
            yield batch

    async def close(self, number: int) -> None:
        await self.workers[number].close()


@dataclass(frozen=True)
class Call:
    """A method of one worker of a host, in place of Ray's handle of the method."""

    method: Any
    number: int

    def options(self, **options: Any) -> Call:
        return Call(self.method.options(**options), self.number)

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.number, *arguments)


@dataclass(frozen=True)
class Seat:
    """One worker of a host, in place of Ray's handle of an actor."""

    host: Any
    number: int

    def __getattr__(self, method: str) -> Call:
        return Call(getattr(self.host, method), self.number)


class Simulated(Workers):
    """Workers of which `WORKERS // PROCESSES` share one process."""

    def start(self, options: EngineOptions | None = None) -> None:
        place = self._started % (WORKERS // PROCESSES)
        if place == 0:
            arguments = self._make, self.target, options or self.options.inner, self._directions
            self.host = ray.remote(Host).options(num_cpus=0, max_concurrency=1000).remote(*arguments)
        self._started += 1
        seat: Any = Seat(self.host, place)
        self.workers.append(Worker(self._started, seat, seat.load.remote(), options or self.options.inner))

    def close(self) -> None:
        for worker in self.workers:
            if worker.actor.number == 0:
                ray.kill(worker.actor.host)
        self.workers.clear()


async def drained(engine: Any, requests: Sequence[Request], each: Callable[[int], None] = lambda n: None) -> int:
    tokens = 0
    count = 0
    async for _, completion in engine.generate(requests):
        tokens += len(completion.token_ids)
        count += 1
        each(count)
    assert count == len(requests)
    return tokens


def throughput() -> dict[str, object]:
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    memory: dict[int, float] = {}

    def look(n: int) -> None:
        if n % 20_000 == 0:
            memory[n] = round(psutil.Process().memory_info().rss / 2**20, 1)

    started = time.perf_counter()
    options = check_engine("ray", {"engine": "scripted", "workers": WORKERS})
    with patch.object(ray_engine, "Workers", Simulated), closing(make_engine(resolve("organism"), options)) as engine:
        while len(engine.pool.ready(wait=5.0)) < WORKERS:  # type: ignore[attr-defined]
            pass
        ready = time.perf_counter() - started
        gc.collect()
        started, used = time.perf_counter(), time.process_time()
        asyncio.run(drained(engine, Planned(REQUESTS), look))
        took, used = time.perf_counter() - started, time.process_time() - used
    return {
        "workers": WORKERS,
        "simulated": f"{WORKERS} workers with a scripted engine each, in {PROCESSES} processes of one machine",
        "requests": REQUESTS,
        "seconds_until_all_workers_are_ready": round(ready, 1),
        "completions_per_second": round(REQUESTS / took),
        "driver_processor_seconds": round(used, 1),
        "completions_per_processor_second_of_the_driver": round(REQUESTS / used),
        "load_average": psutil.getloadavg()[0],
        "driver_mib_after": memory,
    }


def overhead() -> dict[str, object]:
    requests = list(Planned(2000))
    script = {"script": Paced(0.01)}
    seconds: dict[str, list[float]] = {"alone": [], "ray": []}
    engines = {"alone": ("scripted", script), "ray": ("ray", {"engine": "scripted", "options": script})}
    for _ in range(3):
        for name, (engine, options) in engines.items():
            with closing(make_engine(resolve("organism"), check_engine(engine, options))) as made:
                started = time.perf_counter()
                asyncio.run(drained(made, requests))
                seconds[name].append(round(time.perf_counter() - started, 3))
    return {
        "requests": len(requests),
        "seconds": seconds,
        "overhead": round(min(seconds["ray"]) / min(seconds["alone"]) - 1, 4),
    }


def gpu(name: str, *chosen: str) -> dict[str, object]:
    import torch

    target = resolve(name, user_tables())
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "one engine": ("vllm", {}),
        "ray, two workers": ("ray", {"engine": "vllm", "workers": 2}),
        "replicas=2": ("vllm", {"replicas": 2}),
    }
    measured: dict[str, object] = {"gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    for name, (engine, options) in kinds.items():
        if chosen and name not in chosen:
            continue
        started = time.perf_counter()
        with closing(make_engine(target, check_engine(engine, options))) as made:
            while engine == "ray" and len(made.pool.ready(wait=5.0)) < 2:  # type: ignore[attr-defined]
                pass
            start = time.perf_counter() - started
            rate(made, target, 0, 512)  # warm-up
            measured[name] = {
                "start_seconds": round(start, 1),
                "tokens_per_second": [rate(made, target, number, GPU_REQUESTS) for number in (1, 2)],
            }
        print(name, measured[name], flush=True)
    return measured


def rate(engine: Any, target: Target, number: int, n_requests: int) -> int:
    """Return the tokens per second of steered requests of 256 tokens."""
    steered: list[int | str] = [*range(64)] if target.has_sae else [*target.directions()]
    requests = [
        Request(
            f"{number}/{n}",
            f"Explain in detail how to do number {n % 97} of a list of a hundred household tasks.",
            1000 * number + n,
            Sampling(max_new_tokens=256),
            (Intervention("add", steered[n % len(steered)], target.boost_prior.mean * 0.5),),
        )
        for n in range(n_requests)
    ]
    started = time.perf_counter()
    tokens = asyncio.run(drained(engine, requests))
    return round(tokens / (time.perf_counter() - started))


def main(what: str, *arguments: str) -> None:
    parts: dict[str, Callable[..., dict[str, object]]] = {"throughput": throughput, "overhead": overhead, "gpu": gpu}
    measured = parts[what](*arguments)
    measured |= {
        "command": f"python benchmarks/ray_engine.py {what}" + " TARGET" * bool(arguments),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ray": version("ray"), "python": platform.python_version()},
        "machine": f"{psutil.cpu_count()} cores",
    }
    known = json.loads(OUT.read_text()) if OUT.is_file() else {}
    before = known.get(what, {}) if len(arguments) > 1 else {}  # some kinds of several
    OUT.write_text(json.dumps(known | {what: before | measured}, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
