"""Tables and book-keeping without vLLM: rows are edited as `interventions.steer` defines, whatever shares the batch."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from steerback.engines.interventions import Site, steer
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.engines.vllm.slots import Arrival, EngineStep, Slots
from steerback.engines.vllm.tables import LayerTable, Shared, steer_layer
from steerback.errors import SteerbackError
from steerback.records import Intervention
from steerback.targets.sae import Kind, Sae
from steerback.targets.target import SaeSource

D, N, LENGTH = 16, 40, 24
SITE = Site(n_layers=3, d_model=D, steer_layer=0, sae_layer=0, read_layer=1, n_latents=N, directions=("north",))


class Layer(nn.Module):
    """Stands for a decoder layer: the residual stream comes out in two parts."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


class Worker:
    """What a vLLM worker does, without vLLM: two steered layers and the slots."""

    def __init__(self, kind: Kind, rows: int = 6, columns: int = 20, poolers: int = 2) -> None:
        self.sae: Sae = small.sae(kind, D, N, layer=1)
        self.north = {"north": torch.linspace(-1, 1, D)}
        sizes = (rows, columns, LENGTH * 4, poolers, LENGTH)
        self.settings = TableSettings(SITE, (0, 1), *sizes, "1", "0", SaeSource(""))
        shared = Shared.empty(self.settings, 64, torch.device("cpu"))
        cpu, pooled = torch.device("cpu"), self.settings.pooled_layers
        tables = {n: LayerTable.empty(self.settings, cpu, 64 if n in pooled else 0) for n in (0, 1)}
        self.layers = {n: Layer() for n in (0, 1)}
        for n, layer in self.layers.items():
            steer_layer(layer, shared, tables[n], self.settings, self.sae)
        self.slots = Slots(self.settings, shared, tables, self.sae, self.north, self.sae)

    def step(self, parts: list[tuple[str, Tensor, int]]) -> dict[tuple[str, int], Tensor]:
        """Sends (request, residuals (T, d), first position) through both layers as one batch; returns what leaves."""
        counts = np.array([len(h) for _, h, _ in parts])
        before = np.array([first for *_, first in parts])
        self.slots.step(EngineStep([request for request, *_ in parts], counts, before))
        positions = torch.cat([torch.arange(len(h)) + first for _, h, first in parts])
        h = torch.cat([h for _, h, _ in parts])
        out = {}
        for n, layer in self.layers.items():
            hidden, residual = layer(positions, h * 0.25, h * 0.75)
            for (request, *_), part in zip(parts, (hidden + residual).split(counts.tolist()), strict=True):
                out[request, n] = part
        self.slots.after()
        return out


