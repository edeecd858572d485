"""One engine for a whole file of tests: starting one takes longer than all its tests."""

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
if torch.cuda.device_count():
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # attention in float32 as the reference has it, not in TF32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the second model runner on a CPU, which is not compiled then
SECOND = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

# Short of cache blocks, so that requests are preempted, and of tokens in a step, so that prefills are split.
TIGHT: dict[str, Any] = {
    "enforce_eager": INTERPRETED,
    "num_gpu_blocks_override": 40,
    "block_size": 32,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 96,
}


class Pair:
    """A target in both engines; the reference engine may have another one that should answer alike."""

    def __init__(self, target: Any, reference: Any = None, **options: Any) -> None:
        import small

        from steerback.engines import make_engine
        from steerback.engines.options import VllmOptions

        self.target = target
        options = small.OPTIONS | {"max_logprobs": -1} | options
        self.vllm = make_engine(target, VllmOptions(batch_size=32, max_model_len=256, layers=(0,), options=options))
        self.reference = small.reference_engine(reference or target)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The pair that most tests share: ReLU with the first model runner, JumpReLU with the second."""
    import small

    made = Pair(small.write(tmp_path_factory.mktemp("model"), "jumprelu" if SECOND else "relu"), **TIGHT)
    yield made
    made.vllm.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how far from the reference the engine was, tolerances aside."""
    import small

    for what, worst in sorted(small.SEEN.items()):
        terminalreporter.write_line(f"largest difference from the reference, {what}: {worst:.1e}")
