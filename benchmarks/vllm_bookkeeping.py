"""CPU time of 256 requests without the model: client, arrival in the worker, steps, results. Needs no GPU.

    OMP_NUM_THREADS=1 python benchmarks/vllm_bookkeeping.py --out benchmarks/results/vllm_bookkeeping.json

CPU milliseconds for all requests together, median of several rounds: salting and packing their tickets in the client;
giving them rows and writing the tables (here in the CPU's own memory); a step that computes another set of tokens than
the one before, and one of the same; reading receipts and recordings. An 8B model takes about 3 seconds for such
requests on an H200, during which most of this happens while the device is busy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm_gpu import CLAMPED, NEW, PROMPT, Report

from steerback.engines.interventions import Site
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.engines.vllm.slots import Arrival, EngineStep, Slots
from steerback.engines.vllm.tables import LayerTable, Shared
from steerback.records import Intervention
from steerback.targets.sae import Sae
from steerback.targets.target import SaeSource

WIDTH, LATENTS, REQUESTS = 4096, 8192, 256


def slots() -> Slots:
    """Return the worker's tables for the 8B shape, on the CPU."""
    decoder, zeros = torch.randn(LATENTS, WIDTH).bfloat16(), torch.zeros(LATENTS)
    sae = Sae("relu", 0, decoder.T, zeros, decoder, torch.zeros(WIDTH), zeros)
    rows = REQUESTS + 32
    site = Site(1, WIDTH, 0, 0, 0, LATENTS)
    settings = TableSettings(site, (0,), rows, 128, 512 * 32, 0, 512, "1", "0", SaeSource(""))
    cpu = torch.device("cpu")
    shared, table = Shared.empty(settings, 8192, torch.bfloat16, cpu), LayerTable.empty(settings, cpu)
    return Slots(settings, shared, {0: table}, sae, {})


def one_round(worker: Slots, edits: tuple[Intervention, ...], record: tuple[int, ...], name: str) -> dict[str, float]:
    """Return the CPU milliseconds of each part."""
    tickets = [
        Ticket(f"{name}/{k}", (Intervention("add", 100 + k, 2.0), *edits), record, 0, PROMPT + NEW)
        for k in range(REQUESTS)
    ]
    keys = [ticket.key for ticket in tickets]
    marks = [time.process_time()]
    packed = [(ticket.salt(PROMPT), ticket.as_args()) for ticket in tickets]
    marks.append(time.process_time())
    worker.admit([Arrival(key, args, PROMPT, 0) for key, (_, args) in zip(keys, packed, strict=True)])
    marks.append(time.process_time())
    worker.step(EngineStep(keys, np.ones(REQUESTS, dtype=int), np.full(REQUESTS, 60)))
    marks.append(time.process_time())
    for _ in range(20):
        worker.step(EngineStep(keys, np.ones(REQUESTS, dtype=int), np.full(REQUESTS, 61)))
    marks.append(time.process_time())
    worker.fetch([(key, PROMPT + NEW - 1) for key in keys], records=True)
    marks.append(time.process_time())
    names = ("client", "arrival", "other step", "same step", "results")
    spent = {what: 1000 * (b - a) for what, a, b in zip(names, marks[:-1], marks[1:], strict=True)}
    return spent | {"same step": spent["same step"] / 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    worker = slots()
    clamps = tuple(Intervention("clamp", k, 0.0) for k in range(CLAMPED))
    report = Report(args.out, requests=REQUESTS, width=WIDTH, clamped=CLAMPED, torch=torch.__version__)
    milliseconds: dict[str, Any] = {}
    kinds = {"add": ((), ()), "add+clamp": (clamps, ()), "add+clamp+record": (clamps, tuple(range(CLAMPED)))}
    for kind, (edits, record) in kinds.items():
        rounds = [one_round(worker, edits, record, f"{kind}/{n}") for n in range(args.rounds + 1)][1:]
        milliseconds[kind] = {what: round(statistics.median(r[what] for r in rounds), 3) for what in rounds[0]}
        report.add(cpu_milliseconds=milliseconds)


if __name__ == "__main__":
    main()
