"""Tensor parallelism and replicas: the same edits on several workers. Runs where there are two GPUs, or when asked to.

With `STEERBACK_TEST_PARALLEL=1` it runs without them as well. On a CPU vLLM puts its workers on cores; it takes minutes
to start them. Workers that have to share one GPU (`one_gpu.py`) still sum through NCCL, over a socket.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import small
import torch
from test_engine import CASES, check_all_edits, collect, words

from steerback.engines.options import VllmOptions
from steerback.engines.vllm import engine
from steerback.engines.vllm.engine import VllmEngine
from steerback.records import Request, Sampling

ASKED = os.environ.get("STEERBACK_TEST_PARALLEL") == "1"
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2 and not ASKED, reason="needs two GPUs")
SHARED = torch.cuda.device_count() == 1
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(autouse=True)
def one_gpu_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says that there are two GPUs where there is one."""
    if SHARED:
        monkeypatch.setattr(engine, "gpus", lambda: 2)
        monkeypatch.setattr(engine, "device_shares", lambda replicas, *_: ["0"] * replicas)
        monkeypatch.setattr(engine, "WORKER", "one_gpu.OneGpuWorker")
        monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")


class Parallel:
    """A small model split over two workers, and the reference."""

    def __init__(self, folder: Path, **how: int) -> None:
        target = small.write(folder, **HEADS)
        options = {"max_logprobs": -1, "enforce_eager": not small.GPU, **(small.OPTIONS if small.GPU else {})}
        if SHARED and "tensor_parallel" in how:
            options |= {"distributed_executor_backend": "mp", "disable_custom_all_reduce": True}
        self.vllm = VllmEngine(
            target, VllmOptions(batch_size=32, max_model_len=256, layers=(0,), options=options, **how)
        )
        self.reference = small.reference_engine(target)


def test_two_workers_edit_like_the_reference(tmp_path: Path) -> None:
    """Logits, recordings and receipts; that both workers edited the same positions is checked with every answer."""
    pair = Parallel(tmp_path, tensor_parallel=2)
    try:
        check_all_edits(pair)
        prompts, responses = [words(1, 30)] * 2, [words(2, 40), words(3, 50)]
        got, want = (e.activations(prompts, responses) for e in (pair.vllm, pair.reference))
        small.near("whole-SAE activations", got, want, small.POOLED)
    finally:
        pair.vllm.close()


def test_two_replicas_answer_like_the_reference(tmp_path: Path) -> None:
    """Requests alternate between the engines; texts and receipts are those of the reference."""
    pair = Parallel(tmp_path, replicas=2)
    try:
        requests = [
            Request(f"{n} {name}", words(n, 20), n, Sampling(0.0, max_new_tokens=12), edits)
            for n, (name, edits) in enumerate(CASES.items())
        ]
        got, want = collect(pair.vllm, requests), collect(pair.reference, requests)
        for request in requests:
            assert got[request.key].text == want[request.key].text
            assert got[request.key].receipt_matches(request.interventions)
    finally:
        pair.vllm.close()
