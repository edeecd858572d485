"""The thread that feeds vLLM: who is let in, what a cancelled or failed request does to others, how it ends.

A pretended engine stands for vLLM, so that what happens when can be told.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import small

from steerback.engines.vllm import driver as module
from steerback.engines.vllm.driver import Driver, Gate, VllmJob
from steerback.engines.vllm.settings import Ticket
from steerback.records import Intervention

SETTINGS = replace(small.SETTINGS, poolers=0)


class Llm:
    """vLLM with workers that keep a row for each request; requests end when the test says so."""

    def __init__(self) -> None:
        self.rows: set[str] = set()
        self.ends: dict[str, asyncio.Event] = {}
        self.begun, self.fetching, self.let_fetch = threading.Event(), threading.Event(), threading.Event()
        self.let_fetch.set()
        self.lost: set[str] = set()
        self.shut = False

    async def generate(self, prompt: Any, params: Any, key: str, lora_request: Any = None) -> AsyncIterator[Any]:
        self.rows.add(key)
        name = key.partition(":")[2]
        self.ends[name] = asyncio.Event()
        self.begun.set()
        await self.ends[name].wait()
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])], prompt_token_ids=[1])

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "steerback_release":
            self.rows -= set(args[0])
            return [None]
        self.fetching.set()
        while not self.let_fetch.is_set():
            await asyncio.sleep(0)
        wanted = [key for key, _ in args[0]]
        entry = {"prompt": 1, "generated": 1, "norm": 1.0}
        out = {key: [entry] if key in self.rows and key.partition(":")[2] not in self.lost else [] for key in wanted}
        self.rows -= set(wanted)
        return [out]

    def shutdown(self, timeout: float = 0) -> None:
        self.shut = True


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Llm:
    fake: Any = ModuleType("vllm")
    fake.SamplingParams = SimpleNamespace
    fake.sampling_params = ModuleType("vllm.sampling_params")
    fake.sampling_params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=1)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", fake.sampling_params)
    return Llm()


@pytest.fixture
def driver(llm: Llm) -> Iterator[Driver]:
    made = Driver(SETTINGS, lambda: llm).ready()
    yield made
    made.close()


def begin(driver: Driver, llm: Llm, name: str, **ticket: Any) -> Future[Any]:
    """Submits a job and waits until vLLM has it."""
    llm.begun.clear()
    future = driver.submit(VllmJob(Ticket(name, (Intervention("add", 1, 1.0),), **ticket), (1,), {}))
    assert llm.begun.wait(10)
    return future


def end(driver: Driver, llm: Llm, *names: str) -> None:
    async def tell() -> None:
        for name in names:
            llm.ends[name].set()

    driver.wait(tell())


def until(driver: Driver, true: Callable[[], bool]) -> None:
    """Lets the driver's thread go on until something is true in it."""

    async def look() -> None:
        while not true():
            await asyncio.sleep(0)

    driver.wait(look())


def test_a_request_cancelled_before_its_results_are_read_fails_no_other(
    driver: Driver, llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while it waits for the next reading, once while it is being read."""
    monkeypatch.setattr(module, "PAUSE", 1.0)  # as long as others run
    gone, kept, other = (begin(driver, llm, name) for name in ("gone", "kept", "other"))
    end(driver, llm, "gone")
    until(driver, lambda: len(driver._finished) == 1)
    gone.cancel()
    end(driver, llm, "kept", "other")
    assert kept.result(10).entry["generated"] == 1
    assert other.result(10).entry["prompt"] == 1
    llm.let_fetch.clear()
    late, stays = (begin(driver, llm, name) for name in ("late", "stays"))
    llm.fetching.clear()
    end(driver, llm, "late", "stays")
    assert llm.fetching.wait(10)
    late.cancel()
    llm.let_fetch.set()
    assert stays.result(10).entry["generated"] == 1
    driver.close()
    assert not llm.rows


def test_a_lost_receipt_fails_its_own_request(driver: Driver, llm: Llm) -> None:
    llm.lost.add("lost")
    lost, kept = begin(driver, llm, "lost"), begin(driver, llm, "kept")
    end(driver, llm, "lost", "kept")
    assert kept.result(10).entry["generated"] == 1
    with pytest.raises(RuntimeError, match="'0:lost' left 0 receipts in the worker instead of one"):
        lost.result(10)


def test_whoever_waits_behind_a_cancelled_request_gets_its_turn(driver: Driver, llm: Llm) -> None:
    """The first can never enter (nothing is prepared for pooling); the second could at once."""
    stuck = driver.submit(VllmJob(Ticket("stuck", pool=((0, 1),)), (1,), {}))
    llm.begun.clear()
    behind = driver.submit(VllmJob(Ticket("behind", (Intervention("add", 1, 1.0),)), (1,), {}))
    until(driver, lambda: len(driver._gate.waiting) == 2)
    stuck.cancel()
    assert llm.begun.wait(10)
    end(driver, llm, "behind")
    assert behind.result(10).entry["prompt"] == 1


def test_closing_cancels_what_runs_and_gives_its_rows_back(driver: Driver, llm: Llm) -> None:
    running = begin(driver, llm, "running")
    driver.close()
    with pytest.raises(CancelledError):
        running.result(10)
    assert llm.shut
    assert not llm.rows
    driver.close()  # again changes nothing


def test_what_starts_after_an_interrupt_is_ended(llm: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the caller while vLLM goes on starting in the thread."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    made = Driver(SETTINGS, lambda: llm)
    monkeypatch.setattr(made, "_started", SimpleNamespace(result=interrupted))
    with pytest.raises(KeyboardInterrupt):
        made.ready()
    assert llm.shut


def test_an_engine_that_cannot_be_ended_leaves_no_thread(llm: Llm, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Driver(SETTINGS, lambda: llm).ready()

    def fails(timeout: float = 0) -> None:
        raise OSError("no such process")

    monkeypatch.setattr(llm, "shutdown", fails)
    with pytest.raises(OSError, match="no such process"):
        made.close()
    assert not made._thread.is_alive()


def test_gate_never_lets_in_more_than_the_tables_hold() -> None:
    """Jobs with up to ten latents compete for 12 columns and 4 rows; all get their turn, in order."""
    sizes = replace(SETTINGS, rows=4, columns=12)
    entered: list[int] = []

    async def job(gate: Gate, n: int) -> None:
        draw = random.Random(n)
        latents = draw.sample(range(SETTINGS.site.n_latents), draw.randrange(11))
        ticket = Ticket(str(n), tuple(Intervention("clamp", k, 0.0) for k in latents), (1,) if n % 3 == 0 else ())
        await gate.enter(ticket)
        entered.append(n)
        assert gate.running <= 4
        assert len(gate.columns) <= 12
        for _ in range(draw.randrange(5)):
            await asyncio.sleep(0)
        gate.leave(ticket)

    async def run() -> Gate:
        gate = Gate(sizes)
        tasks = [asyncio.create_task(job(gate, n)) for n in range(60)]
        for n in (5, 30):
            await asyncio.sleep(0)
            tasks[n].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return gate

    gate = asyncio.run(run())
    assert entered == sorted(entered)
    assert len(entered) >= 58
    assert (gate.running, len(gate.columns), len(gate.waiting)) == (0, 0, 0)
