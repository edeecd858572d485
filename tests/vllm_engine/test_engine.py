"""The vLLM engine against the reference engine: same logits, recordings and receipts, whatever the batch does."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small import EFFECT, POOLED, TOLERANCE, near

from steerback.api import LoadedTarget
from steerback.engines.vllm.driver import VllmJob
from steerback.errors import SteerbackError
from steerback.records import Completion, Intervention, Prefix, Recording, Request, Sampling, expected_positions

ADD = Intervention("add", 3, 4.0)
CASES: dict[str, tuple[Intervention, ...]] = {
    "add": (ADD,),
    "two additions": (ADD, Intervention("add", 11, -3.0)),
    "clamp": (Intervention("clamp", 5, 3.0), Intervention("clamp", 9, 0.0), Intervention("clamp", 17, -1.0)),
    "add and clamp": (ADD, Intervention("clamp", 3, 1.0), Intervention("clamp", 7, 2.0, layer=1)),
    "scale": tuple(Intervention("scale", k, 0.25) for k in range(30)),
    "scale, clamp and add": (
        ADD,
        Intervention("scale", 3, 3.0),
        *(Intervention("clamp", k, 0.0) for k in range(5, 30)),
    ),
    "prompt": (Intervention("add", 3, 4.0, "prompt"), Intervention("clamp", 8, 2.0, "prompt")),
    "generated": (Intervention("add", 3, 4.0, "generated"), Intervention("clamp", 8, 2.0, "generated")),
    "each its own": (Intervention("add", 3, 4.0, "prompt"), Intervention("add", 4, 3.0, "generated")),
    "many clamps": tuple(Intervention("clamp", k, 0.5 * (k % 3)) for k in range(20, 50)),
}


def tokens(seed: int, n: int) -> list[int]:
    return random.Random(seed).choices(range(5, 36), k=n)


def words(seed: int, n: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=n))


def collect(engine: Any, requests: list[Request]) -> dict[str, Completion]:
    async def run() -> dict[str, Completion]:
        return {key: completion async for key, completion in engine.generate(requests)}

    return asyncio.run(run())


def close_to_reference(pair: Any, ids: list[int], edits: tuple[Intervention, ...], prompt: int) -> float:
    """Asserts that both engines give the same log-probabilities for a text; returns what the edits changed."""
    got = pair.vllm.teacher_forced(ids, edits, prompt)
    want = pair.reference.teacher_forced(ids, edits, prompt).log_softmax(-1).numpy()
    plain = pair.reference.teacher_forced(ids, (), prompt).log_softmax(-1).numpy()
    near("log-probabilities", got, want)
    return float(np.abs(want - plain).max())


def check_all_edits(pair: Any) -> None:
    """Logits, recordings and receipts of every kind of edit equal the reference's."""
    ids = tokens(1, 40)
    assert close_to_reference(pair, ids, (), 15) == 0
    for name, edits in CASES.items():
        assert close_to_reference(pair, ids, edits, 15) > EFFECT, name
    record = Recording((3, 5, 8, 60))
    requests = [
        Request(name, words(2, 20), 0, Sampling(0.0, max_new_tokens=12), edits, record=record)
        for name, edits in CASES.items()
    ]
    check_recordings(pair, requests)


def test_edits_equal_the_reference(pair: Any) -> None:
    check_all_edits(pair)


def check_recordings(pair: Any, requests: list[Request]) -> None:
    """Same tokens, hence same recordings and receipts; a plan that differs from the receipt would show."""
    got, want = collect(pair.vllm, requests), collect(pair.reference, requests)
    for request in requests:
        mine, its = got[request.key], want[request.key]
        assert mine.token_ids == its.token_ids, request.key
        assert mine.text == its.text
        assert mine.finish == its.finish
        assert mine.receipt_matches(request.interventions)
        assert mine.receipt.positions == its.receipt.positions
        assert mine.receipt.added_norm == pytest.approx(its.receipt.added_norm, rel=TOLERANCE)
        near("recorded activations", mine.activations, its.activations)
        assert np.abs(mine.activations).max() > 0.1


def random_request(n: int) -> Request:
    draw = random.Random(n)
    edits: list[Intervention] = []
    for layer in (None, 0):
        positions = draw.choice(["all", "prompt", "generated"])
        if draw.random() < 0.5:
            edits.append(Intervention("add", draw.randrange(96), draw.uniform(-5, 5), positions, layer))
        for latent in draw.sample(range(96), draw.choice([0, 0, 1, 3])):
            edits.append(Intervention(draw.choice(["clamp", "scale"]), latent, draw.uniform(0, 3), positions, layer))
    record = Recording(tuple(draw.sample(range(96), 3))) if draw.random() < 0.4 else None
    return Request(
        f"r{n}",
        words(n, draw.randrange(4, 60)),
        seed=n,
        sampling=Sampling(0.0, max_new_tokens=draw.choice([8, 30, 60])),
        interventions=tuple(edits),
        record=record,
    )


