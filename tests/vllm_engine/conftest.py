"""One engine per kind of SAE for the whole session: starting one takes longer than all its tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_engine*.py"]  # these need vLLM; `make test-vllm` makes an environment that has it

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GPU = torch.cuda.device_count() > 0
if GPU:
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # attention in float32 as the reference has it, not in TF32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the second model runner, which is not compiled then

# ReLU is compiled and short of cache blocks (so that requests are preempted); the others run eagerly.
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {
        "enforce_eager": INTERPRETED,
        "num_gpu_blocks_override": 40,
        "block_size": 32,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 96,
        "max_model_len": 256,
    },
    "jumprelu": {"enforce_eager": True},
    "topk": {"enforce_eager": True},
}


class Pair:
    """A target in both engines."""

    def __init__(self, target: Any, **options: Any) -> None:
        import small

        from steerback.engines.transformers import TransformersEngine
        from steerback.engines.vllm.engine import VllmEngine

        length = options.pop("max_model_len", None)
        self.target = target
        self.vllm = VllmEngine(
            target,
            batch_size=32,
            max_model_len=length,
            layers=(0,),
            options={"max_logprobs": -1, **small.LITTLE, **options},
        )
        self.reference = TransformersEngine(target, batch_size=2, device="cpu")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how far from the reference the engine was, tolerances aside."""
    import small

    for what, worst in sorted(small.SEEN.items()):
        terminalreporter.write_line(f"largest difference from the reference, {what}: {worst:.1e}")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Gives the pair of engines for a kind of SAE; one vLLM engine is up at a time."""
    import small

    alive: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind not in alive:
            for old in alive.values():
                old.vllm.close()
            alive.clear()
            alive[kind] = Pair(small.write(tmp_path_factory.mktemp(kind), kind), **OPTIONS[kind])
        return alive[kind]

    yield get
    for pair in alive.values():
        pair.vllm.close()


@pytest.fixture(scope="session")
def relu(pairs: Any) -> Any:
    return pairs("relu")
