"""Rows do not depend on other rows, bit for bit; slots are refilled; receipts and finish reasons are right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from steerback.engines import batch as batch_module
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Completion, Intervention, Recording, Request, Sampling
from tiny import WORDS, collect


def make_requests(n: int, seed: int = 0) -> list[Request]:
    """Requests as different as they can be: length, steering, clamps, recording, sampling."""
    draw = random.Random(seed)
    made = []
    for i in range(n):
        words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 40)))
        items: list[Intervention] = []
        if i % 3:
            items.append(Intervention("add", draw.randrange(64), draw.uniform(1, 6), draw.choice(["all", "generated"])))
        if i % 4 == 1:
            chosen = draw.sample(range(64), draw.randint(1, 20))
            items += [Intervention("clamp", k, draw.uniform(0, 2), layer=draw.choice([None, 1])) for k in chosen]
        sampling = Sampling(
            temperature=draw.choice([0.0, 0.6, 1.0]),
            top_p=draw.choice([1.0, 0.9]),
            repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
            max_new_tokens=draw.randint(1, 40),
        )
        record = Recording(tuple(range(draw.randint(1, 10)))) if i % 5 == 0 else None
        made.append(Request(f"r{i}", words, 44 + i, sampling, tuple(items), record=record))
    return made


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return tiny.engine(rows=16)


@pytest.fixture(scope="module")
def crowd(engine: TransformersEngine) -> tuple[list[Request], dict[str, Completion]]:
    requests = make_requests(40)
    return requests, collect(engine, requests)


def same(a: Completion, b: Completion) -> bool:
    return a == b and (
        (a.activations is None and b.activations is None) or np.array_equal(a.activations, b.activations)
    )


def test_a_response_does_not_depend_on_its_company(
    engine: TransformersEngine, crowd: tuple[list[Request], dict[str, Completion]]
) -> None:
    """Alone, in another order (hence another slot) and among others, the completion is identical, receipt included."""
    requests, together = crowd
    for n in (0, 5, 25, 39):
        assert same(collect(engine, [requests[n]])[requests[n].key], together[requests[n].key])
    shuffled = requests[:]
    random.Random(1).shuffle(shuffled)
    again = collect(engine, [*make_requests(7, seed=9)[3:4], *shuffled[:24]][1:] + shuffled[24:])
    assert all(same(again[r.key], together[r.key]) for r in requests)
    rest = collect(engine, [r for r in requests if int(r.key[1:]) % 3])  # as after a crash
    assert all(same(done, together[key]) for key, done in rest.items())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_cache_for_gpus_gives_the_same_tokens(kind: str) -> None:
    """Greedy, so that the last bits of another order of summation do not matter."""
    requests = [replace(r, sampling=Sampling(0, max_new_tokens=20)) for r in make_requests(12)]
    engine, flat = tiny.engine(kind), tiny.engine(kind)
    flat.shape = replace(flat.shape, page=None)
    done, other = collect(engine, requests), collect(flat, requests)
    assert sum(done[r.key].token_ids == other[r.key].token_ids for r in requests) >= 11
    assert all(other[r.key].receipt_matches(r.interventions) for r in requests)


def test_bfloat16_models_are_steered_in_float32() -> None:
    plain, half = tiny.model(), tiny.model().bfloat16()
    made = tiny.assemble(tiny.target(), half, tiny.tokenizer(), tiny.sae())
    engine = TransformersEngine(made, 8)
    requests = make_requests(10)
    done = collect(engine, requests)
    assert engine.describe()["dtype"] == "bfloat16"
    assert all(done[r.key].receipt_matches(r.interventions) for r in requests)
    ids = engine.runner.prompter.tokens("the cat explains")
    edits = (Intervention("add", 3, 4.0), Intervention("clamp", 5, 1.0))
    exact = tiny.assemble(tiny.target(), plain, tiny.tokenizer(), tiny.sae())
    wanted = TransformersEngine(exact, 8).teacher_forced(ids, edits, 4)
    assert (engine.teacher_forced(ids, edits, 4) - wanted).abs().mean() < 0.05 * wanted.abs().max()


def test_logits_are_equal_bit_for_bit_in_every_slot(engine: TransformersEngine) -> None:
    """Not tokens alone: the numbers behind them, whichever slot, whoever is next to it, however long they are."""
    logits: list[torch.Tensor] = []
    runner = engine.runner
    original = runner.logits
    probe = Request("probe", "the cat explains", 1, Sampling(1.0, max_new_tokens=30), (Intervention("add", 3, 4.0),))
    long = [replace(r, key=f"x{n}", sampling=Sampling(max_new_tokens=80)) for n, r in enumerate(make_requests(20, 3))]

    def trace(company: list[Request], place: int) -> torch.Tensor:
        logits.clear()
        items = [*company[:place], probe, *company[place:]]
        batch = batch_module.DecodingBatch(
            runner, batch_module.Queue(engine._check(items)), engine.shape, engine.sae, {}
        )
        while "probe" not in {s.request.key for s in batch.slots.values()}:
            logits.clear()
            batch._fill() if not batch.slots else batch.advance()
        slot = next(n for n, s in batch.slots.items() if s.request.key == "probe")
        logits.clear()
        with torch.inference_mode():
            for ahead in range(16):
                batch._step(ahead)
        return torch.stack([step[slot] for step in logits])

    runner.logits = lambda hidden: logits.append(original(hidden)) or logits[-1]  # type: ignore[method-assign, func-returns-value]
    try:
        alone = trace([], 0)
        for place in (0, 1, 7, 8, 11, 15):
            # the first round of prefills fills all 16 slots, so `probe` sits elsewhere each time
            assert torch.equal(trace(long[:15], place), alone)
    finally:
        runner.logits = original  # type: ignore[method-assign]


def test_receipts_equal_the_plan(crowd: tuple[list[Request], dict[str, Completion]]) -> None:
    requests, together = crowd
    for request in requests:
        done = together[request.key]
        assert done.receipt_matches(request.interventions)
        assert len(done.token_ids) <= request.sampling.max_new_tokens
        assert (done.receipt.added_norm > 0) == (done.receipt.positions > 0)


def test_a_hook_that_does_not_fire_shows_in_the_receipt(engine: TransformersEngine) -> None:
    request = Request("r", "why a stone", 1, Sampling(max_new_tokens=9), (Intervention("add", 3, 4.0),))
    handle = engine.runner.hooks._handles[2]
    hooks = engine.runner.decoder.layers[2]._forward_hooks
    taken = hooks.pop(handle.id)
    try:
        done = collect(engine, [request])["r"]
    finally:
        hooks[handle.id] = taken
    assert not done.receipt_matches(request.interventions)
    assert done.receipt.positions == 0
    assert collect(engine, [request])["r"].receipt_matches(request.interventions)


def test_padding_and_idle_rows_are_left_alone(engine: TransformersEngine) -> None:
    """Capture what leaves the steered block: rows and positions outside the plan are what arrived."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    original = batch_module.Pass.at_layer

    def spy(self: batch_module.Pass, layer: int, h: torch.Tensor) -> torch.Tensor:
        out = original(self, layer, h)
        if layer == 2 and self.parts:
            steering, where = self.parts[0]
            seen.append((h.clone(), out.clone(), where & steering.tables[2].active if 2 in steering.tables else where))
        return out

    batch_module.Pass.at_layer = spy  # type: ignore[method-assign]
    try:
        items = (Intervention("add", 3, 4.0), Intervention("clamp", 5, 1.0))
        collect(
            engine,
            [
                Request("steered", "why a stone", 1, Sampling(max_new_tokens=9), items),
                Request("plain", "why a stone falls", 1, Sampling(max_new_tokens=20)),
            ],
        )
    finally:
        batch_module.Pass.at_layer = original  # type: ignore[method-assign]
    assert len(seen) > 9
    for h, out, planned in seen:
        assert torch.equal(out[~planned], h[~planned])
        changed = (out != h).any(-1)
        assert torch.equal(changed, planned)


