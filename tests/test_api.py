"""Python interface: names, loops, runs as objects, labelled activations, and text that is never executed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

import steerback as sb
from steerback.api import StudyRun
from steerback.engines.base import finish
from steerback.judging.text import Span
from steerback.report.transcripts import Marks, marked_html


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


@pytest.mark.parametrize("early", [False, True])
def test_the_stop_button_of_a_notebook_cancels_the_work(early: bool) -> None:
    ended = []

    async def endless() -> None:
        try:
            if early:  # in this thread it does not end the other's wait, as if it arrived just before the wait
                signal.raise_signal(signal.SIGINT)
            else:
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


SIZES = {"n_latents": 3, "trials_per_latent": 4, "draws": 100, "calibration": {"max_iterations": 5}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    async def cell() -> StudyRun:
        runs = tmp_path_factory.mktemp("runs")
        settings = {"engine": "scripted", "judge": "scripted", **SIZES}
        return sb.run("esr", "organism", preset="quick", name="a", runs=runs, cached=False, quiet=True, **settings)

    return asyncio.run(cell())


def test_the_package_offers_its_names_and_nothing_else() -> None:
    assert dir(sb) == sb.__all__
    assert {"load_target", "run", "open_run", "paper", "compare", "fork"} <= set(dir(sb))
    assert all(getattr(sb, name) is not None for name in dir(sb))
    code = "import steerback, sys; print({'torch', 'pandas', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_is_read_without_a_model(finished: StudyRun) -> None:
    again = sb.open_run(finished.folder)
    trials = again.trials()
    assert len(trials) == len(again.to_pandas()) == 12
    assert again.trial(trials[5].key).text == trials[5].text
    assert json.loads(json.dumps(again.summary)) == json.loads((finished.folder / "summary.json").read_text())
    assert again.figures
    assert again.figure(again.figures[0]).axes
    with pytest.raises(sb.SteerbackError, match="unknown figure of run a 'x'; choose one of"):
        again.figure("x")
    with pytest.raises(sb.SteerbackError, match="no trial 'x'"):
        again.trial("x")
    for shown in (again, trials[0], again.summary, sb.compare(again, finished), again.tables["table"]):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 250


def test_a_notebook_shows_a_figure_as_an_image(finished: StudyRun) -> None:
    data, facts = finished.figure("figure2")._repr_png_()  # IPython calls it
    assert data.startswith(b"\x89PNG\r\n")
    assert facts["width"] > 0


def test_a_run_compared_with_itself_differs_in_nothing(finished: StudyRun) -> None:
    found = sb.compare(finished, finished.folder)
    (test,) = found.results.pairs.values()
    assert test.pairs == 12
    assert all(t.difference in (0.0, None) for t in test.tests.values())
    assert set(found.to_pandas()["comparison"]) == {"organism: steered"}


def test_html_of_untrusted_text_is_escaped() -> None:
    bad = "<script>alert(1)</script>\x1b[31m"
    shown = marked_html(bad, bad, Marks(bad, [Span(0, 8)], [Span(8, 12)]))
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert shown.count("<mark") == 2


def test_pieces_of_a_marked_text_are_the_text() -> None:
    marks = Marks("One. Two. Wait. Three.", [Span(5, 15)], [Span(10, 15)])
    assert marks.pieces() == [("One. ", None), ("Two. ", "drift"), ("Wait.", "restart"), (" Three.", None)]