@st.composite
def edits(draw: Any) -> tuple[Intervention, ...]:
    out = []
    for layer in (0, 1):
        positions = draw(st.sampled_from(["all", "prompt", "generated"]))
        for latent in draw(st.lists(st.one_of(st.integers(0, N - 1), st.just("north")), max_size=2)):
            out.append(Intervention("add", latent, draw(st.floats(-5, 5)), positions, layer))
        for latent in draw(st.lists(st.integers(0, N - 1), max_size=3, unique=True)):
            mode = draw(st.sampled_from(["clamp", "scale"]))
            out.append(Intervention(mode, latent, draw(st.floats(-2, 4)), positions, layer))
    return tuple(out)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@given(plans=st.lists(st.tuples(edits(), st.integers(1, 12)), min_size=1, max_size=9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_rows_are_edited_as_defined_and_used_again(
    kind: Kind, plans: list[tuple[tuple[Intervention, ...], int]], seed: int
) -> None:
    """Requests come and go in three rounds through the same rows; texts arrive in chunks of their own."""
    worker, draw = Worker(kind), torch.Generator().manual_seed(seed)
    for turn in range(0, len(plans), 3):
        group = {f"r{turn + n}": plan for n, plan in enumerate(plans[turn : turn + 3])}
        tickets = {k: Ticket(k, e, (5, 9) if n == 0 else (), 1, LENGTH) for n, (k, (e, _)) in enumerate(group.items())}
        worker.slots.admit([Arrival(k, t.as_args(), group[k][1], 0) for k, t in tickets.items()])
        text = {k: torch.randn(LENGTH, D, generator=draw) for k in group}
        got: dict[tuple[str, int], list[Tensor]] = {}
        for first in (0, 9, 10, 17):
            last = {0: 9, 9: 10, 10: 17, 17: LENGTH}[first]
            parts = [(k, h[first:last], first) for k, h in text.items()] + [("plain", torch.randn(3, D), 0)]
            for key, part in worker.step(parts).items():
                got.setdefault(key, []).append(part)
        found = worker.slots.fetch([(k, LENGTH) for k in group], records=True)
        for k, (plan, prompt) in group.items():
            for layer in (0, 1):
                wanted = steer(text[k].double(), plan, layer, prompt, SITE, worker.sae, worker.north)
                torch.testing.assert_close(torch.cat(got[k, layer]).double(), wanted, atol=2e-5, rtol=1e-5)
            check_receipt(worker, plan, prompt, text[k], found[k][0])
        first_key = next(iter(group))
        record = np.frombuffer(found[first_key][0]["record"], dtype=np.float32).reshape(LENGTH, 2)
        wanted_record = worker.sae.encode(text[first_key], [5, 9]).numpy()
        np.testing.assert_allclose(record, wanted_record, atol=1e-5)
    assert worker.slots.state() == Worker(kind).slots.state(), "something was not given back"


def check_receipt(
    worker: Worker, plan: tuple[Intervention, ...], prompt: int, text: Tensor, entry: dict[str, Any]
) -> None:
    kinds = {i.positions for i in plan}
    assert entry["prompt"] == (prompt if kinds & {"all", "prompt"} else 0)
    assert entry["generated"] == (LENGTH - prompt if kinds & {"all", "generated"} else 0)
    total = sum(
        (steer(text.double(), plan, n, prompt, SITE, worker.sae, worker.north) - text.double()).norm(dim=1).sum()
        for n in (0, 1)
    )
    count = entry["prompt"] + entry["generated"]
    assert entry["norm"] == pytest.approx(float(total) / count if count else 0.0, rel=1e-3, abs=1e-4)


def test_a_preempted_request_keeps_its_row_and_counts_each_position_once() -> None:
    worker = Worker("relu")
    edit = (Intervention("add", 3, 2.0),)
    arrival = Arrival("a", Ticket("a", edit, (1,), 1, LENGTH).as_args(), 6, 0)
    worker.slots.admit([arrival])
    text = torch.randn(LENGTH, D)
    worker.step([("a", text[:10], 0)])
    worker.slots.idle()
    worker.slots.admit([Arrival("a", arrival.args, 6, 4)])  # comes again, four positions out of the cache
    worker.step([("a", text[4:12], 4)])
    entry = worker.slots.fetch([("a", 12)], records=True)["a"][0]
    assert (entry["prompt"], entry["generated"]) == (6, 6)
    record = np.frombuffer(entry["record"], dtype=np.float32)
    np.testing.assert_allclose(record, worker.sae.encode(text[:12], [1])[:, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "boundary", "wanted"),
    [
        ("all", None, (6, 2)),
        ("generated", None, (0, 2)),
        ("prompt", None, (6, 0)),
        ("all", 3, (3, 5)),
        ("generated", 3, (0, 5)),
        ("prompt", 3, (3, 0)),
    ],
)
def test_positions_out_of_the_cache_count_only_where_they_are_edited(
    positions: Any, boundary: int | None, wanted: tuple[int, int]
) -> None:
    """Also generated positions that were resubmitted as part of a prompt: with `boundary`, the prompt ends there."""
    worker = Worker("relu")
    for key in ("a", "b"):  # the second finds the first one's row
        edit = (Intervention("add", 3, 2.0, positions),)
        worker.slots.admit([Arrival(key, Ticket(key, edit, prompt=boundary).as_args(), 6, 4)])
        worker.step([(key, torch.randn(4, D), 4)])
        entry = worker.slots.fetch([(key, 8)], records=False)[key][0]
        assert (entry["prompt"], entry["generated"]) == wanted
        fresh = (wanted[0] if boundary is None else 0) if positions == "prompt" else 1
        assert entry["norm"] == pytest.approx(2.0 if fresh else 0.0, rel=1e-5)


def test_a_step_that_skips_a_position_shows_in_the_receipt() -> None:
    worker = Worker("relu")
    worker.slots.admit([Arrival("a", Ticket("a", (Intervention("add", 3, 2.0),)).as_args(), 6, 0)])
    worker.step([("a", torch.randn(5, D), 0)])
    worker.step([("a", torch.randn(2, D), 6)])
    entry = worker.slots.fetch([("a", 8)], records=False)["a"][0]
    assert (entry["prompt"], entry["generated"]) == (5, 2)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("how", ["max", "mean", "active"])
def test_pooling_over_the_whole_sae(how: Any, layer: int) -> None:
    """In chunks, with part of them computed again after a preemption, beside another request; clamps act at 0."""
    worker, text = Worker("topk"), torch.randn(20, D)
    worker.slots.admit([Arrival("t", Ticket("t", layer=layer, pool=((2, 5), (9, 20)), how=how).as_args(), 20, 0)])
    worker.step([("x", torch.randn(3, D), 0), ("t", text[:11], 0)])
    worker.step([("t", text[8:14], 8)])
    worker.step([("t", text[14:], 14)])
    entry = worker.slots.fetch([("t", 20)], records=True)["t"][0]
    z = worker.sae.encode(text[[*range(2, 5), *range(9, 20)]])
    wanted = {"max": z.amax(dim=0), "mean": z.mean(dim=0), "active": (z > 0).float().mean(dim=0)}[how]
    np.testing.assert_allclose(np.frombuffer(entry["pooled"], dtype=np.float32), wanted.numpy(), atol=1e-5)


def test_a_worker_that_does_not_pool_computes_the_text_and_answers() -> None:
    """Under tensor parallelism only the first worker pools; another that failed would leave the first one waiting."""
    worker, text = Worker("relu", poolers=0), torch.randn(20, D)
    worker.slots.admit([Arrival("t", Ticket("t", pool=((2, 5),)).as_args(), 20, 0)])
    worker.step([("t", text, 0)])
    (entry,) = worker.slots.fetch([("t", 20)], records=False)["t"]
    assert (entry["prompt"], entry["generated"]) == (0, 0)
    assert worker.slots.state() == Worker("relu", poolers=0).slots.state()


def test_salt_separates_what_is_computed_differently_and_joins_what_is_not() -> None:
    add = Intervention("add", 3, 2.0)
    late = Intervention("add", 3, 2.0, "generated")
    assert Ticket("a").salt(5) is None
    assert Ticket("a", (add,)).salt(5) == Ticket("b", (add,)).salt(9)
    assert Ticket("a", (late,)).salt(5) != Ticket("a", (late,)).salt(6)
    salts = {Ticket("a", e).salt(5) for e in ((add,), (late,), (Intervention("add", 3, 2.5),), (add, add))}
    assert len(salts) == 4
    assert Ticket("a", (add,), (1,)).salt(5) != Ticket("b", (add,), (1,)).salt(5)


def test_tickets_and_settings_survive_the_journey() -> None:
    import json

    ticket = Ticket("a", (Intervention("add", "north", 2.0, "prompt", 1),), (4, 2), 1, 30, 7, ((1, 3),))
    assert Ticket.from_args(json.loads(json.dumps(ticket.as_args()))) == ticket
    sizes = Worker("relu").settings
    assert pickle.loads(pickle.dumps(sizes)) == sizes


def test_settings_that_compile_to_the_same_graph_share_a_hash() -> None:
    sizes = replace(Worker("relu").settings, kind="relu")
    other = replace(sizes, sae=SaeSource("elsewhere"), directions="north.safetensors", site=replace(SITE, n_latents=7))
    assert sizes.compute_hash() == other.compute_hash()
    topk = replace(sizes, kind="topk", k=3)
    different = (
        replace(sizes, rows=7),
        replace(sizes, columns=21),
        replace(sizes, length=LENGTH + 1),
        replace(sizes, layers=(0, 2)),
        replace(sizes, poolers=0),
        replace(sizes, sae=None, kind=None),
        topk,
        replace(topk, k=4),
        replace(topk, site=replace(SITE, n_latents=7)),
    )
    assert len({s.compute_hash() for s in (sizes, *different)}) == len(different) + 1


def test_a_layer_without_positions_is_refused() -> None:
    class Blind(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    worker = Worker("relu")
    with pytest.raises(SteerbackError, match="Blind"):
        steer_layer(Blind(), worker.slots.shared, worker.slots.tables[0], worker.settings, None)