def test_mixed_requests_in_one_batch_are_each_steered_as_alone(pair: Any) -> None:
    """64 requests with interventions of their own, chunked prefills and preemptions; each checked by the reference."""
    before = pair.vllm._drivers[0].call("steerback_state")[0]
    check_sampled(pair, [random_request(n) for n in range(64)])
    after = pair.vllm._drivers[0].call("steerback_state")[0]
    assert after["preemptions"] > before["preemptions"], "no request was preempted; the test must force it"
    assert {k: after[k] for k in before if k != "preemptions"} == {k: before[k] for k in before if k != "preemptions"}


@pytest.mark.parametrize("order", [(0, 1, 2, 0), (2, 1, 0), (1, 0, 1, 2)])
def test_prefix_cache_never_mixes_interventions(pair: Any, order: tuple[int, ...]) -> None:
    """The same long prompt plain, with one boost and with another, in any order; generated blocks included."""
    choices: list[tuple[Intervention, ...]] = [(), (ADD,), (replace(ADD, value=2.0),)]
    prompt = words(sum(order) + len(order), 90)
    for n, choice in enumerate(order):
        check_greedy(pair, Request(f"{order} {n}", prompt, 0, Sampling(0.0, max_new_tokens=40), choices[choice]))


def test_prefill_of_a_generated_text_meets_the_right_blocks(pair: Any) -> None:
    """Prompt and generated blocks of a request steered on generated positions alone are resubmitted as a prompt."""
    edits = (replace(ADD, positions="generated"),)
    first = Request("first", words(5, 70), 0, Sampling(0.0, max_new_tokens=60), edits)
    said = check_greedy(pair, first).text
    for n, again in enumerate((edits, (ADD,), ())):
        check_greedy(pair, replace(first, key=f"again {n}", prefill=said[:50], interventions=again))


def check_greedy(pair: Any, request: Request) -> Completion:
    """One request through vLLM (its cache as warm as it may be); every log-probability against the reference."""
    job = pair.vllm._check([request])[0]
    answer = (
        pair.vllm._drivers[0].submit(VllmJob(job.ticket, job.token_ids, dict(job.sampling) | {"logprobs": 4})).result()
    )
    completion: Completion = pair.vllm._completion(request, answer)
    assert completion.receipt_matches(request.interventions)
    ids, prompt = [*job.token_ids, *completion.token_ids], len(job.token_ids)
    want = pair.reference.teacher_forced(ids[:-1], request.interventions, prompt).log_softmax(-1).numpy()
    sampled_near(answer.output.outputs[0], want[prompt - 1 :])
    return completion


def check_sampled(pair: Any, requests: list[Request]) -> None:
    """All requests at once; each response's log-probabilities are those of the reference, alone."""
    jobs = [replace(j, sampling=dict(j.sampling) | {"logprobs": 4}) for j in pair.vllm._check(requests)]
    futures = [pair.vllm._drivers[0].submit(job) for job in jobs]
    for request, future in zip(requests, futures, strict=True):
        answer = future.result(timeout=600)
        output = answer.output.outputs[0]
        completion = pair.vllm._completion(request, answer)
        assert completion.receipt_matches(request.interventions), request
        prompt = list(answer.output.prompt_token_ids)
        ids = prompt + list(output.token_ids)
        want = pair.reference.teacher_forced(ids[:-1], request.interventions, len(prompt)).log_softmax(-1).numpy()
        sampled_near(output, want[len(prompt) - 1 :])


def sampled_near(output: Any, want: Any) -> None:
    """The log-probabilities that came with generated tokens are those of the reference, `want` (n, vocabulary)."""
    found = [(n, token, v.logprob) for n, step in enumerate(output.logprobs) for token, v in step.items()]
    near("log-probabilities while generating", [v for *_, v in found], [want[n, token] for n, token, _ in found])


