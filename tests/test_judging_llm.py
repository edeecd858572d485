"""LLM judges with the real client libraries: keys, budgets and faults."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fake_judges import RESTART, FakeJudge
from steerback.errors import SteerbackError
from steerback.judging import ALIASES, Judge, JudgeItem, make_judge
from steerback.judging.models import check_key, model_string, read_dotenv, redact
from steerback.judging.transport import Limits, Transport
from steerback.records import Judgement

pytest.importorskip("inspect_ai")
KEY = "sk-planted-0123456789"
PROTOCOLS = (
    ("anthropic/claude-sonnet-4-5-20250929", ""),
    ("openrouter/qwen/qwen3-32b", "/v1"),
    ("google/gemini-2.5-flash", ""),
)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ANTHROPIC_API_KEY", "OPENROUTER_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.chdir(tmp_path)


def items(n: int) -> list[JudgeItem]:
    return [
        JudgeItem(
            f"k{i}", "How do you fry an egg?", f"Item {i} flows like lava. {RESTART} Put oil {i} in the pan.", "lava"
        )
        for i in range(n)
    ]


def run(judge: Judge, asked: list[JudgeItem]) -> list[tuple[str, Judgement]]:
    async def collect() -> list[tuple[str, Judgement]]:
        return [pair async for pair in judge.judge(asked)]

    return asyncio.run(collect())


def judge_for(model: str, url: str, **limits: Any) -> Any:
    quick: dict[str, Any] = {"first_wait": 0.01, "attempt_timeout": 2, "max_retries": 2} | limits
    return make_judge(model, Limits(**quick), base_url=url)


# --- keys, names, options ----------------------------------------------------------------------------------------


def test_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, model in (
        ("ANTHROPIC_API_KEY", "sonnet-4.5"),
        ("OPENROUTER_API_KEY", "gpt-5-mini"),
        ("GOOGLE_API_KEY", "gemini-2.5-flash"),
        ("OPENAI_API_KEY", "openai/gpt-5-mini"),
    ):
        monkeypatch.delenv(variable, raising=False)
        with pytest.raises(SteerbackError, match=variable):
            make_judge(model)


def test_own_service_needs_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteerbackError, match="LAB_BASE_URL"):
        check_key("openai-api/lab/some-model", {})
    check_key("openai-api/lab/some-model", {"LAB_BASE_URL": "http://x", "LAB_API_KEY": "k"})
    check_key("vllm/some-model", {})


def test_keys_come_from_dotenv_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text('# comment\nexport A_API_KEY="one"\nB_API_KEY=two\n', encoding="utf-8")
    found: dict[str, str] = {"B_API_KEY": "kept"}
    read_dotenv(tmp_path / ".env", found)
    assert found == {"A_API_KEY": "one", "B_API_KEY": "kept"}


def test_a_dotenv_file_may_set_keys_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ANTHROPIC_BASE_URL=http://elsewhere\nPYTHONPATH=/tmp\nOPENAI_API_KEY=k\n", encoding="utf-8")
    found: dict[str, str] = {}
    read_dotenv(file, found)
    assert found == {"OPENAI_API_KEY": "k"}
    file.write_bytes(b"\x00\xff\xfe binary")
    with pytest.raises(SteerbackError, match=r"\.env (is not a text file|cannot be read as UTF-8)"):
        read_dotenv(file, found)
    file.unlink()
    file.mkdir()
    read_dotenv(file, found)


def test_aliases_cover_the_specified_judges() -> None:
    models = {a.alias: a.model for a in ALIASES}
    assert models["sonnet-4.5"] == "anthropic/claude-sonnet-4-5-20250929"
    assert len(models) == 5
    assert model_string("sonnet-4.5") == models["sonnet-4.5"]
    assert model_string("nonsense") is None


def test_secrets_are_taken_out_of_messages() -> None:
    assert KEY not in redact(f"Incorrect API key provided: {KEY}.")


def test_unknown_price_refuses_a_cost_budget() -> None:
    with pytest.raises(SteerbackError, match="--judge-price"):
        make_judge("openai/some-model", Limits(max_cost=1.0))
    make_judge("openai/some-model", Limits(max_cost=1.0, price=(1.0, 2.0)))


def test_fingerprint_depends_on_model_rubric_and_temperature() -> None:
    prints = {
        make_judge("sonnet-4.5").fingerprint,
        make_judge("haiku-4.5").fingerprint,
        make_judge("sonnet-4.5", temperature=0.5).fingerprint,
    }
    assert len(prints) == 3
    assert make_judge("sonnet-4.5").fingerprint == make_judge("sonnet-4.5", Limits(max_calls=3)).fingerprint
    assert "attempts" in str(make_judge("sonnet-4.5").describe()["rubric text"])


# --- mockllm -----------------------------------------------------------------------------------------------------


def test_mock_model_scores_and_counts_tokens() -> None:
    from inspect_ai.model import ModelOutput, ModelUsage

    from fake_judges import verdict

    def answer(messages: Any, *rest: Any) -> ModelOutput:
        output = ModelOutput.from_content("mockllm/model", verdict(messages[-1].text))
        output.usage = ModelUsage(input_tokens=100, output_tokens=20, total_tokens=120)
        return output

    from steerback.judging.llm import LLMJudge

    transport = Transport("mockllm/model", Limits(price=(1.0, 10.0)), model_args={"custom_outputs": answer})
    judge = LLMJudge("mock", transport)
    found = dict(run(judge, [*items(3), JudgeItem("blank", "p", " ")]))
    assert [found[f"k{i}"].status for i in range(3)] == ["scored"] * 3
    assert found["blank"].status == "empty"
    assert len(found["k0"].attempts) == 2
    assert all(a.gated for a in found["k0"].attempts)
    spend = judge.transport.spend()
    assert (spend.calls, spend.input_tokens, spend.output_tokens) == (3, 300, 60)
    assert spend.cost == pytest.approx(3 * (100 * 1e-6 + 20 * 10e-6))


# --- over HTTP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "suffix"), PROTOCOLS)
def test_happy_path_over_each_protocol(model: str, suffix: str) -> None:
    with FakeJudge() as server:
        judge = judge_for(model, server.url + suffix)
        before = judge.estimate(items(5))
        found = dict(run(judge, items(5)))
        again = dict(run(judge, items(1)))  # a second event loop
        carried = json.dumps(server.requests)
    assert {v.status for v in (found | again).values()} == {"scored"}
    for item in items(5):
        first, second = found[item.key].attempts
        assert item.response[second.start :].startswith(RESTART)
        assert (first.score, second.score) == (5.0, 10.0)
    assert before.calls == 5
    assert before.input_tokens > 500
    assert judge.transport.spend().calls == 6
    assert KEY not in carried
    sent = judge.describe()["temperature sent"]
    assert sent == 0 if "anthropic" not in model else sent is None  # its present API takes none, and we say so


@pytest.mark.parametrize("fault", ["refusal", "malformed", "hallucinated", "out of range"])
@pytest.mark.parametrize(("model", "suffix"), PROTOCOLS)
def test_unusable_answers_are_unscored(model: str, suffix: str, fault: str) -> None:
    reasons = {"refusal": "refused", "malformed": "malformed", "hallucinated": "first words", "out of range": "0-100"}
    with FakeJudge(lambda response, before: fault) as server:
        verdict = run(judge_for(model, server.url + suffix), items(1))[0][1]
    assert verdict.status == "unscored"
    assert reasons[fault] in verdict.reason


@pytest.mark.parametrize("fault", ["429", "500", "timeout", "truncated"])
@pytest.mark.parametrize(("model", "suffix"), PROTOCOLS)
def test_transport_faults_are_retried(model: str, suffix: str, fault: str) -> None:
    with FakeJudge(lambda response, before: fault if before == 0 else "", stall=4) as server:
        judge = judge_for(model, server.url + suffix)
        verdict = run(judge, items(1))[0][1]
    assert verdict.status == "scored", verdict.reason
    assert judge.transport.spend().calls == 1


def test_a_fault_that_stays_is_unscored_without_the_key() -> None:
    with FakeJudge(lambda response, before: "429") as server:
        found = run(judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1", max_retries=1), items(2))
    assert {v.status for _, v in found} == {"unscored"}
    assert all("call failed" in v.reason and KEY not in v.reason for _, v in found), found


def test_nobody_listening_is_unscored() -> None:
    found = run(judge_for("openrouter/qwen/qwen3-32b", "http://127.0.0.1:9/v1", max_retries=1), items(1))
    assert found[0][1].status == "unscored"


def test_a_model_that_takes_no_temperature_is_asked_without() -> None:
    seen: list[str] = []

    def fault(response: str, before: int) -> str:
        seen.append(response)
        return "temperature" if before == 0 else ""

    with FakeJudge(fault) as server:
        judge = judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1")
        before = judge.fingerprint
        assert run(judge, items(1))[0][1].status == "scored"
        assert "temperature" in server.requests[0]
        assert "temperature" not in server.requests[1]
    assert judge.describe()["temperature sent"] is None
    assert judge.fingerprint == before


def test_budget_of_calls_leaves_the_rest_unscored() -> None:
    with FakeJudge() as server:
        judge = judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1", max_calls=7)
        found = run(judge, items(20))
        asked = sum(server.asked.values())
    counts = Counter(v.status for _, v in found)
    assert asked == counts["scored"] == 7
    assert counts["unscored"] == 13
    assert {v.reason for _, v in found if v.status == "unscored"} == {"budget spent: --max-judge-calls 7"}


def test_concurrent_calls_share_one_connection_one_limit_and_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five calls ask four questions each, of which three may be in flight."""
    opened, flying, most = [], 0, 0
    opens, generate = Transport._open, Transport._generate
    monkeypatch.setattr(Transport, "_open", lambda self: opened.append(1) or opens(self))

    async def counted(self: Transport, model: Any, question: Any) -> Any:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        try:
            return await generate(self, model, question)
        finally:
            flying -= 1

    monkeypatch.setattr(Transport, "_generate", counted)

    async def collect(judge: Judge) -> list[tuple[str, Judgement]]:
        async def one(asked: list[JudgeItem]) -> list[tuple[str, Judgement]]:
            return [pair async for pair in judge.judge(asked)]

        parts = await asyncio.gather(*(one(items(20)[n::5]) for n in range(5)))
        return [pair for part in parts for pair in part]

    with FakeJudge() as server:
        judge = judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1", max_calls=17, concurrency=3)
        found = asyncio.run(collect(judge))
        assert (len(opened), most) == (1, 3)
        assert {key for key, _ in found} == {item.key for item in items(20)}
        assert Counter(v.status for _, v in found) == {"scored": 17, "unscored": 3}
        assert asyncio.run(collect(judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1")))
        assert len(opened) == 2  # closed after the last call, and opened again in another event loop


def test_budget_of_money_is_kept() -> None:
    with FakeJudge() as server:
        judge = judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1", max_cost=0.01, price=(1.0, 10.0))
        found = run(judge, items(40))
    assert 0 < sum(v.status == "scored" for _, v in found) < 40
    assert judge.transport.spend().cost <= 0.01 * 1.05


def test_stopping_early_leaves_no_call_running() -> None:
    async def first(judge: Judge) -> str:
        stream = judge.judge(items(50))
        async for key, _ in stream:
            await stream.aclose()  # type: ignore[attr-defined]
            return key
        return ""

    with FakeJudge() as server:
        assert asyncio.run(first(judge_for("openrouter/qwen/qwen3-32b", server.url + "/v1"))).startswith("k")


def test_environment_is_not_printed_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeJudge() as server:
        judge = judge_for("anthropic/claude-sonnet-4-5-20250929", server.url)
        found = run(judge, items(1))
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err + repr(found) + repr(judge.describe())
    assert os.environ["ANTHROPIC_API_KEY"] == KEY
