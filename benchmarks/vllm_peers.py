"""Speed of alternatives on the task of `vllm_gpu.py`: each request is steered by a different vector.

    python benchmarks/vllm_peers.py lens llama-8b --batches 256x16 256x64shared 32x256 --out FILE    (needs vllm-lens)
    python benchmarks/vllm_peers.py transformers llama-8b --batches 256x256 --out FILE

A batch is requests x new tokens of each; `shared`: one vector for all of them, which is the best case of vllm-lens.
`lens`: vLLM's offline interface with vllm-lens steering vectors. `transformers`: `generate` of one batch with a forward
hook that adds a vector to each row. Random weights; no clamps, recordings or receipts in either.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gpu import PROMPT, SHAPES, Report, write_model

Run = Callable[[int, int, bool, int], int]
"""Function of number of requests, new tokens per request, shared vector and seed that returns generated tokens."""


def batch(text: str) -> tuple[int, int, bool]:
    """Parse a batch: `256x64shared` is (256, 64, True)."""
    measured = re.fullmatch(r"(\d+)x(\d+)(shared)?", text)
    if not measured:
        raise argparse.ArgumentTypeError(f"{text!r} is not REQUESTSxTOKENS or REQUESTSxTOKENSshared")
    return int(measured[1]), int(measured[2]), bool(measured[3])


def prompts(requests: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, 2000) for _ in range(PROMPT)] for _ in range(requests)]


def lens(folder: Path, shape: str, steer: int, most: int) -> Run:
    """Return a function that generates with vLLM and vllm-lens, which needs eager mode."""
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

    def params(new: int, seed: int | None) -> Any:
        vector = vllm_lens.SteeringVector(activations=torch.randn(1, d), layer_indices=[steer], scale=1.0)
        rest = {"temperature": 1.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
        return SamplingParams(**rest, seed=seed, extra_args={"apply_steering_vectors": [vector]})

    def run(requests: int, new: int, shared: bool, seed: int) -> int:
        torch.manual_seed(seed)
        asked = [{"prompt_token_ids": ids} for ids in prompts(requests, seed)]
        how = params(new, None) if shared else [params(new, n) for n in range(requests)]
        answers = llm.generate(asked, how, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    return run


def hooked(folder: Path, shape: str, steer: int, most: int) -> Run:
    """Return a function that generates with transformers and a forward hook on the steered layer."""
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

    def run(requests: int, new: int, shared: bool, seed: int) -> int:
        torch.manual_seed(seed)
        vectors.normal_()
        if shared:
            vectors[:] = vectors[:1].clone()
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
    parser.add_argument("--batches", type=batch, nargs="+", default=[(256, 256, False)])
    parser.add_argument("--warm-up", type=int, default=0, help="new tokens of the warm-up; 0: as many as are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report = Report(args.out, peer=args.peer, shape=args.shape, prompt=PROMPT)
    with tempfile.TemporaryDirectory() as scratch:
        steer = write_model(args.shape, Path(scratch))
        run = {"lens": lens, "transformers": hooked}[args.peer](
            Path(scratch), args.shape, steer, max(requests for requests, _, _ in args.batches)
        )
        report.add(started=True)
        measured: dict[str, Any] = {}
        for requests, new, shared in args.batches:
            run(requests, args.warm_up or new, shared, 0)
            values: list[float] = []
            for repeat in range(args.repeats):
                begin = time.perf_counter()
                tokens = run(requests, new, shared, repeat + 1)
                values.append(tokens / (time.perf_counter() - begin))
                measured[f"{requests} of {new} new tokens{', one vector' * shared}"] = {
                    "tokens_per_second": [round(v) for v in values],
                    "median": round(statistics.median(values)),
                    "spread": round((max(values) - min(values)) / statistics.median(values), 4),
                }
                report.add(tokens_per_second=measured)


if __name__ == "__main__":
    main()
