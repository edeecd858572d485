"""Loading time, memory and CPU encoding speed of a large SAE with synthetic weights.

    python benchmarks/sae_speed.py                       # 65,536 x 4,096 in every format, about 4.3 GB of /tmp
    python benchmarks/sae_speed.py --width 8192 --formats goodfire --tokens 0

Each step runs in a separate process, so that peaks are independent. `cpu_seconds` is processor time of all
threads, which a busy machine changes less than `seconds`. Memory mapped from a file counts as peak
memory while it is in use, but it is the file cache, not a copy; `anonymous` is memory that cannot be released.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results") / "sae_speed.json"
FORMATS = ("goodfire", "gemma-scope", "gemma-scope-2", "saelens", "steerback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--formats", nargs="+", default=["goodfire", "gemma-scope"], choices=FORMATS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step](given, given.folder)))
        return
    rows = []
    for form in given.formats:
        folder = Path(tempfile.mkdtemp(prefix="sae_speed_"))
        try:
            write_sae(given, form, folder)
            rows.append({"format": form, **{step: run_step(given, form, folder, step) for step in steps(given)}})
            print(json.dumps(rows[-1], indent=1), flush=True)
        finally:
            shutil.rmtree(folder)
        write_results(given, rows)


def steps(given: argparse.Namespace) -> list[str]:
    return ["load", "columns", "hash", *(["encode"] if given.tokens else [])]


def write_sae(given: argparse.Namespace, form: str, folder: Path) -> None:
    """Write random weights in a format, with at most one matrix in memory twice."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    d, n = given.width, given.latents
    dtype = getattr(torch, given.dtype)
    w_enc, w_dec = (torch.randn(n, d, generator=draw).mul_(d**-0.5).to(dtype) for _ in range(2))
    b_enc, b_dec, threshold = torch.full((n,), -1.5, dtype=dtype), torch.zeros(d, dtype=dtype), torch.full((n,), 0.1)
    if form == "goodfire":  # its linear layers are (n, d) and (d, n)
        names = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
        torch.save(dict(zip(names, (w_enc, b_enc, w_dec.T.contiguous(), b_dec), strict=True)), folder / "sae.pt")
        return
    tensors = {"W_enc": w_enc.T.contiguous(), "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec, "threshold": threshold}
    if form == "gemma-scope":
        np.savez(folder / "params.npz", **{k: v.float().numpy() for k, v in tensors.items()})
    elif form == "gemma-scope-2":
        save_file({k.lower(): v for k, v in tensors.items()}, folder / "params.safetensors")
    elif form == "saelens":
        save_file(tensors, folder / "sae_weights.safetensors")
        hook = {"hook_name": "blocks.0.hook_resid_post"}
        config = {"architecture": "jumprelu", "apply_b_dec_to_input": False, "metadata": hook}
        (folder / "cfg.json").write_text(json.dumps(config))
    else:
        save_file(tensors, folder / "sae.safetensors")
        (folder / "sae.json").write_text(json.dumps({"kind": "jumprelu", "layer": 0}))


def run_step(given: argparse.Namespace, form: str, folder: Path, step: str) -> dict[str, Any]:
    """Run one step in a separate process. The file is in the system's cache, as after a download."""
    words = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--formats", form]
    for option in ("latents", "width", "tokens", "threads", "dtype"):
        words += [f"--{option}", str(getattr(given, option))]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class Clock:
    """Wall and processor seconds since its creation."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, digits: int = 2) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {"seconds": round(wall, digits), "cpu_seconds": round(cpu, digits)}


def loaded(given: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, float]]:
    import torch

    from steerback.targets import SaeSource
    from steerback.targets.sae_files import load_sae

    torch.set_num_threads(given.threads)
    source = SaeSource(str(folder), given.formats[0], layer=0)
    clock = Clock()
    return load_sae(source), clock.read()


def memory() -> dict[str, float]:
    """Return peak, current and anonymous resident memory of this process in GB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "peak_gb": round(int(fields["VmHWM"].split()[0]) * 1024 / 1e9, 3),
        "anonymous_gb": round(int(fields["RssAnon"].split()[0]) * 1024 / 1e9, 3),
    }


def step_load(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load and check an SAE: shapes, layer, no NaN or infinity."""
    import torch

    import steerback.targets.sae_files

    assert torch.__version__
    assert steerback.targets.sae_files.FORMATS  # imports are not loading
    before = memory()
    _, times = loaded(given, folder)
    return {**times, "before_gb": before["peak_gb"], **memory()}


def step_columns(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Read 64 encoder columns and decoder rows, as a steered run does."""
    sae, _ = loaded(given, folder)
    chosen = list(range(0, given.latents, given.latents // 64))[:64]
    clock = Clock()
    taken = sae.W_enc[:, chosen].contiguous().float(), sae.W_dec[chosen].contiguous().float()
    return {**clock.read(4), "taken_mb": round(sum(t.nbytes for t in taken) / 1e6, 2)}


def step_hash(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compute the SHA-256 of all weights as float32 (part of each cache key) and the summary of decoder norms."""
    sae, _ = loaded(given, folder)
    clock = Clock()
    assert len(sae.hash) == 64
    times = clock.read()
    clock = Clock()
    assert sae.norms()["max"] > 0
    return {**times, "norms": clock.read(), **memory()}


def step_encode(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Encode `tokens` residuals, 1,024 at a time as the engine does."""
    import torch

    sae, _ = loaded(given, folder)
    residual = torch.randn(given.tokens, given.width, generator=torch.Generator().manual_seed(1))
    active, clock = 0, Clock()
    with torch.inference_mode():
        for first in range(0, given.tokens, 1024):
            active += int((sae.encode(residual[first : first + 1024]) > 0).sum())
    times = clock.read()
    return {
        **times,
        "tokens_per_second": round(given.tokens / times["seconds"], 1),
        "gflops_per_cpu_second": round(2 * given.tokens * given.width * given.latents / times["cpu_seconds"] / 1e9, 1),
        "active_per_token": round(active / given.tokens, 1),
        **memory(),
    }


STEPS = {"load": step_load, "columns": step_columns, "hash": step_hash, "encode": step_encode}


def write_results(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the numbers of this shape to the file and replace older ones of the same shape."""
    import numpy
    import safetensors
    import torch

    import steerback
    from steerback.store.manifest import machine

    shape = {"latents": given.latents, "width": given.width, "dtype": given.dtype}
    body = {
        **shape,
        "tokens": given.tokens,
        "threads": given.threads,
        "gb_of_weights": round(2 * given.latents * given.width * (4 if given.dtype == "float32" else 2) / 1e9, 2),
        "formats": rows,
        "command": " ".join(["python", "benchmarks/sae_speed.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "steerback": steerback.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    known = json.loads(given.output.read_text()) if given.output.is_file() else []
    kept = [entry for entry in known if {key: entry[key] for key in shape} != shape]
    given.output.write_text(json.dumps([*kept, body], indent=1) + "\n")
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
