"""Speed of steering with vLLM on a GPU: tokens/s by kind of intervention, and whole-SAE activations.

    python benchmarks/vllm_gpu.py llama-8b --requests 256 512 --pool --out benchmarks/results/vllm_8b.json
    python benchmarks/vllm_gpu.py gemma-9b --kinds add+clamp+record --out benchmarks/results/vllm_gemma.json
    python benchmarks/vllm_gpu.py llama-70b-fp8 --kinds add+clamp+record --apart --out benchmarks/results/vllm_70b.json

Shapes are real, weights are random (`dummy`): these runs measure speed alone. Numbers are checked by
`pytest tests/vllm_engine`, which runs on a GPU too. Every request has a latent and a boost of its own; clamped and
recorded latents are 26, the same for all; receipts and lengths are checked in every run. All requests arrive at once
and are of one length, or (`--stream`) end at different times and make room for others, as in a study. Stock vLLM and
the steered engine live side by side on one GPU and are measured in turn (one idles while the other works), so that what
drifts drifts for both; `--apart` measures one after the other, for models of which two do not fit.
Results are written after every measurement, so an interrupted run keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
KINDS = ("idle", "add", "add+clamp", "add+clamp+record")


class Report:
    """Report of all measurements. Each addition rewrites the file."""

    def __init__(self, out: Path | None, **facts: Any) -> None:
        self.out, self.begin = out, time.perf_counter()
        self.measured: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            **facts,
        }

    def add(self, **facts: Any) -> None:
        self.measured |= facts
        self.measured["seconds_in_all"] = round(time.perf_counter() - self.begin, 1)
        print(f"[{self.measured['seconds_in_all']:.0f} s] {json.dumps(facts)[:1500]}", flush=True)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.measured, indent=1) + "\n", encoding="utf-8")


def write_model(shape: str, folder: Path) -> int:
    """Write a folder with the shape's config and the built-in model's tokenizer; return the layer to steer."""
    import shutil

    from transformers import AutoConfig

    from steerback.organism import weights_dir

    fields = dict(SHAPES[shape])
    steer, _ = fields.pop("steer"), fields.pop("fp8", None)
    tied = fields["model_type"] == "gemma2"
    config = AutoConfig.for_model(**fields, max_position_embeddings=8192, tie_word_embeddings=tied)
    config.architectures = [{"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM"}[fields["model_type"]]]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(weights_dir("organism") / name, folder / name)
    return int(steer)


def write_target(shape: str, folder: Path, latents: int) -> Any:
    """Return a target with the model's folder and a random SAE in bfloat16."""
    import torch

    from steerback.targets import from_folder
    from steerback.targets.sae import Sae, save_native

    steer = write_model(shape, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    d = SHAPES[shape]["hidden_size"]
    decoder = torch.nn.functional.normalize(torch.randn(latents, d, device=device), dim=1).bfloat16().cpu()
    zeros = torch.zeros(latents)
    sae = Sae("relu", steer, decoder.T.contiguous(), zeros, decoder, torch.zeros(d), zeros)
    save_native(sae, folder, torch.bfloat16, boost_prior=[4.0, 2.0, 0.0, 40.0])
    if device == "cuda":
        torch.cuda.empty_cache()
    return from_folder(folder, steer_layer=steer, read_layer=steer, dtype="bfloat16", prompt_format="plain")


def stock_driver(engine: Any) -> Any:
    """Return stock vLLM with the arguments and the client of the steered engine."""
    from steerback.engines.vllm.driver import Driver

    def launch() -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine._arguments, disable_log_stats=True))

    return Driver(engine.settings, launch).ready()