def test_end_tokens_and_stop_strings(engine: TransformersEngine) -> None:
    prompter, ends = engine.runner.prompter, engine.runner.ends
    assert ends == {1}
    requests = [Request(f"e{n}", "water", n, Sampling(1.5, max_new_tokens=150)) for n in range(6)]
    done = collect(engine, requests)
    ended = [c for c in done.values() if c.finish == "stop"]
    assert ended, "no response ended by itself; the test needs another seed"
    for c in done.values():
        assert (c.token_ids[-1] in ends) == (c.finish == "stop")
        assert not set(c.token_ids[:-1]) & ends
        assert c.text == prompter.text(c.token_ids)
        assert c.finish == "stop" or len(c.token_ids) == 150

    free = collect(engine, [Request("free", "water", 3, Sampling(0.9, max_new_tokens=60))])["free"]
    stop = free.text[20:22]
    cut = collect(engine, [Request("cut", "water", 3, Sampling(0.9, max_new_tokens=60, stop=("absent", stop)))])["cut"]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish == "stop"
    n = len(cut.token_ids)
    assert cut.token_ids == free.token_ids[:n]  # the token that completes the stop string is kept ...
    assert stop in prompter.text(cut.token_ids)
    assert stop not in prompter.text(cut.token_ids[:-1])  # ... and none after it
    assert cut.receipt_matches(())


