"""A run on a Ray cluster of three nodes: the ledger of one machine, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from planted import Held
from steerback.config import build_config
from steerback.engines import check_engine, make_engine
from steerback.engines.options import RayOptions, TransformersOptions
from steerback.engines.ray.engine import RayEngine
from steerback.engines.ray.workers import differences
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.jobs import execute
from steerback.jobs.check import Makers, check
from steerback.records import Completion, Intervention, Recording, Request, Sampling
from steerback.store.ledger import Ledger
from steerback.targets import Target, resolve

KILLS = 20
PRIOR = resolve("organism").boost_prior
PLANTED = PlantedModel(threshold=PRIOR.mean, slope=PRIOR.sd / 5)
SMALL = (
    "n_latents=3",
    "trials_per_latent=4",
    "reference_responses=1",
    "floor_responses=3",
    "draws=100",
    "calibration.max_iterations=3",
    "calibration.trials_per_iteration=6",
    "calibration.tolerance=45",
    "calibration.verify_trials=2",
    "selection.concreteness=off",
    "sampling.max_new_tokens=30",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=2)
    made.wait_for_nodes()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a file of tests
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@dataclass(frozen=True)
class Script:
    """A planted model that does something to its own process at some requests, the first time or always."""

    folder: Path
    at: tuple[str, ...] = ()
    act: str = "die"
    always: bool = False
    model: PlantedModel = field(default_factory=PlantedModel)

    def __call__(self, request: Request) -> str:
        mark = self.folder / f"{request.key.replace('/', '-')}.{self.act}"
        if request.key in self.at and (self.always or not mark.exists()):
            mark.touch()
            if self.act == "die":
                os._exit(1)
            threading.Event().wait()
        return self.model(request)


def requests(n: int, **fields: Any) -> list[Request]:
    return [
        Request(
            f"r{i}",
            "How do I bake bread?",
            i,
            Sampling(max_new_tokens=20),
            (Intervention("add", i % 9, 3.0),),
            **fields,
        )
        for i in range(n)
    ]


def gathered(engine: Any, asked: Sequence[Request]) -> dict[str, Completion]:
    async def collect() -> list[tuple[str, Completion]]:
        return [one async for one in engine.generate(asked)]

    pairs = asyncio.run(collect())
    assert len(pairs) == len({key for key, _ in pairs}), "a request was answered twice"
    return dict(pairs)


def made(lines: list[str], **options: Any) -> RayEngine:
    return RayEngine(resolve("organism"), RayOptions.model_validate(options), None, make_engine, say=lines.append)


def scripted(lines: list[str], script: Any, **options: Any) -> RayEngine:
    return made(lines, engine="scripted", options={"script": script}, **options)


def test_responses_activations_and_identity_are_those_of_the_engine_alone(cluster: Cluster) -> None:
    target = resolve("organism")
    asked = requests(40, record=Recording((3, 5)))
    with_ray, alone = made([], workers=2), make_engine(target, check_engine("transformers", {"workers": 1}))
    try:
        got, expected = gathered(with_ray, asked), gathered(alone, asked)
        assert got == expected
        for key in expected:
            np.testing.assert_array_equal(got[key].activations, expected[key].activations)
        assert with_ray.fingerprint == alone.fingerprint
        assert with_ray.describe() == alone.describe()
        texts = ["bread", "a tree"] * 3
        np.testing.assert_array_equal(
            with_ray.activations(texts, texts, [1, 7]), alone.activations(texts, texts, [1, 7])
        )
        assert with_ray.activations([], [], [1, 7]).shape == (0, 2)
        np.testing.assert_array_equal(with_ray.decoder_norms(), alone.decoder_norms())
        assert with_ray.token_ends(got["r0"]) == alone.token_ends(expected["r0"])
    finally:
        with_ray.close()
        alone.close()


def test_an_impossible_request_is_one_line_before_anything_is_generated(cluster: Cluster) -> None:
    engine = made([], workers=1)
    try:
        with pytest.raises(SteerbackError, match="latent 99999"):
            gathered(
                engine,
                [*requests(3), replace(requests(1)[0], key="x", interventions=(Intervention("add", 99999, 1.0),))],
            )
        too_long = replace(requests(1)[0], sampling=Sampling(max_new_tokens=10**6))
        with pytest.raises(SteerbackError, match="context"):
            gathered(engine, [too_long])
        assert len(gathered(engine, requests(3))) == 3  # the worker is as good as before
    finally:
        engine.close()


def run(folder: Path, makers: Makers, engine: str, options: dict[str, Any], judge: str = "scripted") -> dict[str, Any]:
    overrides = {"engine": engine, "judge": judge, "engine_options": options}
    config = build_config("esr", ("organism",), "quick", overrides=overrides, assignments=SMALL)
    execute.run(check(config, makers), folder)
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        tables = ledger.dump()
    named = ("config", "engine")  # these name the engine and how many batches it decodes side by side
    tables["facts"] = [row for row in tables["facts"] if row[1] not in named]
    return tables


@pytest.mark.parametrize("inner", ["scripted", "transformers"])
def test_the_ledger_equals_that_of_one_machine(cluster: Cluster, tmp_path: Path, inner: str) -> None:
    judge = "scripted" if inner == "scripted" else "offline"
    alone = {"workers": 1} if inner == "transformers" else {}  # as many batches side by side as a worker with one core
    expected = run(tmp_path / "alone", Makers(), inner, alone, judge)
    got = run(tmp_path / "ray", Makers(), "ray", {"engine": inner, "workers": 3}, judge)
    assert got == expected
    assert len(expected["judgements"]) > 30


@dataclass(frozen=True)
class Waiting:
    """A planted model whose response to request `first` waits until the response to `until` is written.

    The two meet at a named pipe, because they are written by different processes.
    """

    pipe: Path | None = None
    first: str = ""
    until: str = ""
    model: PlantedModel = PLANTED

    def __call__(self, request: Request) -> str:
        if self.pipe is not None and request.key in (self.first, self.until):
            with self.pipe.open("rb" if request.key == self.first else "wb"):
                """Open once both are there."""
        return self.model(request)


def test_each_latent_advances_when_its_own_round_is_judged(cluster: Cluster, tmp_path: Path) -> None:
    """A response of latent 0 and a verdict of latent 1 wait for the last round of latent 2; the ledger is the same."""
    expected = run(tmp_path / "alone", Makers(), "scripted", {"script": Waiting()})
    zero, one, two = (f"organism/calibration/threshold/{n}" for n in (0, 10_000, 20_000 + 3 * 6 - 1))
    os.mkfifo(pipe := tmp_path / "pipe")
    judge = Held(one, two)
    # one open request for each worker, so that no other request waits behind the one that is held back
    options = {"engine": "scripted", "workers": 2, "in_flight": 1, "options": {"script": Waiting(pipe, zero, two)}}
    assert run(tmp_path / "ray", Makers(judge=lambda _: judge), "ray", options) == expected
    assert judge.arrived.is_set()


class Saboteur(RayEngine):
    """A Ray engine that has a worker or a node die after a counted number of completions."""

    def __init__(
        self, target: Target, options: RayOptions, plan: list[tuple[int, Callable[[RayEngine], None]]]
    ) -> None:
        super().__init__(target, options, None, make_engine, say=lambda line: None)
        self.plan, self.seen = plan, 0

    async def generate(self, requests: Sequence[Request], more: Any = None) -> Any:
        async for one in super().generate(requests, more):
            self.seen += 1
            while self.plan and self.plan[0][0] <= self.seen:
                self.plan.pop(0)[1](self)
            yield one


def test_killed_workers_and_nodes_leave_the_ledger_as_it_would_be(cluster: Cluster, tmp_path: Path) -> None:
    expected = run(tmp_path / "alone", Makers(), "scripted", {})
    total, draw, done = len(expected["completions"]), random.Random(44), 0

    def worker_dies(engine: RayEngine) -> None:
        nonlocal done
        if ready := engine.pool.ready():
            ray.kill(draw.choice(ready).actor)
            done += 1

    def node_dies(engine: RayEngine) -> None:
        nonlocal done
        node = draw.choice([n for n in cluster.list_all_nodes() if n is not cluster.head_node])
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=2)
        done += 1

    for number in range(4):
        moments = sorted(draw.sample(range(1, total), KILLS // 4))
        plan = [(moment, node_dies if n == 2 else worker_dies) for n, moment in enumerate(moments)]
        makers = Makers(engine=lambda target, options, plan=plan: Saboteur(target, options, plan))  # type: ignore[misc,arg-type]
        options = {"engine": "scripted", "workers": 3, "attempts": 10}
        assert run(tmp_path / f"run{number}", makers, "ray", options) == expected
    assert done == KILLS


def run_and_die(address: str, folder: Path, moment: int) -> None:
    """Run on the cluster and kill this process, the driver, at a counted completion."""
    ray.init(address=address, log_to_driver=False)

    def driver_dies(engine: RayEngine) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    makers = Makers(engine=lambda target, options: Saboteur(target, options, [(moment, driver_dies)]))  # type: ignore[arg-type]
    run(folder, makers, "ray", {"engine": "scripted", "workers": 2})


def test_a_killed_driver_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    expected = run(tmp_path / "alone", Makers(), "scripted", {})
    draw, context = random.Random(45), multiprocessing.get_context("spawn")
    # a driver generates what the ones before it have not saved, at least a third of all
    for moment in draw.sample(range(1, len(expected["completions"]) // 3), 3):
        child = context.Process(target=run_and_die, args=(cluster.address, tmp_path / "ray", moment))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    assert run(tmp_path / "ray", Makers(), "ray", {"engine": "scripted", "workers": 2}) == expected


def test_a_request_that_ends_every_worker_is_given_up_and_spares_the_others(cluster: Cluster, tmp_path: Path) -> None:
    lines: list[str] = []
    engine = scripted(lines, Script(tmp_path, ("r5",), always=True), workers=2)
    try:
        got = gathered(engine, requests(30))
    finally:
        engine.close()
    assert got["r5"].finish == "error"
    assert "3 workers ended" in got["r5"].text
    assert sum(c.finish == "error" for c in got.values()) == 1
    assert sum("ended" in line for line in lines) >= 3


def test_a_worker_that_hangs_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    lines: list[str] = []
    engine = scripted(lines, Script(tmp_path, ("r5",), act="hang"), workers=2, deadline=2.0)
    try:
        got = gathered(engine, requests(30))
    finally:
        engine.close()
    assert {c.finish for c in got.values()} == {"stop"}
    assert any("no response for 2 s" in line for line in lines)


def test_workers_that_always_end_stop_the_run(cluster: Cluster, tmp_path: Path) -> None:
    everything = tuple(f"r{i}" for i in range(30))
    engine = scripted([], Script(tmp_path, everything, always=True), workers=2)
    try:
        with pytest.raises(SteerbackError, match="3 workers in a row ended without a response"):
            gathered(engine, requests(30))
    finally:
        engine.close()


def test_a_worker_with_another_sae_is_refused_by_name(cluster: Cluster, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from steerback.organism import weights_dir

    shutil.copytree(weights_dir("organism"), tmp_path / "model")
    lines: list[str] = []
    organism = resolve("organism")
    assert organism.sae is not None
    place = str(tmp_path / "model")
    target = replace(organism, model=place, sae=replace(organism.sae, location=place))
    engine = RayEngine(target, RayOptions(workers=1), None, make_engine, say=lines.append)
    try:
        tensors = load_file(tmp_path / "model" / "sae.safetensors")
        save_file({name: t * 1.5 for name, t in tensors.items()}, tmp_path / "model" / "sae.safetensors")
        engine.pool.start()
        while len(engine.pool.workers) == 2 and any(w.loaded is None for w in engine.pool.workers):
            engine.pool.ready(wait=5.0)
        assert len(engine.pool.workers) == 1
        assert any("refused" in line and "sae: " in line for line in lines)
        assert len(gathered(engine, requests(3))) == 3
    finally:
        engine.close()


def test_a_missing_model_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    target = replace(resolve("organism"), model=str(tmp_path / "nothing"))
    with pytest.raises(SteerbackError, match="nothing"):
        RayEngine(target, RayOptions(workers=2), None, make_engine, say=lambda line: None)


def test_options_are_checked_before_a_cluster_is_asked() -> None:
    with pytest.raises(SteerbackError, match="tensor_paralel"):
        check_engine("ray", {"engine": "vllm", "options": {"tensor_paralel": 2}})
    with pytest.raises(SteerbackError, match="Ray Client"):
        check_engine("ray", {"address": "ray://10.0.0.1:10001"})
    eight = check_engine("ray", {"engine": "vllm", "gpus_per_worker": 8, "batch_size": 64})
    assert isinstance(eight, RayOptions)
    assert (eight.inner.tensor_parallel, eight.inner.batch_size) == (8, 64)  # type: ignore[union-attr]
    one = check_engine("ray", {"engine": "vllm"})
    assert isinstance(one, RayOptions)
    assert repr(one.gpus) == "1"  # Ray takes a number, not True
    assert isinstance(check_engine("ray", {}).inner, TransformersOptions)  # type: ignore[union-attr]


def test_only_what_changes_the_model_counts_as_a_difference(cluster: Cluster) -> None:
    engine = scripted([], None, workers=1)
    one = engine.pool.reference
    engine.close()
    assert one is not None
    other = replace(one, node="elsewhere", record={**one.record, "device": "cpu AVX2"})  # type: ignore[typeddict-unknown-key]
    assert differences(one, other) == []
    assert differences(one, replace(one, versions={**one.versions, "torch": "1.0"})) == [
        f"torch: {one.versions['torch']} -> 1.0"
    ]
