"""What users would take instead, at the task of `vllm_gpu.py`: each request steered by a vector of its own.

    python benchmarks/vllm_peers.py lens llama-8b --requests 32 256 --new 16 --out FILE      (needs vllm-lens)
    python benchmarks/vllm_peers.py transformers llama-8b --requests 256 64 --out FILE

`lens`: vLLM's offline interface with vllm-lens steering vectors; it is slow enough at this that `--new` (tokens per
request) has to be small. `transformers`: `generate` of one batch with a forward hook that adds a vector to each row.
Random weights; no clamps, recordings or receipts in either.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gpu import NEW as LONG
from vllm_gpu import PROMPT, SHAPES, Report, write_model


def prompts(requests: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, 2000) for _ in range(PROMPT)] for _ in range(requests)]


def lens(folder: Path, shape: str, steer: int, most: int, new: int) -> Callable[[int, int], int]:
    """vLLM with vllm-lens, which makes it eager."""
    import torch
    import vllm_lens
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=most,
        generation_config="vllm",
        gpu_memory_utilization=0.6,
    )
    d = SHAPES[shape]["hidden_size"]

    def run(requests: int, seed: int) -> int:
        torch.manual_seed(seed)
        rest = {"temperature": 1.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(
                **rest,
                seed=n,
                extra_args={
                    "apply_steering_vectors": [
                        vllm_lens.SteeringVector(activations=torch.randn(1, d), layer_indices=[steer], scale=1.0)
                    ]
                },
            )
            for n in range(requests)
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts(requests, seed)]
        answers = llm.generate(asked, params, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return run


def hooked(folder: Path, shape: str, steer: int, most: int, new: int) -> Callable[[int, int], int]:
    """transformers with a forward hook on the steered layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16).eval()
    vectors = torch.zeros(most, 1, SHAPES[shape]["hidden_size"], device=device, dtype=torch.bfloat16)

    def add(_: Any, __: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        steered = h + vectors[: h.shape[0]]
        return (steered, *out[1:]) if isinstance(out, tuple) else steered

    model.model.layers[steer].register_forward_hook(add)

    def run(requests: int, seed: int) -> int:
        torch.manual_seed(seed)
        vectors.normal_()
        ids = torch.tensor(prompts(requests, seed), device=device)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=0,
                max_new_tokens=new,
                min_new_tokens=new,
            )
        return int(out.shape[0] * (out.shape[1] - PROMPT))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("lens", "transformers"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--requests", type=int, nargs="+", default=[256])
    parser.add_argument("--new", type=int, default=LONG, help="new tokens of each request")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, peer=args.peer, shape=args.shape, prompt=PROMPT, new=args.new)
    with tempfile.TemporaryDirectory() as scratch:
        steer = write_model(args.shape, Path(scratch))
        run = {"lens": lens, "transformers": hooked}[args.peer](
            Path(scratch), args.shape, steer, max(args.requests), args.new
        )
        report.add(started=True)
        found: dict[str, Any] = {}
        for requests in args.requests:
            values: list[float] = []
            for repeat in range(args.repeats + 1):
                begin = time.perf_counter()
                tokens = run(requests, repeat)
                if repeat:
                    values.append(tokens / (time.perf_counter() - begin))
                    found[str(requests)] = {
                        "tokens_per_second": [round(v) for v in values],
                        "median": round(statistics.median(values)),
                        "spread": round((max(values) - min(values)) / statistics.median(values), 4),
                    }
                    report.add(tokens_per_second=found)


if __name__ == "__main__":
    main()
