"""What is refused when an engine starts, and how replicas share GPUs; vLLM itself is not needed for it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from safetensors.torch import save_file
from transformers import DeepseekV2Config, LlamaConfig, Qwen3Config

from steerback.engines.base import WHILE_STARTING
from steerback.engines.options import VllmOptions, parse_options
from steerback.engines.vllm import driver, loading
from steerback.engines.vllm import engine as module
from steerback.engines.vllm.engine import VllmEngine
from steerback.engines.vllm.jobs import steering_fault
from steerback.errors import SteerbackError
from steerback.records import Request, Sampling
from steerback.targets.sae import save_native


class Started:
    """Stands for a vLLM engine with workers that steer, or fail to in one way."""

    def __init__(
        self, error: float = 1e-7, edited: tuple[int, int] = (4, 2), after: float = -1.0, effect: float = 3.0
    ) -> None:
        self.error, self.edited, self.after, self.effect = error, edited, after, effect
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.jobs: list[Any] = []
        self.closed = False
        self.seen: list[str] = []

    def ready(self) -> Started:
        self.seen.append("ready")
        return self

    def launched(self, before: Any) -> None:
        self.seen.append("launched")

    def call(self, method: str, *args: Any) -> list[float]:
        return [1e-7, self.error]

    def submit(self, job: Any) -> Future[Any]:
        self.jobs.append(job)
        prompt, generated = self.edited
        value = {"plain": -1.0, "steered": -1.0 - self.effect, "again": self.after}.get(job.ticket.key, 0.0)
        logprobs = [{7: SimpleNamespace(logprob=value), 9: SimpleNamespace(logprob=-20.0)}]
        output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])
        future: Future[Any] = Future()
        future.set_result(SimpleNamespace(output=output, entry={"prompt": prompt, "generated": generated}))
        return future

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({}, None),
        ({"error": 0.3}, "off by 3.0e-01"),
        ({"error": float("nan")}, "off by nan"),
        ({"edited": (0, 0)}, "4 \\+ 2 positions it edited 0 \\+ 0"),
        ({"edited": (4, 1)}, "edited 4 \\+ 1"),
        ({"effect": 0.0}, "does not change the next token's probabilities"),
        ({"after": -4.0}, "differs before and after"),
        ({"after": -1.05}, None),
    ],
)
def test_an_engine_that_does_not_steer_is_found_out_at_its_start(broken: Any, says: str | None) -> None:
    """Whatever its release: arithmetic, hooks, effect and leaks are looked at, on every worker."""
    found = steering_fault(Started(**broken), small.SETTINGS, (1, 2, 3, 4), 40.0, 0, None)  # type: ignore[arg-type]
    assert (found is None) if says is None else (found is not None and re.search(says, found)), found


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Starts no vLLM; what is set in the dictionary decides how the pretended ones behave."""
    behaviour: dict[str, Any] = {}
    started: list[Started] = []

    def start(*_: Any) -> Started:
        started.append(Started(edited=behaviour["edited"]))
        return started[-1]

    monkeypatch.setattr(module, "require_vllm", lambda: "99.0")
    for asked in (module, loading):
        monkeypatch.setattr(asked, "gpus", lambda: 0)  # the same on every machine
    monkeypatch.setattr(driver, "Driver", start)
    monkeypatch.setattr(module, "one_line_if_dead", contextlib.nullcontext)
    monkeypatch.setattr(VllmEngine, "_completion", lambda self, request, answer: request.key)
    monkeypatch.setattr(VllmEngine, "_describe", lambda self, *_: {})
    behaviour["started"] = started
    return behaviour


@pytest.fixture
def target(tmp_path: Path) -> Any:
    return small.write(tmp_path)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (module, loading):
        monkeypatch.setattr(asked, "gpus", lambda: 1)


def prompt_tokens(target: Any) -> int:
    from steerback.engines.vllm.loading import prepare

    return len(prepare(target, ())[1]().prompter.tokens("What is the capital of France?"))


