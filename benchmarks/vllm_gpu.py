"""Speed of steering on vLLM on a GPU: tokens/s by what is done to the requests, and whole-SAE activations.

    python benchmarks/vllm_gpu.py speed llama-8b --requests 256 512 --out benchmarks/results/vllm_8b.json
    python benchmarks/vllm_gpu.py speed gemma-9b --requests 256 --out benchmarks/results/vllm_gemma.json
    python benchmarks/vllm_gpu.py speed llama-70b-fp8 --requests 256 --out benchmarks/results/vllm_70b.json
    python benchmarks/vllm_gpu.py pool llama-8b --out benchmarks/results/vllm_pool.json

Shapes are real, weights are random (`dummy`): these runs measure speed alone. Numbers are checked by
`pytest tests/vllm_engine`, which runs on a GPU too. Every request has a latent and a boost of its own; clamped and
recorded latents are 26, the same for all. Stock vLLM and the steered engine run in one process after one another, the
variants of the steered engine in turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "steer": 19},
    "gemma-9b": {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000, "head_dim": 256, "steer": 26},
    "llama-70b-fp8": {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "steer": 33, "fp8": True},
    "tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16384, "steer": 2},
}
PROMPT, NEW, CLAMPED, LENGTH = 48, 256, 26, 512


def write_target(shape: str, folder: Path, latents: int) -> Any:
    """A folder with the shape's config, the built-in model's tokenizer and a random SAE in bfloat16."""
    import torch
    from transformers import AutoConfig

    from steerback.organism import weights_dir
    from steerback.targets import from_folder
    from steerback.targets.sae import Sae, save_native

    fields = dict(SHAPES[shape])
    steer, _ = fields.pop("steer"), fields.pop("fp8", None)
    config = AutoConfig.for_model(**fields, max_position_embeddings=8192, tie_word_embeddings=False)
    config.architectures = [{"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM"}[fields["model_type"]]]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(weights_dir("organism") / name, folder / name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d = fields["hidden_size"]
    decoder = torch.nn.functional.normalize(torch.randn(latents, d, device=device), dim=1).bfloat16().cpu()
    zeros = torch.zeros(latents)
    sae = Sae("relu", steer, decoder.T.contiguous(), zeros, decoder, torch.zeros(d), zeros)
    save_native(sae, folder, torch.bfloat16, boost_prior=[4.0, 2.0, 0.0, 40.0])
    return from_folder(folder, steer_layer=steer, read_layer=steer, dtype="bfloat16", prompt_format="plain")


def engine_of(target: Any, shape: str, batch: int, **more: Any) -> Any:
    from steerback.engines.vllm.engine import VllmEngine

    options: dict[str, Any] = {"load_format": "dummy", "gpu_memory_utilization": 0.85, **more}
    if SHAPES[shape].get("fp8"):
        options["quantization"] = "fp8"
    return VllmEngine(target, batch_size=batch, max_model_len=LENGTH, options=options)


def stock_driver(engine: Any) -> Any:
    """Stock vLLM with the steered engine's arguments, behind the same client."""
    from steerback.engines.vllm.driver import Driver

    def launch() -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine._arguments, disable_log_stats=True))

    return Driver(engine.settings, launch)


def jobs_of(kind: str, requests: int, engine: Any, seed: int) -> list[Any]:
    """Requests with a latent and boost of their own, and what `kind` adds to that."""
    from steerback.engines.vllm.driver import Job
    from steerback.engines.vllm.settings import Ticket
    from steerback.records import Intervention

    draw = random.Random(seed)
    site = engine.settings.site
    shared = random.Random(0).sample(range(site.n_latents), CLAMPED)
    clamps = tuple(Intervention("clamp", k, 0.0) for k in shared)
    vocabulary = engine._loaded.prompter.tokenizer.vocab_size
    out = []
    for n in range(requests):
        add = Intervention("add", draw.randrange(site.n_latents), draw.uniform(1, 8))
        edits = {"plain": (), "add": (add,)}.get(kind, (add, *clamps))
        record = tuple(shared) if kind == "add+clamp+record" else ()
        ticket = Ticket(f"{kind}/{seed}/{n}", edits, record, site.read_layer, PROMPT + NEW)
        ids = tuple(draw.randrange(10, vocabulary) for _ in range(PROMPT))
        sampling = {"temperature": 1.0, "seed": n, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}
        out.append(Job(ticket, ids, sampling))
    return out


