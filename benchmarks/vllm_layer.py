"""Device time of steering one layer without vLLM: microseconds of the compiled edit in a CUDA graph.

    python benchmarks/vllm_layer.py --tokens 256 512 --width 4096 --out FILE

`nothing` is the layer without edits (one addition, so that the graph is not empty). The difference is the cost.
A decoding step of an 8B model with 256 requests takes about 11 ms, so 100 microseconds are about one per cent.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm_gpu import CLAMPED, Report

from steerback.engines.interventions import Site
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.engines.vllm.slots import Arrival, EngineStep, Slots
from steerback.engines.vllm.tables import LayerTable, Shared, steer_layer
from steerback.records import Intervention
from steerback.targets.sae import Sae
from steerback.targets.target import SaeSource


class Layer(nn.Module):
    """Stand-in for a decoder layer, with the residual stream in two parts as in vLLM."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + 1, residual


def steered(tokens: int, width: int, columns: int, with_sae: bool, kind: str, device: torch.device) -> tuple[Any, Any]:
    """Return a layer that steers `tokens` requests with one token each."""
    n = 4096
    decoder = torch.nn.functional.normalize(torch.randn(n, width), dim=1)
    zeros = torch.zeros(n)
    sae = Sae("relu", 0, decoder.T.contiguous(), zeros, decoder, torch.zeros(width), zeros)
    site = Site(1, width, 0, 0, 0, n)
    settings = TableSettings(
        site, (0,), tokens + 8, columns, 512 * 32, 0, 512, "1", "0", SaeSource("") if with_sae else None
    )
    shared = Shared.empty(settings, tokens, torch.bfloat16, device)
    table = LayerTable.empty(settings, device)
    layer = Layer()
    steer_layer(layer, shared, table, settings, sae if with_sae else None, reads=False)
    slots = Slots(settings, shared, {0: table}, sae, {})
    clamps = tuple(Intervention("clamp", k, 0.0) for k in range(CLAMPED)) if "clamp" in kind else ()
    record = tuple(range(CLAMPED)) if "record" in kind else ()
    arrivals = [
        Arrival(str(k), Ticket(str(k), (Intervention("add", 100 + k, 2.0), *clamps), record, 0, 512).as_args(), 48, 0)
        for k in range(tokens)
    ]
    import numpy as np

    slots.admit(arrivals)
    slots.step(EngineStep([str(k) for k in range(tokens)], np.ones(tokens, dtype=int), np.full(tokens, 60)))
    return layer, slots


def microseconds(work: Any, inputs: tuple[Tensor, ...], repeats: int = 200) -> float:
    """Return the median time of one replay of the captured graph."""
    fast = torch.compile(work, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for _ in range(3):
            fast(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                fast(*inputs)
        times = []
        for _ in range(repeats):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last) * 100)
    return round(sorted(times)[repeats // 2], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda")
    report = Report(args.out, width=args.width, device=torch.cuda.get_device_name(), torch=torch.__version__)
    costs: dict[str, Any] = {}
    for tokens in args.tokens:
        hidden, residual = torch.randn(2, tokens, args.width, device=device).bfloat16()
        inputs = (torch.full((tokens,), 60, device=device), hidden, residual)
        row = costs[str(tokens)] = {"nothing": microseconds(Layer(), inputs)}
        for tf32 in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for name, columns, with_sae, kind in (
                ("add, no SAE", 0, False, "add"),
                ("add", 128, True, "add"),
                ("add+clamp+record", 128, True, "add+clamp+record"),
                ("add+clamp+record, 32 columns", 32, True, "add+clamp+record"),
            ):
                torch._dynamo.reset()
                layer, _ = steered(tokens, args.width, columns, with_sae, kind, device)
                row[f"{name}{', tf32' if tf32 else ''}"] = microseconds(layer, inputs)
                report.add(microseconds=costs)


if __name__ == "__main__":
    main()