def test_the_test_of_itself_takes_a_latent_that_writes_something(target: Any, pretend: dict[str, Any]) -> None:
    """Latent 0 of this SAE has a decoder direction of zeros, so that adding it would change nothing anywhere."""
    folder = Path(target.model)
    dead = small.sae("relu", 64, 96, layer=2)
    dead.W_dec[0] = 0
    save_native(dead, folder, boost_prior=[2.0, 1.0, 0.0, 10.0])
    pretend["edited"] = (prompt_tokens(target), 2)
    VllmEngine(target, VllmOptions(max_model_len=256))
    steered = next(job for job in pretend["started"][0].jobs if job.ticket.edits)
    assert [edit.latent for edit in steered.ticket.edits] == [1]


@pytest.mark.parametrize("visible", ["", None, "7,GPU-5a1b"])
def test_shares_of_gpus_are_of_those_that_are_visible(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert loading.device_shares(2, 1) == {"": ["", ""], None: ["0", "1"]}.get(visible, ["7", "GPU-5a1b"])


@pytest.mark.parametrize(("replicas", "gpus", "share"), [(2, 1, 0.45), (3, 1, 0.3), (3, 2, 0.45), (7, 2, 0.225)])
def test_replicas_may_share_gpus(
    replicas: int, gpus: int, share: float, pretend: dict[str, Any], target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU serves engines that want more than nine tenths of its memory together."""
    monkeypatch.setattr(module, "gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join("59"[:gpus]))
    pretend["edited"] = (prompt_tokens(target), 2)
    engine = VllmEngine(target, VllmOptions(replicas=replicas, max_model_len=256))
    assert engine._arguments["gpu_memory_utilization"] == share
    used = [one.visible for one in pretend["started"]]
    assert used == ["59"[n % gpus] for n in range(replicas)]
    assert max(used.count(gpu) for gpu in used) * share <= 0.9 + 1e-9
    mine = VllmOptions(replicas=replicas, max_model_len=256, options={"gpu_memory_utilization": 0.1})
    assert VllmEngine(target, mine)._arguments["gpu_memory_utilization"] == 0.1
    alone = VllmEngine(target, VllmOptions(replicas=gpus, max_model_len=256))
    assert "gpu_memory_utilization" not in alone._arguments  # vLLM's own default


@pytest.mark.parametrize(("bytes_of_gpu", "waits"), [(16 << 30, False), (4 << 30, True), (0, True)])
def test_engines_on_one_gpu_start_together_if_their_memory_is_computed(
    bytes_of_gpu: int, waits: bool, pretend: dict[str, Any], one_gpu: None, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines that measure what is free on a GPU at the same time would each count the other's memory."""
    monkeypatch.setattr(loading.fit, "gpus", lambda: (("a GPU", bytes_of_gpu),) if bytes_of_gpu else ())
    pretend["edited"] = (prompt_tokens(target), 2)
    meanwhile: list[list[list[str]]] = []
    token = WHILE_STARTING.set(lambda: meanwhile.append([list(one.seen) for one in pretend["started"]]))
    try:
        engine = VllmEngine(target, VllmOptions(replicas=2, max_model_len=256))
        assert meanwhile == [[["ready", "launched"]] * 2 if waits else [["launched"]] * 2]
        assert [one.seen[-1] for one in pretend["started"]] == ["ready", "ready"]
        cache = engine._arguments.get("kv_cache_memory_bytes")
        part = int(0.45 * bytes_of_gpu) - (target.memory() or 0) - target.sae_bytes // 2
        assert cache == (None if waits else part - loading.RESERVE)
        mine = VllmOptions(replicas=2, max_model_len=256, options={"gpu_memory_utilization": 0.2})
        assert "kv_cache_memory_bytes" not in VllmEngine(target, mine)._arguments
    finally:
        WHILE_STARTING.reset(token)


def test_a_target_may_be_started_several_times_at_once(
    target: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The folder that vLLM loads from is never without its files, and takes in what has changed."""
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    folder = Path(loading.model_alone(target))
    before = {path.name for path in folder.iterdir()}
    assert "model.safetensors" in before
    assert "sae.safetensors" not in before
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: loading.model_alone(target), range(200))) == {str(folder)}
    assert {path.name for path in folder.iterdir()} == before
    moved = folder / "config.json"
    moved.unlink()
    moved.symlink_to(tmp_path / "elsewhere")
    (folder / "gone.json").symlink_to(tmp_path / "gone")
    loading.model_alone(target)
    assert moved.resolve() == (Path(target.model) / "config.json").resolve()
    assert {path.name for path in folder.iterdir()} == before


def test_replicas_have_gpus_of_their_own_and_share_the_requests(
    pretend: dict[str, Any], target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0,2,5,7")
    pretend["edited"] = (prompt_tokens(target), 2)
    engine = VllmEngine(target, VllmOptions(replicas=3, tensor_parallel=2, max_model_len=256))
    assert [one.visible for one in pretend["started"]] == ["3,1", "0,2", "5,7"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,1,0,2,5,7"
    for one in pretend["started"]:
        one.jobs.clear()  # those of the self-test
    requests = [Request(f"r{n}", "hello", n, Sampling(max_new_tokens=5)) for n in range(6)]

    async def run() -> set[str]:
        return {key async for key, _ in engine.generate(requests)}

    assert asyncio.run(run()) == {request.key for request in requests}
    assert [len(one.jobs) for one in pretend["started"]] == [2, 2, 2]
    engine.close()
    assert all(one.closed for one in pretend["started"])


def test_an_adapter_that_a_gpu_could_not_serve_is_refused(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "gpus", lambda: 1)
    with pytest.raises(
        SteerbackError, match="adapter kernels lack float32 on a GPU; use a bfloat16 target, or --engine transformers"
    ):
        loading.lora_arguments(["adapter"], target.dtype)


def test_a_release_that_fails_its_self_test_is_refused_and_closed(pretend: dict[str, Any], target: Any) -> None:
    pretend["edited"] = (0, 0)
    with pytest.raises(SteerbackError, match=r"vLLM 99.0 .*does not steer this model.*use --engine transformers"):
        VllmEngine(target, VllmOptions(max_model_len=256))
    assert all(one.closed for one in pretend["started"])


def test_a_length_that_the_self_test_exceeds_is_refused_and_ends_the_engine(
    pretend: dict[str, Any], target: Any
) -> None:
    """The tokenizer is loaded while the engine starts."""
    pretend["edited"] = (0, 0)
    with pytest.raises(
        SteerbackError, match=r"self-test of the vLLM engine: prompt of .* exceed the engine's max_model_len of 20"
    ):
        VllmEngine(target, VllmOptions(max_model_len=20))
    assert [one.closed for one in pretend["started"]] == [True]


def test_stop_strings_need_an_engine_that_was_started_for_them(pretend: dict[str, Any], target: Any) -> None:
    pretend["edited"] = (prompt_tokens(target), 2)
    request = Request("a", "hi", 1, Sampling(max_new_tokens=4, stop=("x",)))
    engine = VllmEngine(target, VllmOptions(max_model_len=256))
    with pytest.raises(SteerbackError, match=r"'a' has stop strings.*start this engine with stop_strings=true"):
        engine._check([request])
    ready = VllmEngine(target, VllmOptions(max_model_len=256, stop_strings=True))
    assert [job.sampling["stop"] for job in ready._check([request])] == [["x"]]


def test_on_a_gpu_an_engine_has_two_processes_and_the_user_may_choose_one(
    pretend: dict[str, Any], one_gpu: None, target: Any
) -> None:
    pretend["edited"] = (prompt_tokens(target), 2)
    usual = VllmEngine(target, VllmOptions(batch_size=8, max_model_len=256))._arguments
    assert usual["distributed_executor_backend"] == "mp"
    assert usual["compilation_config"] == {"cudagraph_capture_sizes": loading.graph_sizes(8)}
    mine = {"distributed_executor_backend": "uni", "compilation_config": {"mode": 0}}
    changed = VllmEngine(target, VllmOptions(batch_size=8, max_model_len=256, options=mine))._arguments
    assert {key: changed[key] for key in mine} == mine


def test_engines_that_share_a_gpu_use_the_faster_attention_unless_the_user_or_the_model_has_another(
    pretend: dict[str, Any], one_gpu: None, target: Any
) -> None:
    pretend["edited"] = (prompt_tokens(target), 2)

    def attention(replicas: int, **options: Any) -> Any:
        asked = VllmOptions(replicas=replicas, max_model_len=256, options=options)
        return VllmEngine(target, asked)._arguments.get("attention_config")

    assert (attention(1), attention(2)) == (None, {"backend": "TRITON_ATTN"})
    assert attention(2, attention_config={"backend": "FLASH_ATTN"}) == {"backend": "FLASH_ATTN"}
    assert "attention_config" not in loading.shared_arguments(target, VllmOptions(replicas=2), 1, triton=False)


@pytest.mark.parametrize(
    ("config", "triton"),
    [
        (LlamaConfig(hidden_size=64, num_attention_heads=2), True),
        (LlamaConfig(hidden_size=64, num_attention_heads=4), False),
        (Qwen3Config(hidden_size=64, num_attention_heads=4, head_dim=128), True),
        (DeepseekV2Config(hidden_size=256, num_attention_heads=2), False),
    ],
)
def test_models_keep_vllms_choice_if_the_faster_attention_cannot_serve_them(config: Any, triton: bool) -> None:
    assert loading.fits_triton(config.get_text_config()) is triton


@pytest.mark.parametrize("rows", [1, 3, 200, 256, 512, 600, 4096])
def test_batches_of_a_gpu_have_a_graph_of_nearly_their_size(rows: int) -> None:
    sizes = [n for n in loading.graph_sizes(rows) if isinstance(n, int)]
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, 2048)
    assert min(rows, 2048) in sizes, "a full batch must have one of its own: vLLM pads no batch beyond its rows"
    assert all(b - a <= max(32, a if b <= 256 else a / 2) for a, b in itertools.pairwise(sizes))


def test_what_cannot_work_is_refused_before_vllm_starts(
    pretend: dict[str, Any], target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("replicas", "tensor_parallel", "batch_size", "max_model_len", "poolers"):
        with pytest.raises(SteerbackError, match=f"{name}: Input should be greater than or equal to 1"):
            parse_options("vllm", {name: 0})
    for name, says in (
        ("pipeline_parallel_size", "pipeline parallelism; use tensor_parallel"),
        ("data_parallel_size", "is set with replicas"),
        ("max_model_len", "is set with max_model_len"),
        ("speculative_config", "speculative decoding"),
        ("worker_cls", "is set by steerback"),
        ("trust_remote_code", "never run"),
    ):
        with pytest.raises(SteerbackError, match=f"options: {name} .*{says}"):
            parse_options("vllm", {"options": {name: 2}})
    for layer in (-1, 4):
        with pytest.raises(SteerbackError, match=rf"layers {layer} is outside 0\.\.3, the layers of this model"):
            VllmEngine(target, VllmOptions(layers=(layer,)))
    with pytest.raises(SteerbackError, match=r"direction 'north' has shape \(5,\); this model needs \(64,\)"):
        VllmEngine(target, VllmOptions(), {"north": torch.zeros(5)})
    with pytest.raises(SteerbackError, match="no LoRA adapter there"):
        VllmEngine(target.with_adapter(tmp_path / "none"), VllmOptions())
    for part, says in (
        ("layers.9", "weights of model.layers.9.mlp.up_proj, which the model lacks"),
        ("layers.0", "has matrices"),
    ):
        misfit = tmp_path / part
        misfit.mkdir()
        (misfit / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["up_proj"]}))
        name = f"base_model.model.model.{part}.mlp.up_proj.lora_"
        save_file(
            {f"{name}A.weight": torch.ones(2, 7), f"{name}B.weight": torch.ones(7, 2)},
            misfit / "adapter_model.safetensors",
        )
        with pytest.raises(SteerbackError, match=says):
            VllmEngine(target.with_adapter(misfit), VllmOptions())
    save_native(small.sae("relu", 32, 96, layer=2), tmp_path, boost_prior=[2.0, 1.0, 0.0, 10.0])
    with pytest.raises(SteerbackError, match=r"reads width 32, but the model has width 64"):
        VllmEngine(target, VllmOptions())
    monkeypatch.setattr(module, "gpus", lambda: 3)
    with pytest.raises(SteerbackError, match="2 replicas of 2 GPUs each need 4, and 3 are visible"):
        VllmEngine(target, VllmOptions(replicas=2, tensor_parallel=2))
    assert pretend["started"] == []