def timed(driver: Any, jobs: Sequence[Any]) -> float:
    """Seconds until all are answered; checks lengths, receipts and recordings."""
    begin = time.perf_counter()
    answers = [future.result() for future in [driver.submit(job) for job in jobs]]
    seconds = time.perf_counter() - begin
    for job, answer in zip(jobs, answers, strict=True):
        assert len(answer.output.outputs[0].token_ids) == NEW
        if job.ticket.edits:
            assert (answer.entry["prompt"], answer.entry["generated"]) == (PROMPT, NEW - 1), answer.entry
        if job.ticket.record:
            assert len(answer.entry["record"]) == 4 * len(job.ticket.record) * (PROMPT + NEW - 1)
    return seconds


def measure(driver: Any, kinds: Sequence[str], requests: int, engine: Any, repeats: int) -> dict[str, list[float]]:
    """Tokens/s of each kind, `repeats` times in turn after one warm-up each."""
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):
        for kind in kinds:
            seconds = timed(driver, jobs_of(kind, requests, engine, seed=1000 * requests + repeat))
            if repeat:
                speeds[kind].append(requests * NEW / seconds)
    return speeds


def speed(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        target = write_target(args.shape, Path(scratch), args.latents)
        engine = engine_of(target, args.shape, max(args.requests))
        kinds = ("plain", "add", "add+clamp", "add+clamp+record")
        found = {n: measure(engine._drivers[0], kinds, n, engine, args.repeats) for n in args.requests}
        facts = engine.describe()
        engine.close()
        gc.collect()
        stock = stock_driver(engine)
        for n in args.requests:
            found[n] |= {"stock": measure(stock, ("plain",), n, engine, args.repeats)["plain"]}
        stock.close()
    table = {}
    for n, speeds in found.items():
        base = statistics.median(speeds["stock"])
        table[n] = {
            kind: {
                "tokens_per_second": [round(s) for s in values],
                "median": round(statistics.median(values)),
                "of_stock": round(statistics.median(values) / base, 4),
            }
            for kind, values in speeds.items()
        }
    return {"shape": args.shape, "prompt": PROMPT, "new": NEW, "engine": facts, "requests": table}


def pool(args: argparse.Namespace) -> dict[str, Any]:
    """Prompts/s of whole-SAE maxima over 256-token texts, against the same texts only read."""
    import torch

    from steerback.engines.vllm.driver import Job
    from steerback.engines.vllm.settings import Ticket

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        target = write_target(args.shape, Path(scratch), args.latents)
        engine = engine_of(target, args.shape, 256)
        driver, texts, length = engine._drivers[0], 512, 256
        vocabulary = engine._loaded.prompter.tokenizer.vocab_size
        rates: dict[str, list[float]] = {"read": [], "pooled": []}
        free: list[float] = []
        for repeat in range(args.repeats + 1):
            for kind in rates:
                draw = random.Random(repeat + 100 * (kind == "read"))
                sampling = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
                jobs = [
                    Job(
                        Ticket(f"{kind}/{repeat}/{n}", pool=((0, length),) if kind == "pooled" else ()),
                        tuple(draw.randrange(10, vocabulary) for _ in range(length)),
                        sampling,
                    )
                    for n in range(texts)
                ]
                begin = time.perf_counter()
                for future in [driver.submit(job) for job in jobs]:
                    future.result()
                if repeat:
                    rates[kind].append(texts / (time.perf_counter() - begin))
                if torch.cuda.is_available():
                    free.append(torch.cuda.mem_get_info()[0] / 2**30)
        facts = engine.describe()
        engine.close()
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "shape": args.shape,
        "latents": args.latents,
        "text_tokens": length,
        "texts_per_second": {kind: [round(v, 1) for v in values] for kind, values in rates.items()},
        "of_reading": round(medians["pooled"] / medians["read"], 4),
        "least_free_gib": round(min(free), 2) if free else None,
        "engine": facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "pool"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--requests", type=int, nargs="+", default=[256])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--scratch", default=None, help="folder for the random SAE (1 GB for 8B)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {"speed": speed, "pool": pool}[args.what](args)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
