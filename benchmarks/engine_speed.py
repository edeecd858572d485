"""Tokens per second of the transformers engine with steering, compared with `model.generate` of the same model.

    python benchmarks/engine_speed.py [--target organism] [--batch 64] [--threads 2] [--device cuda] [--out FILE]

With --target random:SHAPE a random Llama of that shape is used: speed does not depend on the values of weights, only
on how long responses get, and here all have the same length. Both sides decode
`batch` rows of the same prompts and the same number of tokens; the engine steers each row with a latent of its own,
clamps two more and keeps receipts, which `generate` does not. Each is measured three times, the best counts.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny
from steerback.engines.loading import LoadedModel, assemble
from steerback.engines.transformers import TransformersEngine
from steerback.records import Intervention, Request, Sampling

SHAPES: dict[str, dict[str, int]] = {
    "organism": {"hidden_size": 192, "intermediate_size": 512, "layers": 6, "num_attention_heads": 4, "head_dim": 48},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "num_attention_heads": 32, "head_dim": 128},
}


def random_model(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Return a random Llama, initialised on the device, because a CPU needs minutes for 8 billion numbers."""
    size = dict(SHAPES[shape])
    groups = size["num_attention_heads"] if shape == "organism" else 8
    vocabulary = 3072 if shape == "organism" else 128_256
    with torch.device(device):
        torch.set_default_dtype(dtype)
        made = tiny.model(
            "llama",
            size.pop("layers"),
            0.02,
            vocab_size=vocabulary,
            num_key_value_heads=groups,
            max_position_embeddings=2048,
            eos_token_id=None,
            dtype=dtype,
            **size,
        )
        torch.set_default_dtype(torch.float32)
    return made.to(device, dtype)


def load(name: str, device: str) -> LoadedModel:
    """Return a built-in target, or a random model for `random:SHAPE`."""
    if not name.startswith("random:"):
        from steerback.engines.loading import load as load_weights
        from steerback.targets import resolve

        return load_weights(resolve(name), device)
    shape = name.partition(":")[2]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = random_model(shape, device, dtype)
    layers = model.config.num_hidden_layers
    sae = tiny.sae("jumprelu", layers // 2, model.config.hidden_size, 1024).to(device)
    target = dataclasses.replace(tiny.target(layers // 2, layers // 2), n_latents=sae.n_latents)
    return assemble(target, model, tiny.tokenizer(), sae)


def best(work: Callable[[], int], device: str, times: int = 3) -> float:
    """Return the tokens per second of the fastest of several runs, after a warm-up."""
    rates = []
    for _ in range(times + 1):
        start = time.perf_counter()
        tokens = work()
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(tokens / (time.perf_counter() - start))
    return max(rates[1:])


def measure(engine: TransformersEngine, plain: Any, batch: int, tokens: int, device: str) -> dict[str, float]:
    """Return tokens per second of the steering engine, the engine without steering, and plain `generate`."""
    engine.runner.ends = frozenset()  # equal lengths on both sides
    prompts = [" ".join(tiny.WORDS[n % 9 : n % 9 + 8]) for n in range(batch)]
    sampling = Sampling(0.7, max_new_tokens=tokens)

    def requests(steered: bool) -> list[Request]:
        edits = [
            (Intervention("add", n % 64, 2.0), Intervention("clamp", 100, 0.0), Intervention("clamp", 101, 0.0))
            for n in range(batch)
        ]
        return [Request(str(n), p, n, sampling, edits[n] if steered else ()) for n, p in enumerate(prompts)]

    async def drain(made: list[Request]) -> int:
        return sum([len(done.token_ids) async for _, done in engine.generate(made)])

    ids = [engine.runner.prompt_of(r) for r in requests(False)]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)

    def generate() -> int:
        with torch.inference_mode():
            out = plain.generate(
                padded,
                attention_mask=mask,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
            )
        return int(out.shape[0] * (out.shape[1] - width))

    return {
        "steered_tokens_per_s": best(lambda: asyncio.run(drain(requests(True))), device),
        "unsteered_tokens_per_s": best(lambda: asyncio.run(drain(requests(False))), device),
        "generate_tokens_per_s": best(generate, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="organism", help="built-in target, or random:organism|1b|8b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]  # another job on the same cores makes the numbers worthless
    loaded = load(args.target, args.device)
    plain = copy.deepcopy(loaded.runner.model) if args.device == "cpu" else load(args.target, args.device).runner.model
    plain.set_attn_implementation("sdpa")
    engine = TransformersEngine(loaded, args.batch)
    if engine.workers > 1:  # side by side they decode as many rows as `generate` does
        engine = TransformersEngine(loaded, max(args.batch // engine.workers, 1))
    rates = measure(engine, plain, args.batch, args.tokens, args.device)
    measured = {
        "command": f"engine_speed.py --target {args.target} --batch {args.batch} --tokens {args.tokens}"
        f" --threads {args.threads} --device {args.device}",
        **{key: round(rate, 1) for key, rate in rates.items()},
        "steered_over_generate": round(rates["steered_tokens_per_s"] / rates["generate_tokens_per_s"], 3),
        "load_average_before": round(load_before, 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu",
    }
    print(json.dumps(measured, indent=1))
    known = json.loads(args.out.read_text()) if args.out.is_file() else []
    known = [entry for entry in known if entry["command"] != measured["command"]] + [measured]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
