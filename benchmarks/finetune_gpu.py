"""Speed of fine-tuning on one GPU: a LoRA training step of the Llama-3.1-8B shape with the package's trainer.

    python benchmarks/finetune_gpu.py --out benchmarks/results/finetune_gpu.json    (--shape tiny to try it on CPU)

Random weights in bfloat16, the specification's LoRA settings (rank 32 on all linear layers, effective batch 8), rows of
exactly the sequence length of which the second half is trained, nothing padded. Per case: optimizer steps timed after
warm-up, with the device synchronised at the end of each step; the median is reported, and the peak of memory that torch
allocated.

Share of the peak: model FLOPs over time, against 989 TFLOP/s (dense bf16 of an H100 SXM or H200, NVIDIA's data sheet).
Counted per token: 4 P for the frozen linear layers (2 forward, 2 for the gradient of their inputs; their weights have
none), 6 R for the adapter's R parameters, 6 T d per layer for causal attention (forward and backward, half of T x T);
per trained token 4 V d for the output layer. Recomputed activations, norms and softmax are not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from steerback.finetuning.segments import IGNORED, Tokens
from steerback.finetuning.settings import TrainingSettings
from steerback.finetuning.train import fit

PEAK = 989e12
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}
# (sequence length, activations recomputed, timed steps)
CASES = ((512, False, 8), (512, True, 8), (4096, True, 4))
WARM = 2


def make_model(shape: str) -> LlamaForCausalLM:
    """Return a model with random weights, created on the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, pad_token_id=0, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Stand-in tokenizer: the trainer needs one for padding, although rows are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    made = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def rows(count: int, length: int, vocabulary: int) -> list[Tokens]:
    """Return rows of random tokens. The second half of each row is trained."""
    drawn = torch.randint(2, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    half = length // 2
    return [Tokens(tuple(ids), (IGNORED,) * half + tuple(ids[half:])) for ids in drawn]


class Clock(TrainerCallback):
    """Measures the seconds of each optimizer step, after device synchronisation."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._began)


def flops(shape: str, length: int, batch: int, rank: int) -> float:
    """Return the model FLOPs of an optimizer step; the module docstring explains the count."""
    c = SHAPES[shape]
    d, ff, layers, heads = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"]
    kv = d // heads * c["num_key_value_heads"]
    linears = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    frozen = layers * sum(i * o for i, o in linears)
    adapter = layers * sum(rank * (i + o) for i, o in linears)
    tokens = batch * length
    head = 4 * c["vocab_size"] * d * tokens // 2
    return float(tokens * (4 * frozen + 6 * adapter + 6 * layers * length * d) + head)


def measure(shape: str, length: int, checkpointing: bool, steps: int) -> dict[str, Any]:
    """Measure one case: time per step, tokens per second, memory, share of peak FLOPs."""
    cuda = torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = TrainingSettings(
        sequence_length=length, checkpointing=checkpointing, max_steps=WARM + steps, evaluations=1
    )
    data = rows(settings.batch_size * (WARM + steps), length, SHAPES[shape]["vocab_size"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        report = fit(
            lambda: make_model(shape), tokenizer(), data, (), settings, Path(folder), callbacks=[clock], name=shape
        )
    timed = clock.seconds[-steps:]
    middle = statistics.median(timed)
    work = flops(shape, length, settings.batch_size, settings.rank)
    return {
        "shape": shape,
        "sequence": length,
        "activations_recomputed": checkpointing,
        "effective_batch": settings.batch_size,
        "micro_batch": report.micro_batch,
        "out_of_memory": report.out_of_memory,
        "rank": settings.rank,
        "seconds_per_step": middle,
        "seconds_all": timed,
        "tokens_per_second": settings.batch_size * length / middle,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "model_tflop_per_step": work / 1e12,
        "tflop_per_second": work / middle / 1e12,
        "share_of_bf16_peak": work / middle / PEAK,
        "final_loss": report.final_loss,
    }


def versions() -> dict[str, str]:
    import accelerate
    import peft
    import transformers
    import trl

    modules = {"torch": torch, "transformers": transformers, "trl": trl, "peft": peft, "accelerate": accelerate}
    return {"python": platform.python_version()} | {name: str(m.__version__) for name, m in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    body: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/finetune_gpu.py --shape {given.shape}",
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "versions": versions(),
        "peak_tflops": PEAK / 1e12,
        "cases": [],
    }
    for length, checkpointing, steps in CASES:
        length = length // 16 if given.shape == "tiny" else length  # tiny is there to see whether it runs
        case = measure(given.shape, length, checkpointing, steps)
        body["cases"].append(case)
        memory = "" if case["peak_memory_gib"] is None else f", {case['peak_memory_gib']:.1f} GiB"
        print(
            f"{length} tokens, recompute {checkpointing}: {case['seconds_per_step']:.3f} s a step, "
            f"{case['tokens_per_second']:,.0f} tokens/s{memory}, {case['share_of_bf16_peak']:.1%} of the bf16 peak, "
            f"micro-batch {case['micro_batch']}",
            flush=True,
        )
        if given.out:  # after every case, so that a run that is cut off leaves what it measured
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