def test_cache_is_used_by_requests_with_equal_interventions(pair: Any) -> None:
    """The salt must separate, not switch off: the second of two equal requests finds the first one's blocks."""
    requests = [Request(f"same {n}", words(77, 100), n, Sampling(0.0, max_new_tokens=2), (ADD,)) for n in range(2)]
    answers = [pair.vllm._drivers[0].submit(job).result() for job in pair.vllm._check(requests)]
    assert answers[0].output.num_cached_tokens == 0
    assert answers[1].output.num_cached_tokens >= 64
    for request, answer in zip(requests, answers, strict=True):
        assert pair.vllm._completion(request, answer).receipt_matches(request.interventions)


def test_several_responses_to_one_prompt(pair: Any) -> None:
    """What vLLM calls n > 1 is n requests with seeds that follow one another; each is steered by itself.

    One goes ahead, so that the others find the prompt's blocks: four whole prompts do not fit one step of this engine,
    and vLLM's CPU build fails on a seeded request whose prefill is split.
    """
    edits, sampling = (replace(ADD, positions="generated"),), Sampling(1.0, max_new_tokens=24)
    loaded = LoadedTarget(pair.target, pair.vllm)
    loaded.responses(1, words(78, 70), interventions=edits, seed=4, sampling=sampling)
    several = [r.record for r in loaded.responses(4, words(78, 70), interventions=edits, seed=5, sampling=sampling)]
    assert len({one.token_ids for one in several}) == 4
    assert all(one.receipt_matches(edits) for one in several)
    check_sampled(pair, [Request(f"{n}", words(78, 70), 5 + n, sampling, edits) for n in range(4)])


def test_recordings_are_whole_when_a_text_is_asked_for_again(pair: Any) -> None:
    request = Request("again", words(31, 100), 0, Sampling(0.0, max_new_tokens=4), record=Recording((1, 5)))
    first, second = (collect(pair.vllm, [request])["again"] for _ in range(2))
    np.testing.assert_allclose(first.activations, second.activations, atol=TOLERANCE)


def test_a_response_is_continued_from_its_own_tokens_as_it_was(pair: Any) -> None:
    """What a fork asks for: the exact tokens kept, the same tokens, receipts and recordings as without the cut."""
    edits = (ADD, Intervention("clamp", 8, 2.0))
    whole = Request("w", words(33, 20), 0, Sampling(0.0, max_new_tokens=12), edits, record=Recording((3, 8)))
    done = collect(pair.vllm, [whole])["w"]
    ends = pair.vllm.token_ends(done)
    cuts = {}
    for kept in range(1, len(done.token_ids) - 1, 3):
        left = replace(whole.sampling, max_new_tokens=12 - kept)
        prefix = Prefix(done.text[: ends[kept - 1]], done.token_ids[:kept])
        cuts[kept] = replace(whole, key=str(kept), prefix=prefix, sampling=left)
    again = collect(pair.vllm, list(cuts.values()))
    for kept, request in cuts.items():
        rest = again[str(kept)]
        assert request.prefix is not None
        assert rest.token_ids == done.token_ids[kept:]
        assert request.prefix.text + rest.text == done.text
        assert rest.prompt_tokens == done.prompt_tokens + kept
        assert rest.receipt_matches(edits, continued=True)
        assert rest.receipt.positions == done.receipt.positions
        np.testing.assert_allclose(rest.activations, done.activations, atol=TOLERANCE)
    reference = collect(pair.reference, list(cuts.values()))
    assert {key: (c.text, c.receipt.positions) for key, c in again.items()} == {
        key: (c.text, c.receipt.positions) for key, c in reference.items()
    }


def test_aborted_requests_give_their_rows_back(pair: Any) -> None:
    before = pair.vllm._drivers[0].call("steerback_state")[0]
    requests = [replace(random_request(n), key=f"abort {n}", interventions=(ADD,)) for n in range(40)]

    async def run() -> None:
        stream = pair.vllm.generate(requests)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(run())
    again = Request("after", "hello", 0, Sampling(0.0, max_new_tokens=8), (ADD,))
    assert collect(pair.vllm, [again])["after"].receipt_matches(again.interventions)
    assert pair.vllm._drivers[0].call("steerback_state")[0]["rows"] == before["rows"]


def test_whole_sae_activations_equal_the_reference(pair: Any) -> None:
    prompts = [words(n, 5 + 7 * n) for n in range(12)]
    responses = [words(100 + n, 3 + 9 * n) for n in range(11)] + [""]
    for latents, over, pool, at in (
        (None, "response", "max", "read"),
        (None, "words", "mean", "clamp"),
        (None, "all", "max", "read"),
        ([4, 90, 2], "response", "active", "clamp"),
    ):
        got = pair.vllm.activations(prompts, responses, latents, over, pool, at)
        want = pair.reference.activations(prompts, responses, latents, over, pool, at)
        near("whole-SAE activations", got, want, POOLED)
        assert np.abs(got).max() > 0.5
    np.testing.assert_array_equal(pair.vllm.decoder_norms(), pair.reference.decoder_norms())