def start(target: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Start the steered engine and stock vLLM (None if `--apart`) at the same time."""
    from steerback.engines.options import VllmOptions
    from steerback.engines.vllm.engine import VllmEngine

    class Beside(VllmEngine):
        stock: Any = None

        def _self_test(self, version: str) -> None:
            """Skip this step: with random weights all tokens are equally likely, so it would show nothing."""

        def _start(self, *rest: Any) -> Any:
            if args.apart:
                return super()._start(*rest)
            with ThreadPoolExecutor(1) as pool:
                stock = pool.submit(stock_driver, self)
                drivers = super()._start(*rest)
                self.stock = stock.result()
            return drivers

    options: dict[str, Any] = {"load_format": "dummy", "gpu_memory_utilization": 0.85 if args.apart else 0.4}
    if args.kv_gib:  # without it the two engines would watch each other's memory while they start
        options["kv_cache_memory_bytes"] = args.kv_gib << 30
    if SHAPES[args.shape].get("fp8"):
        options["quantization"] = "fp8"
    engine = Beside(target, VllmOptions(batch_size=max(args.requests), max_model_len=LENGTH, options=options))
    return engine, engine.stock


def jobs_of(kind: str, requests: int, engine: Any, seed: int, shortest: int = NEW) -> list[Any]:
    """Return requests with different latents and boosts, the edits of `kind`, and `shortest` to NEW new tokens."""
    from steerback.engines.vllm.driver import VllmJob
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
        edits = {"stock": (), "idle": (), "add": (add,)}.get(kind, (add, *clamps))
        record = tuple(shared) if kind == "add+clamp+record" else ()
        ticket = Ticket(f"{kind}/{seed}/{n}", edits, record, site.read_layer, PROMPT + NEW)
        ids = tuple(draw.randrange(10, vocabulary) for _ in range(PROMPT))
        new = draw.randint(shortest, NEW)
        sampling = {"temperature": 1.0, "seed": n, "max_tokens": new, "ignore_eos": True, "detokenize": False}
        out.append(VllmJob(ticket, ids, sampling))
    return out


def timed(driver: Any, jobs: Sequence[Any]) -> float:
    """Return the seconds until all requests are finished. Checks lengths, receipts and recordings."""
    gc.collect()
    begin = time.perf_counter()
    answers = [future.result() for future in [driver.submit(job) for job in jobs]]
    seconds = time.perf_counter() - begin
    for job, answer in zip(jobs, answers, strict=True):
        new = job.sampling["max_tokens"]
        assert len(answer.output.outputs[0].token_ids) == new
        if job.ticket.edits:
            assert (answer.entry["prompt"], answer.entry["generated"]) == (PROMPT, new - 1), answer.entry
        if job.ticket.record:
            assert len(answer.entry["record"]) == 4 * len(job.ticket.record) * (PROMPT + new - 1)
    return seconds


def table_of(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Return median, spread and share of stock vLLM's median, by kind."""
    base = statistics.median(speeds["stock"]) if speeds.get("stock") else None
    return {
        kind: {
            "tokens_per_second": [round(s) for s in values],
            "median": round(statistics.median(values)),
            "spread": round((max(values) - min(values)) / statistics.median(values), 4),
            **({} if base is None else {"of_stock": round(statistics.median(values) / base, 4)}),
        }
        for kind, values in speeds.items()
        if values
    }


def measure(drivers: dict[str, Any], engine: Any, args: argparse.Namespace, report: Report) -> None:
    """Return tokens/s by kind and number of requests, measured `--repeats` times in turn after one warm-up each."""
    batches = [(str(n), n, NEW) for n in args.requests]
    if args.stream:
        batches.append((f"{args.stream} of 64 to {NEW} new tokens, {max(args.requests)} at a time", args.stream, 64))
    for name, requests, shortest in batches:
        speeds = RAW.setdefault(name, {})
        speeds.update({kind: [] for kind in drivers})
        for repeat in range(args.repeats + 1):
            for kind, driver in drivers.items():
                jobs = jobs_of(kind, requests, engine, 1000 * requests + repeat, shortest)
                seconds = timed(driver, jobs)
                if repeat:
                    speeds[kind].append(sum(job.sampling["max_tokens"] for job in jobs) / seconds)
            report.add(tokens_per_second={batch: table_of(kinds) for batch, kinds in RAW.items()})


RAW: dict[str, dict[str, list[float]]] = {}
"""Tokens/s by batch of requests and kind."""


def compare(engine: Any, stock: Any, args: argparse.Namespace, report: Report) -> None:
    """Measure the speed of each kind and of stock vLLM."""
    steered = dict.fromkeys(args.kinds, engine._drivers[0])
    if stock is not None:
        measure({"stock": stock} | steered, engine, args, report)
        return
    measure(steered, engine, args, report)
    engine.close()
    gc.collect()
    alone = stock_driver(engine)
    measure({"stock": alone}, engine, args, report)
    alone.close()


def pool(engine: Any, stock: Any, args: argparse.Namespace, report: Report) -> None:
    """Return texts/s with and without whole-SAE maxima over 256-token texts, and the peak memory of both."""
    from steerback.engines.vllm.driver import VllmJob
    from steerback.engines.vllm.settings import Ticket

    driver, texts, length = engine._drivers[0], args.texts, 256
    vocabulary = engine._loaded.prompter.tokenizer.vocab_size
    sampling = {"temperature": 0.0, "max_tokens": 1, "detokenize": False}
    rates: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    kinds = {"read by stock": stock, "read": driver, "pooled": driver}
    for repeat in range(args.repeats + 1):
        for number, (kind, on) in enumerate(kinds.items()):
            if on is None:
                continue
            draw = random.Random(repeat + 100 * number)
            spans = ((0, length),) if kind == "pooled" else ()
            jobs = [
                VllmJob(
                    Ticket(f"{kind}/{repeat}/{n}", pool=spans),
                    tuple(draw.randrange(10, vocabulary) for _ in range(length)),
                    sampling,
                )
                for n in range(texts)
            ]
            driver.call("steerback_memory")
            begin = time.perf_counter()
            for future in [on.submit(job) for job in jobs]:
                future.result()
            if repeat:
                rates.setdefault(kind, []).append(texts / (time.perf_counter() - begin))
            if on is driver:
                peaks[kind] = max(peaks.get(kind, 0.0), driver.call("steerback_memory")[0] / 2**30)
        if repeat:
            medians = {kind: statistics.median(values) for kind, values in rates.items()}
            of = {f"of_{kind.replace(' ', '_')}": round(medians["pooled"] / medians[kind], 4) for kind in medians}
            del of["of_pooled"]
            shown = {kind: [round(v, 1) for v in values] for kind, values in rates.items()}
            peak = {kind: round(v, 3) for kind, v in peaks.items()}
            report.add(pool={"text_tokens": length, "texts": texts, "texts_per_second": shown, "peak_gib": peak} | of)


def main() -> None:
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # torch has used the GPU before vLLM starts
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--requests", type=int, nargs="*", default=[256])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latents", type=int, default=65536)
    parser.add_argument("--stream", type=int, default=0, help="a study of so many requests of various lengths as well")
    parser.add_argument("--pool", action="store_true", help="whole-SAE activations as well")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--apart", action="store_true", help="stock vLLM after the steered engine, not beside it")
    parser.add_argument("--kv-gib", type=int, default=28, help="cache of each engine; 0: as vLLM chooses")
    parser.add_argument("--scratch", default=None, help="folder for the random SAE (1 GB for 8B)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, shape=args.shape, prompt=PROMPT, new=NEW, clamped=CLAMPED, latents=args.latents)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        target = write_target(args.shape, Path(scratch), args.latents)
        report.add(target_written=True)
        engine, stock = start(target, args)
        report.add(engine=engine.describe())
        if args.pool:
            pool(engine, stock, args, report)
        compare(engine, stock, args, report)
        engine.close()
        if stock is not None:
            stock.close()


if __name__ == "__main__":
    main()