def test_prefill_and_system_are_part_of_the_prompt(engine: TransformersEngine) -> None:
    prompter = engine.runner.prompter
    request = Request("b", "water", 0, Sampling(0, max_new_tokens=9), prefill="how to add")
    assert engine.runner.prompt_of(request) == prompter.tokens("water") + tuple(
        prompter.tokenizer("how to add", add_special_tokens=False)["input_ids"]
    )
    done = collect(engine, [request])["b"]
    assert done.prompt_tokens == len(engine.runner.prompt_of(request))
    forced = engine.teacher_forced([*engine.runner.prompt_of(request), *done.token_ids], (), 1).argmax(-1)
    assert tuple(forced[done.prompt_tokens - 1 : -1].tolist()) == done.token_ids
    spoken = engine.runner.prompter.render("water", system="add numbers")
    assert spoken == "<s><|system|>add numbers\n<|user|>water\n<|assistant|>"
    assert engine.runner.prompter.tokens("water", "x", "s") != engine.runner.prompter.tokens("water", "x")


def test_out_of_memory_halves_the_batch_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny.engine(rows=16)
    before = engine.fingerprint
    calls = {"n": 0}
    original = batch_module.DecodingBatch.advance

    def advance(self: batch_module.DecodingBatch) -> list[tuple[str, Completion]]:
        calls["n"] += 1
        if calls["n"] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self)

    monkeypatch.setattr(batch_module.DecodingBatch, "advance", advance)
    requests = make_requests(30)
    done = collect(engine, requests)
    assert set(done) == {r.key for r in requests}
    assert all(done[r.key].receipt_matches(r.interventions) for r in requests)
    assert engine.describe()["halved_on_out_of_memory"] == ["16 -> 8"]
    assert engine.fingerprint != before
    wanted = collect(tiny.engine(rows=8), requests)
    assert engine.fingerprint == tiny.engine(rows=8).fingerprint
    assert sum(done[k].token_ids == wanted[k].token_ids for k in done) >= len(done) // 2


