"""Scripted engine and judge: planted rates, receipts and requested failures."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from steerback.engines.base import Engine
from steerback.engines.scripted import PlantedModel, ScriptedEngine
from steerback.errors import SteerbackError
from steerback.judging.base import Judge, JudgeItem
from steerback.judging.scripted import ScriptedJudge
from steerback.records import Completion, Intervention, Judgement, Receipt, Recording, Request, Sampling

PROMPT = "How do you fold a shirt?"


def collect(engine: ScriptedEngine, requests: Sequence[Request]) -> dict[str, Completion]:
    async def run() -> dict[str, Completion]:
        return {key: done async for key, done in engine.generate(requests)}

    return asyncio.run(run())


def judge(done: dict[str, Completion]) -> dict[str, Judgement]:
    async def run() -> dict[str, Judgement]:
        items = [JudgeItem(key, PROMPT, c.text) for key, c in done.items()]
        return {key: verdict async for key, verdict in ScriptedJudge().judge(items)}

    return asyncio.run(run())


def steered(n: int, boost: float = 10.0, *more: Intervention, latent: int = 3) -> list[Request]:
    items = (Intervention("add", latent, boost), *more)
    return [Request(f"r{i}", PROMPT, 44 + i, interventions=items) for i in range(n)]


def verdicts(model: PlantedModel, requests: Sequence[Request]) -> list[Judgement]:
    return list(judge(collect(ScriptedEngine(model), requests)).values())


def test_both_keep_the_protocols() -> None:
    assert isinstance(ScriptedEngine(), Engine)
    assert isinstance(ScriptedJudge(), Judge)


def test_planted_rates_are_recovered() -> None:
    model = PlantedModel(threshold=10, restart_rate=0.3, success_rate=0.75, spread=8)
    found = verdicts(model, steered(2000))
    multi = [v for v in found if len(v.attempts) > 1]
    better = [v for v in multi if v.attempts[-1].score > v.attempts[0].score]
    assert stats.binomtest(len(multi), 2000, 0.3).pvalue > 1e-3
    assert stats.binomtest(len(better), len(multi), 0.75).pvalue > 1e-3
    assert np.mean([v.attempts[0].score for v in found]) == pytest.approx(50, abs=1)
    for v in multi:
        assert v.attempts[1].gated
        assert v.attempts[1].phrase


def test_drift_follows_the_boost() -> None:
    model = PlantedModel(thresholds={3: 20.0}, threshold=5.0, slope=3.0)
    means = [np.mean([v.attempts[0].score for v in verdicts(model, steered(300, b))]) for b in (5, 15, 20, 25, 40)]
    assert means == sorted(means, reverse=True)
    assert means[2] == pytest.approx(50, abs=2)
    assert np.mean([v.attempts[0].score for v in verdicts(model, steered(300, 5.0, latent=4))]) == pytest.approx(
        50, abs=2
    )


def test_unsteered_never_restarts() -> None:
    plain = [Request(f"p{i}", PROMPT, i) for i in range(500)]
    found = verdicts(PlantedModel(restart_rate=1.0), [*plain, *[replace(r, key="z" + r.key) for r in steered(9, 0.0)]])
    assert all(len(v.attempts) == 1 for v in found)


def test_ablation_and_prompts_change_the_rate_in_pairs() -> None:
    model = PlantedModel(restart_rate=0.5, detectors=(1, 2), ablation_effect=0.8, prompt_factors={"careful": 1.8})
    base = collect(ScriptedEngine(model), steered(800))
    ablated = collect(ScriptedEngine(model), steered(800, 10.0, *(Intervention("clamp", k, 0.0) for k in (1, 2))))
    meta = collect(ScriptedEngine(model), [replace(r, prompt=PROMPT + " Be careful.") for r in steered(800)])
    rates = [sum(len(v.attempts) > 1 for v in judge(x).values()) for x in (ablated, base, meta)]
    for n, p in zip(rates, (0.1, 0.5, 0.9), strict=True):
        assert stats.binomtest(n, 800, p).pvalue > 1e-3
    firsts = [[v.attempts[0].score for v in judge(x).values()] for x in (ablated, base, meta)]
    assert firsts[0] == firsts[1] == firsts[2]  # the same draws: only what was planted differs
    random_clamps = collect(ScriptedEngine(model), steered(800, 10.0, Intervention("clamp", 9, 0.0)))
    assert {k: c.text for k, c in random_clamps.items()} == {k: c.text for k, c in base.items()}


def test_receipts_match_unless_they_are_to_fail() -> None:
    requests = [
        *steered(3),
        Request("none", PROMPT, 1),
        Request("part", PROMPT, 1, interventions=(Intervention("add", 1, 2.0, "generated"),)),
    ]
    good = collect(ScriptedEngine(), requests)
    assert all(good[r.key].receipt_matches(r.interventions) for r in requests)
    assert good["none"].receipt == Receipt()
    bad = collect(ScriptedEngine(fail_receipts=lambda r: r.key == "r1"), requests)
    assert [r.key for r in requests if not bad[r.key].receipt_matches(r.interventions)] == ["r1"]


def test_failures_and_order() -> None:
    engine = ScriptedEngine(raise_on=lambda r: r.key == "r2")
    with pytest.raises(SteerbackError, match="request 'r2': scripted failure"):
        collect(engine, steered(5))
    assert engine.generated == 2
    assert list(collect(ScriptedEngine(), steered(5))) == ["r0", "r1", "r2", "r3", "r4"]
    assert list(collect(ScriptedEngine(shuffled=True), steered(20))) != [f"r{i}" for i in range(20)]
    with pytest.raises(SteerbackError, match="latent 5000 is outside"):
        collect(ScriptedEngine(), steered(1, latent=5000))
    with pytest.raises(SteerbackError, match="max_new_tokens -1 is out of range"):
        collect(ScriptedEngine(), [replace(steered(1)[0], sampling=Sampling(max_new_tokens=-1))])
    with pytest.raises(SteerbackError, match="same key"):
        collect(ScriptedEngine(), steered(1) * 2)


def test_other_outcomes_are_planted() -> None:
    model = PlantedModel(empty_rate=0.2, unscored_rate=0.2, degraded_rate=0.2)
    done = collect(ScriptedEngine(model), steered(600))
    found = judge(done)
    states = [v.status for v in found.values()]
    assert all(100 < states.count(s) < 150 for s in ("empty", "unscored"))
    assert 90 < sum("stone stone stone stone stone" in c.text for c in done.values()) < 150


def test_spans_lie_in_the_text_and_gating_sees_a_missing_phrase() -> None:
    text = "[[score 20.0]] Shoes. Wait, that is not right. [[score 90]] A shirt. [[score 50.5]] More."
    verdict = ScriptedJudge().read(text)
    assert [a.score for a in verdict.attempts] == [20, 90, 50.5]
    assert [a.gated for a in verdict.attempts] == [True, True, False]
    assert [text[a.start : a.end] for a in verdict.attempts] == [
        "[[score 20.0]] Shoes. ",
        "Wait, that is not right. [[score 90]] A shirt. ",
        "[[score 50.5]] More.",
    ]
    assert ScriptedJudge().read("nothing").status == "unscored"


def test_functions_and_whole_completions_can_be_scripts() -> None:
    fixed = Completion("x", (1,), 3, "length", Receipt())
    engine = ScriptedEngine(lambda r: fixed if r.seed == 1 else f"seed {r.seed}")
    done = collect(engine, [Request("a", "p", 1), Request("b", "p", 2, record=Recording((4, 5)))])
    assert done["a"] is fixed
    assert done["b"].text == "seed 2"
    assert done["b"].activations.shape == (done["b"].prompt_tokens + len(done["b"].token_ids) - 1, 2)


def test_activations_have_planted_detectors() -> None:
    engine = ScriptedEngine(PlantedModel(detectors=(5, 6)), n_latents=200)
    on, off = f"[[score 90]] On {PROMPT} much.", "[[score 10]] On whales much."
    found = engine.activations([PROMPT] * 3, [on, off, ""])
    assert found.shape == (3, 200)
    assert found.dtype == np.float32
    assert (found[0, [5, 6]] == 0).all()
    assert (found[1, [5, 6]] >= 2).all()
    assert not found[2].any()
    assert 0 < (found[0] > 0).mean() < 0.1
    assert np.array_equal(engine.activations([PROMPT], [off], [6, 7]), found[1:2, [6, 7]])
    assert engine.activations([PROMPT], [""], over="words").any()


def test_fingerprint_tells_models_apart() -> None:
    prints = {ScriptedEngine(m).fingerprint for m in (PlantedModel(), PlantedModel(slope=3), str)}
    assert len(prints) == 3
    assert ScriptedEngine(PlantedModel()).fingerprint in prints


def test_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys, asyncio\n"
        "from steerback.engines.scripted import ScriptedEngine\n"
        "from steerback.judging.scripted import ScriptedJudge\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
