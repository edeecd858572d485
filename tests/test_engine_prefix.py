"""Continuation from a prefix gives the same tokens, texts, receipts and recordings as the whole response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_llama
import tiny
from steerback.engines.prompting import Prompter
from steerback.engines.transformers import TransformersEngine
from steerback.records import Intervention, Prefix, Recording, Request, Sampling
from tiny import collect

ADD, CLAMP = Intervention("add", 3, 4.0), Intervention("clamp", 7, 2.5)
GREEDY = Sampling(temperature=0, max_new_tokens=14)
WHOLE = Request("whole", "the cat explains how to add", 1, GREEDY, (ADD, CLAMP), record=Recording((1, 3, 7), layer=3))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return tiny.engine()


def cut(request: Request, text: str, token_ids: tuple[int, ...], ends: list[int], kept: int, key: str) -> Request:
    prefix = Prefix(text[: ends[kept - 1]] if kept else "", token_ids[:kept])
    left = replace(request.sampling, max_new_tokens=request.sampling.max_new_tokens - kept)
    return replace(request, key=key, prefix=prefix, sampling=left)


@pytest.mark.parametrize("edits", [(), (ADD,), (ADD, CLAMP)], ids=["none", "add", "add and clamp"])
def test_the_own_beginning_is_continued_as_it_was_at_every_token(
    engine: TransformersEngine, edits: tuple[Intervention, ...]
) -> None:
    whole = replace(WHOLE, interventions=edits)
    done = collect(engine, [whole])["whole"]
    ends = engine.token_ends(done)
    cuts = [cut(whole, done.text, done.token_ids, ends, k, str(k)) for k in range(len(done.token_ids))]
    again = collect(engine, [*cuts, replace(whole, key="beside")])
    for k, request in enumerate(cuts):
        rest = again[str(k)]
        assert rest.token_ids == done.token_ids[k:]
        assert request.prefix is not None
        assert request.prefix.text + rest.text == done.text
        assert [len(request.prefix.text) + e for e in engine.token_ends(rest, request.prefix)] == ends[k:]
        assert rest.prompt_tokens == done.prompt_tokens + k
        assert rest.receipt_matches(edits, continued=True)
        assert rest.receipt.positions == done.receipt.positions
        np.testing.assert_allclose(rest.activations, done.activations, atol=1e-4)
        np.testing.assert_allclose(engine.reread(request, rest.token_ids), done.activations, atol=1e-4)
    assert again["beside"] == done  # nothing of the others' prefixes reaches it


def test_edits_of_the_past_and_of_the_continuation_change_at_the_token_that_draws_the_next(
    engine: TransformersEngine,
) -> None:
    """Against float64 by hand: the last kept token is the first position with the edits of the continuation."""
    done = collect(engine, [WHOLE])["whole"]
    edits = (replace(ADD, positions="prompt"), replace(CLAMP, positions="generated"), Intervention("add", 9, 2.0))
    request = cut(replace(WHOLE, interventions=edits), done.text, done.token_ids, engine.token_ends(done), 6, "changed")
    (rest,) = collect(engine, [request]).values()
    ids = [*engine.runner.prompt_of(request), *rest.token_ids]
    assert engine.sae is not None
    logits, arriving = reference_llama.forward(
        engine.runner.model, ids, edits, rest.prompt_tokens - 1, engine.sae, steer=2
    )
    assert rest.token_ids == tuple(logits[rest.prompt_tokens - 1 : -1].argmax(-1).tolist())
    z = torch.stack([reference_llama.encode(engine.sae, h) for h in arriving[3][:-1]])[:, [1, 3, 7]]
    np.testing.assert_allclose(rest.activations, z.numpy(), atol=2e-3 * float(arriving[3].abs().max()))
    assert (rest.receipt.prompt_positions, rest.receipt.generated_positions) == (
        rest.prompt_tokens - 1,
        len(rest.token_ids),
    )
    assert rest.receipt_matches(edits, continued=True)
    assert not rest.receipt_matches(edits)


def test_a_cut_within_a_character_gives_it_to_the_continuation(engine: TransformersEngine) -> None:
    prompter = engine.runner.prompter
    text = "the caf\u00e9 \U0001f9ca day"
    ids = list(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])
    ends = prompter.ends(ids, len(text))
    for kept in range(len(ids)):
        prefix = Prefix(text[: ends[kept - 1]] if kept else "", tuple(ids[:kept]))
        assert prefix.text + prompter.continuation(ids[kept:], prefix) == text


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ab .,'\n\u00e9\u4f60\u597d\U0001f9ca\u0301"), max_size=60),
    kept=st.integers(0, 5),
    data=st.data(),
)
def test_ends_are_those_of_decoding_each_beginning(text: str, kept: int, data: st.DataObject) -> None:
    prompter = Prompter(tiny.tokenizer())
    ids = list(tiny.tokenizer()(text, add_special_tokens=False)["input_ids"])
    ids = data.draw(st.permutations(ids)) if data.draw(st.booleans()) else ids  # characters torn apart
    prefix = Prefix(prompter.text(ids[:kept]), tuple(ids[:kept]))
    beginnings = [prompter.continuation(ids[kept:n], prefix).rstrip("\ufffd") for n in range(kept + 1, len(ids) + 1)]
    expected = np.maximum.accumulate([0, *map(len, beginnings)])[1:]
    assert prompter.ends(ids[kept:], len(text) * 4, prefix) == expected.tolist()


def test_requests_without_a_prefix_keep_their_cache_keys() -> None:
    request = Request("k", "p", 3, Sampling(), (Intervention("add", 3, 2.5),))
    assert request.content_hash() == "0c949b735d7d351f4d1a6c59082824a9410231b94bd5889c60891e18d71c86af"
    assert replace(request, prefix=Prefix("", ())).content_hash() != request.content_hash()
