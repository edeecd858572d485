"""The Python interface: names, loops, runs as objects, labelled activations, and text that stays text."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from steerback.engines.base import finish


def test_work_is_finished_with_and_without_a_running_event_loop() -> None:
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    async def cell() -> int:
        return finish(double(4))

    assert finish(double(3)) == 6
    assert asyncio.run(cell()) == 8


def test_an_error_inside_a_running_event_loop_is_raised_as_it_is() -> None:
    async def fail() -> None:
        raise ValueError("as it is")

    async def cell() -> None:
        finish(fail())

    with pytest.raises(ValueError, match="as it is"):
        asyncio.run(cell())


def test_the_stop_button_of_a_notebook_cancels_the_work() -> None:
    ended = []

    async def endless() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook's kernel
        finish(endless())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(cell())
    assert ended == [True]
