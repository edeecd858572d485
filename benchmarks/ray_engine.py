"""Ray engine: completions per second through the driver, memory, overhead, and speed of two GPUs against one.

    python benchmarks/ray_engine.py throughput      # 64 workers with the scripted engine, 200,000 requests
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

import psutil

from steerback.engines import check_engine, make_engine
from steerback.engines.scripted import PlantedModel
from steerback.records import Intervention, Request, Sampling
from steerback.targets import Target, resolve, user_tables

OUT = Path(__file__).parent / "results" / "ray_engine.json"
WORKERS, REQUESTS, GPU_REQUESTS = 64, 200_000, 2_048


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
    import ray

    ray.init(num_cpus=WORKERS, log_to_driver=False, include_dashboard=False)
    memory: dict[int, float] = {}

    def look(n: int) -> None:
        if n % 20_000 == 0:
            memory[n] = round(psutil.Process().memory_info().rss / 2**20, 1)

    started = time.perf_counter()
    with closing(
        make_engine(resolve("organism"), check_engine("ray", {"engine": "scripted", "workers": WORKERS}))
    ) as engine:
        while len(engine.pool.ready(wait=5.0)) < WORKERS:  # type: ignore[attr-defined]
            pass
        ready = time.perf_counter() - started
        gc.collect()
        started = time.perf_counter()
        asyncio.run(drained(engine, Planned(REQUESTS), look))
        took = time.perf_counter() - started
    return {
        "workers": WORKERS,
        "requests": REQUESTS,
        "seconds_until_all_workers_are_ready": round(ready, 1),
        "completions_per_second": round(REQUESTS / took),
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
