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

SECOND = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The pair that most tests share: ReLU with the first model runner, JumpReLU with the second."""
    import small

    made = small.Pair(small.write(tmp_path_factory.mktemp("model"), "jumprelu" if SECOND else "relu"), **small.TIGHT)
    yield made
    made.vllm.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how far from the reference the engine was, tolerances aside."""
    import small

    for what, worst in sorted(small.SEEN.items()):
        terminalreporter.write_line(f"largest difference from the reference, {what}: {worst:.1e}")
