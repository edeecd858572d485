"""The pipeline stores each planned trial once, whatever engine and judge do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from planted import Held
from steerback.engines.scripted import PlantedModel, ScriptedEngine
from steerback.errors import SteerbackError
from steerback.judging.base import JudgeItem
from steerback.judging.scripted import ScriptedJudge
from steerback.records import Completion, Intervention, Judgement, Request, Sampling, Trial
from steerback.store.cache import Cache
from steerback.store.ledger import Ledger, Row
from steerback.store.progress import Silent
from steerback.study import pipeline
from steerback.study.pipeline import Workbench, carry_out, complete, judge_item, judge_rows


def trials(count: int, **fields: object) -> list[Trial]:
    return [
        Trial(
            **{
                "key": f"t/measure/steered/{i}",
                "target": "t",
                "stage": "measure",
                "condition": "steered",
                "index": i,
                "prompt": f"Explain thing {i % 5}.",
                "seed": 44 + i,
                "latent": i % 7,
                "interventions": (Intervention("add", i % 7, 10.0),),
                **fields,
            }
        )
        for i in range(count)
    ]


def bench(
    folder: Path, engine: ScriptedEngine | None = None, judge: object = None, cache: Cache | None = None
) -> Workbench:
    engine = engine or ScriptedEngine(n_latents=10)
    return Workbench(
        Ledger(folder / "l.sqlite"),
        engine,
        judge or ScriptedJudge(),
        Sampling(),
        Silent(),
        cache,  # type: ignore[arg-type]
    )


def test_rows_come_back_in_the_order_given_and_equal_the_ledger(tmp_path: Path) -> None:
    work, plan = bench(tmp_path, ScriptedEngine(n_latents=10, shuffled=True)), trials(200)
    rows = asyncio.run(complete(work, plan[::-1]))
    assert [r.trial for r in rows] == plan[::-1]
    assert all(r.valid_receipt and r.judgement is not None for r in rows)
    assert rows == work.ledger.rows(judge="scripted")[::-1]
    truth = PlantedModel()
    assert [r.completion.text for r in rows if r.completion] == [truth(t.request(Sampling())) for t in plan[::-1]]


def test_running_again_generates_and_judges_nothing(tmp_path: Path) -> None:
    engine = ScriptedEngine(n_latents=10)
    work, plan = bench(tmp_path, engine), trials(50)
    first = asyncio.run(complete(work, plan))
    assert engine.generated == 50
    assert asyncio.run(complete(work, plan)) == first
    assert engine.generated == 50


def test_a_failure_in_the_middle_keeps_what_was_done_and_goes_on_from_there(tmp_path: Path) -> None:
    plan = trials(50)
    broken = ScriptedEngine(n_latents=10, raise_on=lambda r: r.key.endswith("/30"))
    work = bench(tmp_path, broken)
    with pytest.raises(SteerbackError, match="scripted failure"):
        asyncio.run(complete(work, plan))
    kept = [r for r in work.ledger.rows(judge="scripted") if r.completion is not None]
    assert [r.trial.index for r in kept] == list(range(30))
    whole = ScriptedEngine(n_latents=10)
    work.engine = whole
    rows = asyncio.run(complete(work, plan))
    assert whole.generated == 20
    assert all(r.judgement is not None for r in rows)


def test_a_wrong_receipt_makes_a_trial_invalid_and_it_is_not_judged(tmp_path: Path) -> None:
    work = bench(tmp_path, ScriptedEngine(n_latents=10, fail_receipts=lambda r: r.key.endswith("/3")))
    rows = asyncio.run(complete(work, trials(10)))
    assert [r.trial.index for r in rows if not r.valid_receipt] == [3]
    assert [r.trial.index for r in rows if r.judgement is None] == [3]


def test_an_impossible_request_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    engine = ScriptedEngine(n_latents=5)
    with pytest.raises(SteerbackError, match="latent 5 is outside"):
        asyncio.run(complete(bench(tmp_path, engine), trials(10)))
    assert engine.generated == 0


def test_cache_hits_are_copied_and_the_ledger_is_the_same(tmp_path: Path) -> None:
    plan, cache = trials(60), Cache(tmp_path / "c.sqlite")
    cold_engine, warm_engine = ScriptedEngine(n_latents=10), ScriptedEngine(n_latents=10)
    (tmp_path / "cold").mkdir(), (tmp_path / "warm").mkdir()
    cold = bench(tmp_path / "cold", cold_engine, cache=cache)
    asyncio.run(complete(cold, plan))
    warm = bench(tmp_path / "warm", warm_engine, cache=cache)
    asyncio.run(complete(warm, plan))
    assert (cold_engine.generated, warm_engine.generated) == (60, 0)
    assert warm.ledger.dump() == cold.ledger.dump()
    other = bench(tmp_path, ScriptedEngine(PlantedModel(restart_rate=0.9), n_latents=10), cache=cache)
    asyncio.run(complete(other, plan))
    assert other.engine.generated == 60  # type: ignore[union-attr]


def test_two_trials_that_ask_for_the_same_response_both_get_it(tmp_path: Path) -> None:
    plan, cache = trials(5), Cache(tmp_path / "c.sqlite")
    twins = [Trial(**{**_fields(t), "key": t.key.replace("steered", "again"), "condition": "again"}) for t in plan]
    work = bench(tmp_path, cache=cache)
    asyncio.run(complete(work, plan))
    rows = asyncio.run(complete(work, twins + plan))
    assert [r.completion for r in rows[:5]] == [r.completion for r in rows[5:]]


def test_a_second_judge_is_added_beside_the_first(tmp_path: Path) -> None:
    class Other(ScriptedJudge):
        name = "other"

    work = bench(tmp_path)
    rows = asyncio.run(complete(work, trials(20)))
    work.judge = Other()
    asyncio.run(judge_rows(work, [row.trial.key for row in rows]))
    assert work.ledger.judges() == ["other", "scripted"]
    assert all(r.judgement is not None for r in work.ledger.rows(judge="other"))


def test_a_judge_that_loses_a_response_is_found_out(tmp_path: Path) -> None:
    class Lossy(ScriptedJudge):
        async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
            async for key, judgement in super().judge(items[1:]):
                yield key, judgement

    with pytest.raises(RuntimeError, match="lost 1 responses"):
        asyncio.run(complete(bench(tmp_path, judge=Lossy()), trials(5)))


def test_an_engine_that_answers_what_was_not_asked_is_found_out(tmp_path: Path) -> None:
    class Odd(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, Completion]]:
            async for _, done in super().generate(requests):
                yield "other", done

    class Short(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, Completion]]:
            async for key, done in super().generate(requests[1:]):
                yield key, done

    for engine, words in ((Odd(n_latents=10), "was not requested"), (Short(n_latents=10), "left 1 requests")):
        with pytest.raises(RuntimeError, match=words):
            asyncio.run(complete(bench(tmp_path, engine), trials(5)))


@pytest.mark.parametrize("shuffled", [False, True])
def test_trials_that_follow_from_others_survive_a_kill(tmp_path: Path, shuffled: bool) -> None:
    """Each trial is followed by the next of its latent, five in all; the second engine dies, a third goes on."""
    plan = {t.key: t for t in trials(35)}
    chains = {latent: [t for t in plan.values() if t.latent == latent] for latent in range(7)}

    def follow(rows: Sequence[Row]) -> list[Trial]:
        assert all(r.judgement is not None or not r.valid_receipt for r in rows)
        return [t for r in rows for t in chains[r.trial.latent] if t.index == r.trial.index + 7]  # type: ignore[index]

    def run(folder: Path, **options: object) -> dict[str, Row]:
        folder.mkdir(exist_ok=True)
        engine = ScriptedEngine(
            n_latents=10,
            shuffled=shuffled,
            fail_receipts=lambda r: r.key.endswith("/9"),
            **options,  # type: ignore[arg-type]
        )
        made = bench(folder, engine)
        try:
            asyncio.run(carry_out(made, trials(7), follow=follow, total=35))
        finally:
            rows = {r.trial.key: r for r in made.ledger.rows(judge=made.judge.name)}  # type: ignore[union-attr]
            made.ledger.close()
        return rows

    whole = run(tmp_path / "whole")
    assert set(whole) == set(plan)
    assert [key for key, row in whole.items() if row.judgement is None] == ["t/measure/steered/9"]
    with pytest.raises(SteerbackError, match="scripted failure"):
        run(tmp_path / "killed", raise_on=lambda r: r.key.endswith("/23"))
    assert run(tmp_path / "killed") == whole


def test_a_slow_judge_makes_the_engine_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging overlaps with generation, and the queue between them is bounded."""
    monkeypatch.setattr(pipeline, "FLUSH_ROWS", 1)
    monkeypatch.setattr(pipeline, "QUEUED_BATCHES", 4)
    monkeypatch.setattr(pipeline, "JUDGED_TOGETHER", 2)
    engine, ahead = ScriptedEngine(n_latents=10), list[int]()

    class Slow(ScriptedJudge):
        judged = 0

        async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
            for _ in range(20):
                await asyncio.sleep(0)  # the engine has its turns
            ahead.append(engine.generated - self.judged)
            async for done in super().judge(items):
                self.judged += 1
                yield done

    asyncio.run(complete(bench(tmp_path, engine, Slow()), trials(60)))
    assert len(ahead) > 5  # judged before everything was generated
    assert max(ahead) <= 4 + 4 + 2  # what a judge took, what the queue holds, and what waits to enter it


