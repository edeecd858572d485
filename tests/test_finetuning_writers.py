"""Writers of fine-tuning examples: a judge model, and the model to be trained."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from steerback.data.prompts import load_prompts, load_subjects
from steerback.engines.base import Arriving
from steerback.engines.prompting import Prompter
from steerback.engines.scripted import ScriptedEngine
from steerback.errors import SteerbackError
from steerback.finetuning.synthesize import synthesize, write_pools
from steerback.finetuning.writer import OWN_ACKNOWLEDGEMENTS, PASSAGE, SELF_CORRECTION, SHORT, LlmWriter, OwnWriter
from steerback.judging import Limits
from steerback.judging.prompt import Query
from steerback.judging.restarts import find_restarts
from steerback.judging.transport import Reply
from steerback.records import Completion, Request

PROMPTS = load_prompts("evaluation")


class FakeTransport:
    """Answers like a model; `bad` questions (by number) get a reply that is no use. Counts what it is asked."""

    model = "fake/writer"
    temperature, base_url, limits = 0.8, None, Limits()

    def __init__(self, budget: int = 10**6) -> None:
        self.asked: list[Query] = []
        self.budget = budget

    def corrections(self) -> list[Query]:
        return [question for question in self.asked if question.system == SELF_CORRECTION.system]

    def describe(self) -> dict[str, object]:
        return {"temperature sent": self.temperature}

    async def ask(self, questions: Iterable[tuple[str, Query]]) -> AsyncGenerator[tuple[str, Reply]]:
        for key, asked in questions:
            if len(self.asked) >= self.budget:
                yield key, Reply("", "budget spent: --max-judge-calls", over_budget=True)
                continue
            self.asked.append(asked)
            await asyncio.sleep(0)
            yield key, Reply(self.reply(asked, len(self.asked)))

    def reply(self, asked: Query, number: int) -> str:
        prompt = asked.user.split("<prompt>\n")[1].split("\n</prompt>")[0]
        body = {"verdict": asked.nonce, "answer": f"{prompt} This is done so, way {number}."}
        if asked.system == SELF_CORRECTION.system:
            subject = asked.user.split("<subject>\n")[1].split("\n</subject>")[0]
            body["passage"] = f"Much can be said of {subject}, fact {number}."
            body["acknowledgement"] = "Wait, that's not what you asked."
            if number % 10 == 0:
                body["passage"] = "Nothing of the kind."
            if number % 10 == 5:
                return "I cannot do that."
        return json.dumps(body)


def test_a_model_writes_and_only_what_is_missing_is_asked_again(tmp_path: Path) -> None:
    transport = FakeTransport()
    pools = synthesize(LlmWriter("fake", tmp_path, transport=transport), PROMPTS, 100)  # type: ignore[arg-type]
    assert (len(pools[0].examples), len(pools[1].examples)) == (100, 100)
    assert pools[0].rejects["the off-topic part is not about the subject"] > 5
    assert pools[0].rejects["the reply holds no JSON"] > 5
    assert pools[0].asked == 100 + sum(pools[0].rejects.values())
    assert all("volcanoes" in a.user or "<subject>" in a.user for a in transport.corrections())
    assert len({e.subject for e in pools[0].examples}) >= 40
    stopped, again = tmp_path / "stopped", FakeTransport()
    synthesize(LlmWriter("fake", stopped, transport=FakeTransport(50)), PROMPTS, 100)  # type: ignore[arg-type]
    resumed = synthesize(LlmWriter("fake", stopped, transport=again), PROMPTS, 100)  # type: ignore[arg-type]
    assert len(again.asked) < len(transport.asked) - 40
    assert resumed[0].examples[:30] == pools[0].examples[:30]
    nothing = FakeTransport()
    third = synthesize(LlmWriter("fake", stopped, transport=nothing), PROMPTS, 100)  # type: ignore[arg-type]
    assert nothing.asked == []
    assert third[0].examples == resumed[0].examples


def test_a_budget_ends_the_writing_and_is_said(tmp_path: Path) -> None:
    writer = LlmWriter("fake", tmp_path, transport=FakeTransport(30))  # type: ignore[arg-type]
    corrections, normal = synthesize(writer, PROMPTS, 100)
    assert len(corrections.examples) < 30
    assert corrections.rejects["budget spent: --max-judge-calls"] >= 70
    with pytest.raises(SteerbackError, match="no normal example was usable \\(budget spent"):
        write_pools(tmp_path, (corrections, normal), Prompter(tiny.tokenizer()), {})


def test_the_writers_model_is_asked_at_the_specifications_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "none")
    assert LlmWriter("anthropic/claude-sonnet-4-5", tmp_path).describe()["temperature"] == 0.8
    with pytest.raises(SteerbackError, match="'nobody' is not a model; give provider/model"):
        LlmWriter("nobody", tmp_path)


def test_there_are_many_subjects_none_of_them_near_a_prompt(tmp_path: Path) -> None:
    listed = load_subjects()
    assert len(listed) >= 50
    writer = LlmWriter("fake", tmp_path, transport=FakeTransport())  # type: ignore[arg-type]
    assert all(len(writer.subjects_for(p)) >= 50 for p in PROMPTS)
    (tmp_path / "few.txt").write_text("a: b\nc: d\n", "utf-8")
    few = LlmWriter("fake", tmp_path, subjects=str(tmp_path / "few.txt"), transport=FakeTransport())  # type: ignore[arg-type]
    with pytest.raises(SteerbackError, match="2 off-topic subjects are too few; list at least 50"):
        synthesize(few, PROMPTS, 10)


def test_a_model_writes_its_own_examples(tmp_path: Path) -> None:
    """Passage about the subject, restart that the judge detects, and the model's own answer to the plain prompt."""
    subjects = load_subjects(None)

    def script(request: Request) -> str:
        if request.prompt.endswith(SHORT):
            prompt = request.prompt.removesuffix(SHORT)
            return f"To begin, {prompt.split(maxsplit=1)[1].rstrip('.?')} in number {request.seed} of the steps."
        subject = next(s for s in subjects if request.prompt == PASSAGE.format(subject=s))
        return f"Many people like {subject}.\n\nThere is {' and '.join(subjects[subject])} in number {request.seed}."

    corrections, normal = synthesize(OwnWriter(ScriptedEngine(script)), PROMPTS, 60)
    assert len(corrections.examples) == len(normal.examples) == 60
    for example in corrections.examples:
        assert example.acknowledgement in OWN_ACKNOWLEDGEMENTS
        assert "\n" not in example.response
        assert example.response.startswith(f"Many people like {example.subject}. There is")
        (restart,) = find_restarts(example.response, example.prompt)
        assert restart.start == len(example.passage) + 1
    assert len({example.acknowledgement for example in corrections.examples}) > 6
    again, _ = synthesize(OwnWriter(ScriptedEngine(script)), PROMPTS, 60)
    assert again.examples == corrections.examples


def test_a_part_that_is_cut_off_is_no_example() -> None:
    class Endless(ScriptedEngine):
        async def generate(
            self, requests: Sequence[Request], more: Arriving | None = None
        ) -> AsyncIterator[tuple[str, Completion]]:
            async for key, completion in super().generate(requests, more):
                yield key, replace(completion, finish="length")

    corrections, _ = synthesize(OwnWriter(Endless(lambda request: "A text about eggs.")), PROMPTS, 5)
    assert not corrections.examples
    assert set(corrections.rejects) == {"longer than 256 tokens"}