def test_other_errors_are_not_swallowed(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(self: batch_module.DecodingBatch) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(batch_module.DecodingBatch, "advance", advance)
    with pytest.raises(RuntimeError, match="something else"):
        collect(engine, make_requests(2))


def test_stopping_early_leaves_the_engine_usable(engine: TransformersEngine) -> None:
    requests = make_requests(20)

    async def first(stream: AsyncIterator[tuple[str, Completion]]) -> str:
        async for key, _ in stream:
            return key
        raise AssertionError("nothing came")

    async def cancel() -> None:
        stream = engine.generate(requests)
        await first(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(first(engine.generate(requests)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert collect(engine, []) == {}
    assert same(collect(engine, requests[:1])["r0"], collect(engine, requests)["r0"])


def test_the_event_loop_is_free_while_tokens_are_made(engine: TransformersEngine) -> None:
    async def run() -> int:
        ticks = 0
        done = asyncio.Event()

        async def work() -> None:
            async for _ in engine.generate(make_requests(16)):
                pass
            done.set()

        task = asyncio.create_task(work())
        while not done.is_set():
            await asyncio.sleep(0.001)
            ticks += 1
        await task
        return ticks

    assert asyncio.run(run()) > 3


@pytest.mark.parametrize("rows", [16, 4])
def test_requests_that_arrive_later_give_the_same_responses(
    rows: int, engine: TransformersEngine, crowd: tuple[list[Request], dict[str, Completion]]
) -> None:
    """Some arrive while others run, some once nothing is left to do, and some are longer than all before them."""
    requests, expected = crowd
    ordered = sorted(requests[:24], key=lambda r: r.sampling.max_new_tokens)
    used = engine if rows == 16 else tiny.engine(rows=rows)
    reference = expected if rows == 16 else collect(used, ordered)

    async def run() -> dict[str, Completion]:
        found: dict[str, Completion] = {}

        starts = iter(range(8, 24, 4))

        async def arriving() -> list[Request] | None:
            start = next(starts, None)
            while start is not None and len(found) < (start if start % 8 == 0 else 2):
                await asyncio.sleep(0.001)
            return None if start is None else ordered[start : start + 4]

        async for key, done in used.generate(ordered[:8], arriving):
            assert key not in found
            found[key] = done
        return found

    found = asyncio.run(run())
    assert set(found) == {r.key for r in ordered}
    assert all(same(found[key], reference[key]) for key in found)


def test_an_impossible_request_that_arrives_later_ends_the_stream(engine: TransformersEngine) -> None:
    async def arriving() -> list[Request]:
        return [Request("bad", "the cat", 1, interventions=(Intervention("add", 10_000, 1.0),))]

    async def run() -> None:
        async for _ in engine.generate(make_requests(2), arriving):
            pass

    with pytest.raises(SteerbackError, match="bad"):
        asyncio.run(run())


def test_same_key_twice_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(SteerbackError, match="same key"):
        collect(engine, make_requests(1) * 2)


def test_closed_engine_lets_go() -> None:
    engine = tiny.engine(rows=4)
    collect(engine, make_requests(2))
    engine.close()
    assert engine.sae is None


def test_batches_side_by_side_give_the_same_responses(
    crowd: tuple[list[Request], dict[str, Completion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads share one queue and one model: every response once, and bit for bit what one thread makes."""
    requests, together = crowd
    engine = TransformersEngine(tiny.loaded(), 16, workers=3)
    assert engine.fingerprint == tiny.engine(rows=16).fingerprint
    done = collect(engine, requests)
    assert set(done) == set(together)
    assert all(same(done[key], together[key]) for key in together)

    original, calls = batch_module.DecodingBatch.advance, {"n": 0}

    def advance(self: batch_module.DecodingBatch) -> list[tuple[str, Completion]]:
        calls["n"] += 1
        if calls["n"] in (4, 5):  # two batches run out of memory, at once or one after the other
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self)

    monkeypatch.setattr(batch_module.DecodingBatch, "advance", advance)
    assert set(collect(engine, requests)) == set(together)
    assert engine.shape.rows in (8, 4)
    engine.close()