def test_a_slow_verdict_holds_up_neither_the_trials_after_it_nor_those_that_follow_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 0 gets its verdict once the last trial of another chain is with the judge."""
    monkeypatch.setattr(pipeline, "FLUSH_ROWS", 4)
    plan = trials(35)
    judge = Held(plan[0].key, plan[29].key)

    def follow(rows: Sequence[Row]) -> list[Trial]:
        return [plan[r.trial.index + 7] for r in rows if r.trial.index < 28]

    work = bench(tmp_path, judge=judge)
    asyncio.run(asyncio.wait_for(carry_out(work, plan[:7], follow=follow, total=35), 60))
    assert {r.trial.key for r in work.ledger.rows(judge="scripted") if r.judgement} == {t.key for t in plan}
    (tmp_path / "again").mkdir()
    more = bench(tmp_path / "again", judge=Held(plan[0].key, plan[34].key))
    rows = asyncio.run(asyncio.wait_for(complete(more, plan), 60))
    assert all(r.judgement for r in rows)


def test_existing_responses_are_judged_in_several_batches_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "JUDGE_BATCH", 5)
    work, plan = bench(tmp_path), trials(35)
    rows = asyncio.run(complete(work, plan, judged=False))
    work.judge = Held(plan[0].key, plan[34].key)
    asyncio.run(asyncio.wait_for(judge_rows(work, [row.trial.key for row in rows]), 60))
    assert all(r.judgement for r in work.ledger.rows(judge="scripted"))


def test_the_judge_sees_prompt_and_prefill_but_no_meta_prompt(tmp_path: Path) -> None:
    seen: list[Request] = []

    def script(request: Request) -> str:
        seen.append(request)
        return "[[score 50.0]] text"

    plan = trials(1, meta_prompt="Stay on topic.", prefill="Once, ")
    (row,) = asyncio.run(complete(bench(tmp_path, ScriptedEngine(script, n_latents=10)), plan))
    assert (seen[0].prompt, seen[0].prefill) == ("Explain thing 0. Stay on topic.", "Once, ")
    item = judge_item(row)
    assert (item.prompt, item.response) == ("Explain thing 0.", "Once, [[score 50.0]] text")


def _fields(trial: Trial) -> dict[str, object]:
    return {name: getattr(trial, name) for name in Trial.__dataclass_fields__}
