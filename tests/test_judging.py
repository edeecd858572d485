"""The offline judge: attempts, spans, scores, gating, and validity on data with known truth."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from steerback.errors import SteerbackError
from steerback.judging import Judge, JudgeItem, References, make_judge, offline
from steerback.judging.gating import gate, opens
from steerback.judging.offline import is_clarifying_question, score_attempt
from steerback.judging.restarts import find_restarts
from steerback.judging.text import hide, sentences
from steerback.organism import corpus
from steerback.records import Attempt, Judgement
from tools.judge.validity import compose, from_segments, measure, references
from tools.organism.documents import make_document

DATA = Path(__file__).parent / "data" / "judging"
LAVA = "Lava pours from the crater. Ash darkened the sky."
SINK = "Pour a kettle of boiling water down the drain. Pump the plunger firmly."


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    return found


def judged(name: str) -> Any:
    data = load(name)
    judge = make_judge("offline")
    judge.prepare(references(data))
    cases = compose(data)
    return measure(cases, judge.judge_batch([c.item for c in cases]))  # type: ignore[attr-defined]


def phrases(text: str, prompt: str = "How do you unclog a sink?") -> list[str]:
    return [text[r.start : r.end] for r in find_restarts(text, prompt)]


@pytest.mark.parametrize(
    "phrase",
    [
        "Wait, that's not right.",
        "Hold on, I drifted.",
        "Actually, scratch that.",
        "Let me start over.",
        "Sorry, back to the question.",
        "Oops, I went off on a tangent.",
        "I should be talking about how to unclog a sink.",
        "Hmm. That isn’t what you asked.",
        "Where was I?",
    ],
)
def test_a_restart_is_found_with_its_span(phrase: str) -> None:
    text = f"{LAVA} {phrase} {SINK}"
    assert phrases(text) == [phrase]


@pytest.mark.parametrize(
    "sentence",
    [
        "Wait until the paint dries.",
        "Actually, this step is optional.",
        "Correct the mistake in the ledger.",
        "She said wait and closed the door.",
        '"Wait, that\'s not right," said the teacher.',
        "The plumber muttered ‘hold on, I drifted’ and left.",
        "If you lose track, start over.",
        "Hold on to the rail.",
        "Breathe in, hold on, and breathe out.",
    ],
)
def test_what_only_looks_like_a_restart_is_none(sentence: str) -> None:
    assert phrases(f"{LAVA} {sentence} {SINK}") == []


def test_restarts_in_a_row_are_one_and_content_between_makes_two() -> None:
    assert phrases(f"{LAVA} Wait. Sorry, I drifted. Let me start over. {SINK}") == [
        "Wait. Sorry, I drifted. Let me start over."
    ]
    assert len(phrases(f"{LAVA} Wait, that's wrong. {LAVA} Hold on, I drifted. {SINK}")) == 2


def test_a_restart_needs_something_before_and_after() -> None:
    assert phrases(f"Wait, that's not right. {SINK}") == []
    assert phrases(f"{LAVA} Wait, that's not right.") == []


def test_inline_restart_starts_at_its_clause() -> None:
    assert phrases(f"The lava flows — wait, no, you asked about sinks. {SINK}")[0].startswith("wait, no")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=400))
def test_any_text_gives_ordered_disjoint_spans(text: str) -> None:
    found = find_restarts(text, text[:40])
    edges = [x for r in found for x in (r.start, r.end)]
    assert edges == sorted(edges)
    assert all(0 <= r.start < r.end <= len(text) for r in found)
    assert len(hide(text)) == len(text)
    assert all(text[s.start : s.end].strip() for s in sentences(text))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([*load("dev")["restarts"][:6], LAVA, SINK, '"', "\n", "..."]), max_size=12))
def test_any_response_is_judged_with_attempts_that_tile_it(parts: list[str]) -> None:
    judge = make_judge("offline")
    judge.prepare(References({"p": [SINK], "q": [LAVA]}))
    text = " ".join(parts)
    verdict = judge.judge_batch([JudgeItem("k", "p", text)])[0]  # type: ignore[attr-defined]
    if verdict.status == "scored":
        attempts = verdict.attempts
        assert attempts[0].start == 0
        assert attempts[-1].end == len(text)
        assert all(a.end == b.start for a, b in pairwise(attempts))
        assert all(0 <= a.score <= 100 and a.gated for a in attempts)
        assert all(text[a.start :].startswith(a.phrase) for a in attempts)


def test_development_data_is_learnt() -> None:
    for name in ("dev", "dev2", "dev3"):
        found = judged(name)
        assert found.recall >= 0.97, found.missed
        assert found.precision >= 0.98, found.alarmed


def test_phrasings_of_earlier_held_out_sets() -> None:
    """Neither set is trained on; the second was written to be hard."""
    first, second = judged("heldout"), judged("heldout2")
    assert first.recall >= 0.96
    assert first.precision >= 0.97
    assert second.recall >= 0.9
    assert second.precision >= 0.94
    assert first.cases + second.cases >= 300


def organism_verdicts(n: int, seed: int, per_prompt: int = 8, labels: bool = True) -> tuple[list[Any], list[Judgement]]:
    rng = random.Random(seed)
    prompts = [t.key for t in corpus.howtos()][:16]
    subjects = [t.key for t in corpus.subjects()]
    known = {p: [make_document(rng, "answer", p, metaprompt=None).response for _ in range(per_prompt)] for p in prompts}
    cases = []
    kinds = {"answer": "on", "off_topic": "off", "garbled": "off", "restart": "restart"}
    for i in range(n):
        prompt, subject = rng.choice(prompts), rng.choice(subjects)
        document = make_document(rng, "drift" if i % 4 else "answer", prompt, other=subject, metaprompt=None)
        parts = [(kinds[s.kind], s.text) for s in document.segments]
        cases.append(from_segments(str(i), prompt, parts, "organism", label=subject if labels else None))
    judge = make_judge("offline")
    judge.prepare(References(known))
    return cases, judge.judge_batch([c.item for c in cases])  # type: ignore[attr-defined]


@pytest.mark.parametrize("labels", [True, False])
def test_scores_follow_the_true_share_on_the_organism(labels: bool) -> None:
    cases, verdicts = organism_verdicts(500, seed=3, labels=labels)
    found = measure(cases, verdicts)
    assert found.recall == 1.0
    assert found.precision == 1.0
    assert found.rank_correlation is not None
    assert found.rank_correlation >= 0.9
    pairs = [
        (share, a.score)
        for case, v in zip(cases, verdicts, strict=True)
        if len(v.attempts) == len(case.attempts)
        for (_, _, share), a in zip(case.attempts, v.attempts, strict=True)
    ]
    assert sum(s for t, s in pairs if t == 1) / sum(t == 1 for t, _ in pairs) > 90
    assert sum(s for t, s in pairs if t == 0) / sum(t == 0 for t, _ in pairs) < 25
    mixed = [(t, s) for t, s in pairs if 0 < t < 1]
    assert spearmanr(*zip(*mixed, strict=True))[0] > 0.6


def test_the_second_offline_judge_is_worth_asking_and_differs() -> None:
    data = load("heldout")
    cases = compose(data)
    verdicts = []
    for name in ("offline", "offline-bayes"):
        judge = make_judge(name)
        judge.prepare(references(data))
        verdicts.append(judge.judge_batch([c.item for c in cases]))  # type: ignore[attr-defined]
        assert {v.judge for v in verdicts[-1]} == {name}
    found = measure(cases, verdicts[1])
    assert found.rank_correlation is not None
    assert found.rank_correlation > 0.75
    assert found.precision > 0.9
    apart = [abs(a.attempts[0].score - b.attempts[0].score) > 10 for a, b in zip(*verdicts, strict=True)]
    assert sum(apart) > 0.1 * len(apart)


def test_garbled_text_scores_low_even_with_the_prompts_own_words() -> None:
    cases, _ = organism_verdicts(1, seed=1)
    prompt = cases[0].item.prompt
    rng = random.Random(0)
    good = make_document(rng, "answer", prompt, metaprompt=None).response
    word = good.split()[0].strip(",.")
    known = {t.key: [make_document(rng, "answer", t.key, metaprompt=None).response for _ in range(8)]
             for t in corpus.howtos()[:12]}  # fmt: skip
    known[prompt] = [make_document(rng, "answer", prompt, metaprompt=None).response for _ in range(8)]
    judge = make_judge("offline")
    judge.prepare(References(known))
    texts = [good, f"{word} {word} {word} {word} {word}.", "zorb quix blat frum dosk plim.", "paint " * 30]
    scores = [v.attempts[0].score for v in judge.judge_batch([JudgeItem("k", prompt, t) for t in texts])]  # type: ignore[attr-defined]
    assert scores[0] > 80
    assert max(scores[1:]) < 10


def test_score_is_monotone_in_evidence_and_bounded() -> None:
    scores = [score_attempt([10, 10, 10], [x, -4.0, 4.0]) for x in (-5.0, -1.0, 0.0, 1.0, 5.0)]
    assert scores == sorted(scores)
    assert scores[0] < 45 < 60 < scores[-1]
    assert score_attempt([], []) == 0
    assert score_attempt([5], [float("-inf")]) == 0


def test_without_references_nothing_is_scored() -> None:
    judge = make_judge("offline")
    item = JudgeItem("k", "How do you fly?", LAVA)
    assert judge.judge_batch([item])[0].status == "unscored"  # type: ignore[attr-defined]
    judge.prepare(References({"another prompt": [SINK]}))
    verdict = judge.judge_batch([item])[0]  # type: ignore[attr-defined]
    assert verdict.status == "unscored"
    assert "reference" in verdict.reason


@pytest.mark.parametrize(
    ("text", "asks"),
    [
        ("Could you clarify what you mean?", True),
        ("I'm not sure I understand. Could you please provide more details?", True),
        ("Sure! What kind of sink do you have?", True),
        (f"{SINK} Do you have a plunger?", False),
        ("Why does this work? Because water is heavy.", False),
        (LAVA, False),
    ],
)
def test_clarifying_questions_are_empty(text: str, asks: bool) -> None:
    assert is_clarifying_question(text) is asks


def test_judge_protocol_fingerprint_and_streaming() -> None:
    judge = make_judge("offline")
    assert isinstance(judge, Judge)
    before = judge.fingerprint
    judge.prepare(References({"p": [SINK]}))
    assert judge.fingerprint != before
    again = make_judge("offline")
    again.prepare(References({"p": [SINK]}))
    assert judge.fingerprint == again.fingerprint
    assert "not comparable" in str(judge.describe())
    items = [JudgeItem(str(i), "p", SINK) for i in range(300)]

    async def collect() -> list[str]:
        return [key async for key, _ in judge.judge(items)]

    assert asyncio.run(collect()) == [i.key for i in items]


def test_unknown_judge_lists_the_choices() -> None:
    with pytest.raises(SteerbackError, match="offline"):
        make_judge("ofline")


def test_gating_needs_the_phrase_at_the_start() -> None:
    text = "Lava flows. “Wait —  that’s  wrong”. Pour water."
    attempts = [Attempt(0, 11, 10.0), Attempt(12, len(text), 90.0, "Wait - that's wrong.")]
    assert [a.gated for a in gate(text, attempts)] == [True, True]
    for phrase in ("I drifted", "", "Pour water"):
        assert not gate(text, [attempts[0], Attempt(12, len(text), 90.0, phrase)])[1].gated
    assert not opens("Wait", "Waiting is hard")


def test_gated_judgement_merges_what_has_no_phrase() -> None:
    text = LAVA + " " + SINK
    made_up = gate(text, [Attempt(0, len(LAVA), 0.0), Attempt(len(LAVA) + 1, len(text), 100.0, "Wait, no")])
    merged = Judgement("j", "r", "scored", made_up).gated_attempts()
    assert len(merged) == 1
    assert 0 < merged[0].score < 100


@pytest.mark.parametrize(
    "loop",
    [
        "that. to. that. if. to. that. that. to. because. that. ",
        "You me me you. Me you, me with you. That me you, me. ",
        "This is the list of the people. This. The list of the people of the list. ",
        "`.`, to, now,, that.`.`.,`., again,,.`,`.`.,.`, now,.`.` ",
    ],
)
def test_loops_of_a_few_words_are_no_restarts(loop: str) -> None:
    """Latents of function words make a model loop; on a real model such loops were nine in ten reported restarts."""
    prompt, start = (
        "Explain how to clean an oven.",
        "To clean an oven, first remove the racks and soak them in the sink. ",
    )
    assert find_restarts(start + loop * 9, prompt) == []
    # a response that notices the loop and begins again is a restart, in spite of the loop before
    noticed = "Sorry, I got stuck there. Let me start over. To clean the oven, mix baking soda with water, spread it "
    noticed += "on the walls, wait for a night, and wipe it off with a wet cloth in the morning."
    last = find_restarts(start + loop * 9 + noticed, prompt)[-1]
    assert last.end > len(start + loop * 9)
    # and so is one whose answer is mostly a formula
    formula = (
        "Wait, that is wrong. The floor's area is \\( A = \\frac{a + b}{2} \\cdot h = 12 \\), and that is all of it."
    )
    assert len(find_restarts(start + formula, prompt)) == 1


def test_responses_that_were_read_before_get_the_same_verdicts_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [c.item for c in compose(load("dev"))][:4]
    many = " ".join(f"The sink number {n} is old." for n in range(60))  # sentences, which are joined to windows
    items.append(replace(items[0], response=many))

    def fresh() -> Any:
        monkeypatch.setattr(offline, "_models", {})
        judge = offline.OfflineJudge()
        judge.prepare(references(load("dev")))
        return judge

    alone = [(fresh().judge_batch([item])[0], fresh()._window_batch([item])[0]) for item in items]
    monkeypatch.setattr(offline, "KEPT", 3)
    judge = fresh()
    batch = [items[0], items[0], items[3], *items, items[3]]
    expected = [alone[items.index(item)] for item in batch]
    for _ in range(2):
        assert judge._window_batch(batch) == [windows for _, windows in expected]
        assert judge.judge_batch(batch) == [verdict for verdict, _ in expected]


def test_the_fingerprint_covers_the_contexts_of_latents_in_any_order() -> None:
    known = references(load("dev"))
    contexts = {3: ("a wave", "a tide"), 12: ("a wall",), "north": ("a pole",)}

    def fingerprint(contexts: dict[Any, tuple[str, ...]]) -> str:
        judge = offline.OfflineJudge()
        judge._references = replace(known, contexts=contexts)
        return judge.fingerprint

    assert fingerprint(contexts) == fingerprint(dict(reversed(contexts.items())))
    others = (
        {},
        contexts | {12: ("a wall", "")},
        contexts | {12: ("a Wall",)},
        contexts | {3: ("a tide", "a wave")},
        {4: contexts[3], 12: contexts[12], "north": contexts["north"]},
    )
    assert len({fingerprint(contexts), *map(fingerprint, others)}) == 1 + len(others)