def test_stop_strings_and_seeds(pair: Any) -> None:
    sampling = Sampling(1.0, max_new_tokens=60)
    base = Request("a", "tell me", 7, sampling, (ADD,))
    first = collect(pair.vllm, [base])["a"]
    assert collect(pair.vllm, [base])["a"].token_ids == first.token_ids
    assert collect(pair.vllm, [replace(base, seed=8)])["a"].token_ids != first.token_ids
    stop = first.text[10:12]
    stopped = collect(pair.vllm, [replace(base, sampling=replace(sampling, stop=(stop,)))])["a"]
    assert stopped.finish == "stop"
    assert stopped.text == first.text[: first.text.index(stop)]
    assert stopped.receipt_matches(base.interventions)
    assert expected_positions(base.interventions, stopped.prompt_tokens, len(stopped.token_ids))[1] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"interventions": (Intervention("add", 96, 1.0),)}, r"interventions\[0\].latent 96"),
        ({"interventions": (ADD, Intervention("clamp", -1, 1.0))}, r"interventions\[1\].latent -1"),
        ({"interventions": (Intervention("add", "north", 1.0),)}, "north"),
        ({"interventions": (Intervention("add", 3, 1.0, layer=9),)}, r"interventions\[0\].layer 9"),
        ({"interventions": (Intervention("add", 3, 1.0, layer=3),)}, "not prepared"),
        ({"record": Recording((96,))}, "record.latents 96"),
        ({"record": Recording((3, 3))}, "twice"),
        ({"record": Recording(tuple(range(90)))}, "record_latents"),
        ({"sampling": Sampling(max_new_tokens=300)}, "max_model_len"),
        ({"sampling": Sampling(temperature=-1.0)}, "sampling.temperature"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_sent(pair: Any, change: Any, says: str) -> None:
    good = Request("good", "hi", 0, Sampling(max_new_tokens=200))
    with pytest.raises(SteerbackError, match=says):
        collect(pair.vllm, [good, replace(good, key="bad", **change)])


def test_texts_that_could_only_wait_are_refused_as_well(pair: Any) -> None:
    """Teacher-forcing asks for a layer that was not prepared, or for more columns than there are."""
    with pytest.raises(SteerbackError, match=r"teacher_forced: interventions.0..layer 3 is not prepared"):
        pair.vllm.teacher_forced(tokens(1, 9), (replace(ADD, layer=3),), 4)
    pair.vllm.settings, whole = replace(pair.vllm.settings, columns=2), pair.vllm.settings
    try:
        with pytest.raises(SteerbackError, match="teacher_forced: 3 latents clamped or recorded, the engine has 2"):
            pair.vllm.teacher_forced(tokens(1, 9), CASES["clamp"], 4)
    finally:
        pair.vllm.settings = whole


@pytest.mark.parametrize("edits", [(), (ADD,)])
def test_a_recording_of_no_latents_is_empty(pair: Any, edits: tuple[Intervention, ...]) -> None:
    request = Request("none", words(4, 10), 0, Sampling(0.0, max_new_tokens=5), edits, record=Recording(()))
    got, want = (collect(engine, [request])["none"].activations for engine in (pair.vllm, pair.reference))
    assert got.shape == want.shape
    assert got.shape[1] == 0


def test_description_says_what_ran(pair: Any) -> None:
    facts = pair.vllm.describe()
    assert facts["engine"] == "vllm"
    assert facts["runner"] == ("v2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "v1")
    assert facts["sae"] == pair.reference.describe()["sae"]
    assert len(pair.vllm.fingerprint) == 64


def test_models_and_releases_that_cannot_be_steered_are_refused() -> None:
    """In one line each: a model class without one list of decoder layers, a runner without the known hook points."""
    from torch import nn

    from steerback.engines.interventions import Site
    from steerback.engines.vllm.runners import generation
    from steerback.engines.vllm.settings import TableSettings
    from steerback.engines.vllm.worker import decoder_layers

    settings = TableSettings(Site(2, 4, 0, 0, 0, 0), (0,), 1, 0, 1, 0, 8, "1", "0")
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4)])  # one layer, where two are expected
    with pytest.raises(SteerbackError, match="no single list of 2 decoder layers"):
        decoder_layers(model, settings)
    with pytest.raises(SteerbackError, match="none of the known hook points"):
        generation(object())
