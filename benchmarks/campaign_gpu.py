"""Seconds of whole campaigns on one GPU, engine start included, and the speed of calibration against stock vLLM.

    python benchmarks/campaign_gpu.py TARGET --out FILE [--runs FOLDER] [--stages warm,esr,paper,stock]

Stages, each written into FILE as soon as it has numbers (preset specification, offline judge). A stage may set
options of the engine, for example `esr:replicas=4` or `esr:replicas=2+batch_size=128`:

    warm      a short `run esr`, so that vLLM's compile cache is filled
    esr       `steerback run esr`, without cache
    paper     `steerback paper`: all experiments, with an empty cache
    stock     stock vLLM without steering: the prompts, seeds, temperature and lengths of all calibration trials of the
              first stage esr in one call, in the same environment and on the same GPU; with 512 requests at a time,
              and with vLLM's own number

Goals: esr at most 100 s, paper at most 300 s, and calibration at no less than 0.9 of the tokens/s of stock vLLM.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHORT = ["n_latents=2", "trials_per_latent=2", "floor_responses=0", "reference_responses=1"]
"""Changes that make a run short."""


def timed(arguments: list[str], log: Path) -> tuple[int, float, dict[str, float]]:
    """Run a command; return its exit code, its seconds, and the second at which each stage was first named."""
    began, seen = time.monotonic(), dict[str, float]()
    command = [sys.executable, "-m", "steerback", *arguments]
    with log.open("w", encoding="utf-8") as file:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert running.stdout is not None
        for line in running.stdout:
            now = time.monotonic() - began
            file.write(f"{now:7.1f}  {line}")
            file.flush()
            if match := re.match(r".*: (calibration|verification|[a-z -]+): \d+", line):
                seen.setdefault(match[1], round(now, 2))
        code = running.wait()
    seconds = time.monotonic() - began
    print(f"{' '.join(arguments)}: exit code {code}, {seconds:.1f} s", flush=True)
    return code, round(seconds, 1), seen


def esr(target: str, runs: Path, name: str, changes: list[str]) -> dict[str, Any]:
    """Measure `run esr`."""
    arguments, seconds, stages = run_esr(target, runs, name, changes)
    counts = counted(runs / name)
    took = stages["verification"] - stages["calibration"]
    return {
        "command": "steerback " + " ".join(arguments) + "".join(f" --set {change}" for change in changes),
        "seconds": seconds,
        "stages begin at": stages,
        "responses": counts["responses"],
        "tokens": counts["tokens"],
        "calibration": {
            "responses": counts["calibration responses"],
            "tokens": counts["calibration tokens"],
            "seconds": round(took, 1),
            "tokens per second": round(counts["calibration tokens"] / took),
        },
    }


def run_esr(target: str, runs: Path, name: str, changes: list[str]) -> tuple[list[str], float, dict[str, float]]:
    """Return the arguments of a finished `run esr` (without the changes), its seconds, and when its stages began."""
    given = [word for change in changes for word in ("--set", change)]
    arguments = ["run", "esr", "--target", target, "--engine", "vllm", "--judge", "offline", "--no-cache"]
    code, seconds, stages = timed([*arguments, "--runs", str(runs), "--name", name, *given], runs / f"{name}.log")
    if code:
        raise SystemExit(f"see {runs / name}.log")
    return arguments, seconds, stages


def counted(folder: Path) -> dict[str, int]:
    """Count responses and generated tokens of a run."""
    from steerback.store.run import Run

    with Run.read(folder) as run:
        lengths = [(r.trial.stage, len(r.completion.token_ids)) for r in run.ledger.rows() if r.completion]
    own = [n for stage, n in lengths if stage == "calibration"]
    return {
        "responses": len(lengths),
        "tokens": sum(n for _, n in lengths),
        "calibration responses": len(own),
        "calibration tokens": sum(own),
    }


def paper(target: str, runs: Path, changes: list[str]) -> dict[str, Any]:
    """Measure `paper` with an empty cache of responses and verdicts."""
    from steerback.store.cache import default_path

    if not os.environ.get("STEERBACK_CACHE"):
        raise SystemExit("set STEERBACK_CACHE: the stage `paper` removes the cache of responses and verdicts in it")
    for file in default_path().parent.glob(default_path().name + "*"):
        file.unlink()
    arguments = ["paper", "--target", target, "--engine", "vllm", "--judge", "offline"]
    arguments += [word for change in changes for word in ("--set", change)]
    code, seconds, _ = timed([*arguments, "--runs", str(runs)], runs / "paper.log")
    # an experiment that does not apply, for example because no detector was found, makes the exit code 2
    return {"command": "steerback " + " ".join(arguments), "seconds": seconds, "exit code": code}


def stock(target: str, runs: Path, note: Callable[[str, Any], None]) -> None:
    """Generate the calibration's requests with stock vLLM in one batch: same prompts, seeds and lengths.

    `note` gets the results after each engine.
    """
    from vllm import LLM, SamplingParams

    from steerback.engines.loading import load_tokenizer
    from steerback.engines.prompting import Prompter
    from steerback.engines.vllm.loading import model_alone
    from steerback.store.run import Run
    from steerback.targets import resolve

    resolved = resolve(target)
    prompter = Prompter(load_tokenizer(resolved), resolved.prompt_format)
    with Run.read(next(folder for folder in sorted(runs.glob("esr*")) if folder.is_dir())) as run:
        rows = [r for r in run.ledger.rows() if r.trial.stage == "calibration" and r.completion]
        sampling = run.config.of(target).sampling
    prompts = [{"prompt_token_ids": list(prompter.tokens(r.trial.prompt))} for r in rows]
    lengths = [len(r.completion.token_ids) for r in rows if r.completion]
    asked = [
        SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=r.trial.seed,
            max_tokens=n,
            ignore_eos=True,
            detokenize=False,
        )
        for r, n in zip(rows, lengths, strict=True)
    ]
    made: dict[str, Any] = {}
    for name, more in (("512 at a time", {"max_num_seqs": 512}), ("vLLM's default", {})):
        made[name] = generated(LLM, {"model": model_alone(resolved), **more}, prompts, asked)
        note("stock", made)


def generated(make: Any, arguments: dict[str, Any], prompts: list[Any], asked: list[Any]) -> dict[str, Any]:
    """Start an engine of stock vLLM, warm it up and time the requests."""
    from vllm import SamplingParams

    longest = max(len(p["prompt_token_ids"]) + one.max_tokens for p, one in zip(prompts, asked, strict=True))
    engine = make(**arguments, dtype="bfloat16", max_model_len=longest)
    engine.generate(
        prompts[:256], [SamplingParams(max_tokens=16, ignore_eos=True)] * len(prompts[:256]), use_tqdm=False
    )
    began = time.perf_counter()
    done = engine.generate(prompts, asked, use_tqdm=False)
    took = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in done)
    assert tokens == sum(one.max_tokens for one in asked)
    engine.llm_engine.engine_core.shutdown()
    return {
        "requests": len(asked),
        "tokens": tokens,
        "seconds": round(took, 1),
        "tokens per second": round(tokens / took),
    }


def shares(measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the tokens/s of each calibration, divided by those of stock vLLM."""
    ours = {name: part["calibration"]["tokens per second"] for name, part in measured.items() if name[:3] == "esr"}
    stock = {name: part["tokens per second"] for name, part in measured["stock"].items()}
    return {name: {other: round(speed / n, 3) for other, n in stock.items()} for name, speed in ours.items()}


def about(target: str) -> dict[str, Any]:
    import torch

    packages = ("vllm", "torch", "transformers", "steerback")
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "target": target,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in packages} | {"python": sys.version.split()[0]},
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--stages", default="warm,esr,paper,stock")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    measured = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else about(options.target)

    def note(name: str, part: dict[str, Any]) -> None:
        print(name, json.dumps(part), flush=True)
        measured[name] = part
        options.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")

    for stage in options.stages.split(","):
        name, _, option = stage.partition(":")
        changes, run = [f"engine_options.{one}" for one in option.split("+") if one], re.sub(r"\W", "-", stage)
        if name == "warm":
            run_esr(options.target, options.runs, run, [*changes, *SHORT])
        elif name == "esr":
            note(stage, esr(options.target, options.runs, run, changes))
        elif name == "paper":
            note(stage, paper(options.target, options.runs, changes))
        elif name == "stock":
            stock(options.target, options.runs, note)
            note("calibration's share of stock vLLM", shares(measured))
        else:
            raise SystemExit(f"no stage {name!r}: warm, esr, paper or stock")


if __name__ == "__main__":
    main()
