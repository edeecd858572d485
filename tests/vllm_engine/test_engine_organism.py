"""The built-in model in a whole run on vLLM: its logits, and the rates of the whole ESR experiment.

The model's resistance is planted; that both engines find the same rates is what counts here. Rates of the reference
engine are stored (`organism_esr.json` names the command that gives them), as they take as long again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import EFFECT, INTERPRETED, OPTIONS, near, reference_engine

from steerback.config import build_config
from steerback.engines import make_engine
from steerback.engines.options import VllmOptions
from steerback.jobs import check, execute
from steerback.records import Intervention
from steerback.targets import resolve

pytestmark = pytest.mark.skipif(INTERPRETED, reason="takes long in Triton's interpreter")

STORED = json.loads((Path(__file__).parent / "organism_esr.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """The engine of a run of the ESR experiment, kept open after it, and the run's folder."""
    folder, engines = tmp_path_factory.mktemp("runs"), []

    def make(target: Any, options: Any) -> Any:
        assert isinstance(options, VllmOptions)
        arguments = OPTIONS | {"enforce_eager": True, "max_logprobs": -1}
        engine: Any = make_engine(target, options.model_copy(update={"options": arguments}))
        engines.append((engine, engine.close))
        engine.close = lambda: None
        return engine

    config = build_config("esr", ("organism",), "quick", overrides={"engine": "vllm"})
    execute.run(check.check(config, check.Makers(engine=make)), folder / "vllm")
    ((engine, close),) = engines
    yield engine, folder / "vllm"
    close()


def test_rates_of_the_experiment_are_those_of_the_reference_engine(ran: tuple[Any, Path]) -> None:
    """All intervals overlap, no receipt is wrong, and the model resists: there is something to agree on."""
    summary = json.loads((ran[1] / "summary.json").read_text(encoding="utf-8"))
    found = summary["targets"]["organism"]["conditions"]["steered"]
    assert found["counts"]["invalid"] == 0
    assert found["counts"]["valid"] > 150
    assert found["headline"]["esr_rate"]["low"] > 0.05
    for rate, (low, high) in STORED["intervals"].items():
        mine = found["headline"][rate]
        assert mine["low"] <= high, rate
        assert low <= mine["high"], rate
    assert set(STORED["intervals"]) <= set(found["headline"])


def test_logits_are_those_of_the_reference_engine(ran: tuple[Any, Path]) -> None:
    """Teacher-forced, at boosts around the threshold of its latents."""
    target = resolve("organism")
    reference = reference_engine(target)
    latents = sorted(target.labels())[:4]
    add, clamps = Intervention("add", latents[0], 35.0), [Intervention("clamp", k, 3.0) for k in latents[1:]]
    ids = random.Random(0).choices(range(10, 1500), k=60)
    plain = reference.teacher_forced(ids, (), 20).log_softmax(-1)
    for edits in ((), (add,), tuple(clamps), (add, *clamps)):
        want = reference.teacher_forced(ids, edits, 20).log_softmax(-1)
        near("log-probabilities of the built-in model", ran[0].teacher_forced(ids, edits, 20), want.numpy())
        assert not edits or (want - plain).abs().max() > EFFECT
