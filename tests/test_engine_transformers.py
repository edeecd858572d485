"""Arithmetic of the transformers engine against float64, at the right module of each architecture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import reference_llama
import tiny
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Intervention, Recording, Request, Sampling, expected_positions
from tiny import WORDS, collect

ADD = Intervention("add", 3, 4.0)
CLAMP = Intervention("clamp", 7, 2.5)
GREEDY = Sampling(temperature=0, max_new_tokens=12)
PROMPT = "the cat explains how to add numbers"

PLANS = {
    "nothing": (),
    "add": (ADD,),
    "clamp": (CLAMP,),
    "clamps and add of one latent": (CLAMP, Intervention("clamp", 9, 0.0), Intervention("add", 7, 3.0)),
    "scale": tuple(Intervention("scale", k, 0.25) for k in range(64)),
    "scale, clamp and add": (CLAMP, Intervention("scale", 9, -0.5), Intervention("scale", 3, 0.5), ADD),
    "scale half of the phases": tuple(Intervention("scale", k, 3.0, "generated") for k in range(64)),
    "ten clamps": tuple(Intervention("clamp", k, 0.1 * k) for k in range(20, 30)),
    "prompt only": (Intervention("add", 3, 4.0, "prompt"), Intervention("clamp", 7, 2.5, "prompt")),
    "generated only": (Intervention("add", 3, 4.0, "generated"), Intervention("clamp", 7, 2.5, "generated")),
    "other layers": (Intervention("add", 3, 4.0, layer=0), Intervention("clamp", 7, 2.5, layer=3), ADD),
    "phases differ": (Intervention("clamp", 7, 2.5, "prompt"), Intervention("clamp", 7, 0.0, "generated"), ADD),
}


@pytest.fixture(scope="module")
def engines() -> dict[str, TransformersEngine]:
    return {kind: tiny.engine(sae_kind=kind) for kind in ("relu", "jumprelu", "topk")}


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("name", PLANS)
def test_steered_run_equals_float64_by_hand(engines: dict[str, TransformersEngine], kind: str, name: str) -> None:
    engine, items = engines[kind], PLANS[name]
    sae = engine.sae
    assert sae is not None
    read = tuple(range(10))
    request = Request("a", PROMPT, 1, GREEDY, items, record=Recording(read, layer=3))
    done = collect(engine, [request, Request("other", "why a stone", 2, GREEDY, (Intervention("clamp", 1, 9.0),))])["a"]

    prompt = engine.runner.prompt_of(request)
    ids = [*prompt, *done.token_ids]
    logits, arriving = reference_llama.forward(engine.runner.model, ids, items, len(prompt), sae, steer=2)
    assert done.token_ids == tuple(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
    forced = engine.teacher_forced(ids, items, len(prompt)).double()
    assert (forced - logits).abs().max() < 2e-3 * logits.abs().max()
    z = torch.stack([reference_llama.encode(sae, h) for h in arriving[3][:-1]])[:, list(read)]
    exact = 2e-3 * float(arriving[3].abs().max())
    np.testing.assert_allclose(done.activations, z.numpy(), atol=exact)
    np.testing.assert_allclose(engine.reread(request, done.token_ids), z.numpy(), atol=exact)

    assert done.receipt_matches(items)
    wanted = [0.0] * (len(ids) - 1)  # norm of what was added, by hand, per position over all layers
    for t in range(len(ids) - 1):
        for layer, h in arriving.items():
            edited = reference_llama.edit(h[t], items, layer, t < len(prompt), sae, 2)
            wanted[t] += float((edited - h[t]).norm())
    n = sum(expected_positions(items, len(prompt), len(done.token_ids)))
    assert done.receipt.added_norm == pytest.approx(sum(wanted) / n if n else 0.0, rel=1e-3)


def test_a_latent_scaled_to_nothing_is_clamped_to_zero_and_one_kept_whole_is_left_alone(
    engines: dict[str, TransformersEngine],
) -> None:
    engine, ids = engines["jumprelu"], list(range(5, 25))
    some = range(0, 64, 2)
    zero = engine.teacher_forced(ids, tuple(Intervention("clamp", k, 0.0) for k in some), 8)
    assert torch.equal(engine.teacher_forced(ids, tuple(Intervention("scale", k, 0.0) for k in some), 8), zero)
    whole = engine.teacher_forced(ids, tuple(Intervention("scale", k, 1.0) for k in some), 8)
    plain = engine.teacher_forced(ids, (), 8)
    assert torch.equal(whole, plain)
    assert not torch.allclose(zero, plain, atol=1e-2)


def test_steering_changes_the_text(engines: dict[str, TransformersEngine]) -> None:
    requests = [Request(name, PROMPT, 1, GREEDY, items) for name, items in PLANS.items()]
    texts = {done.token_ids for done in collect(engines["relu"], requests).values()}
    assert len(texts) == len(PLANS)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_greedy_unsteered_tokens_equal_generate(kind: str) -> None:
    engine = tiny.engine(kind)
    plain = tiny.model(kind)
    requests = [
        Request(str(n), " ".join(WORDS[n : n + 3 + n]), n, Sampling(temperature=0, max_new_tokens=24)) for n in range(5)
    ]
    done = collect(engine, requests)
    for request in requests:
        ids = torch.tensor([engine.runner.prompt_of(request)])
        wanted = plain.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)[0, ids.shape[1] :].tolist()
        assert list(done[request.key].token_ids) == wanted


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_edits_the_residual_after_the_named_block(kind: str) -> None:
    """Adding to layer 1 must equal adding to what transformers calls hidden_states[2]."""
    engine, plain = tiny.engine(kind), tiny.model(kind)
    sae = engine.sae
    assert sae is not None
    ids = torch.tensor([[*engine.runner.prompter.tokens(PROMPT), 20, 21, 22]])
    with torch.no_grad():
        states = plain(ids, output_hidden_states=True).hidden_states
        for layer in range(3):
            assert torch.allclose(engine.runner.residuals(ids, {layer})[layer][0], states[layer + 1][0], atol=2e-4)
        block = plain.get_decoder().layers[1]
        handle = block.register_forward_hook(lambda _m, _i, out: out + 5 * sae.W_dec[3])
        wanted = plain(ids).logits[0]
        handle.remove()
    forced = engine.teacher_forced(ids[0].tolist(), (Intervention("add", 3, 5.0, layer=1),), 4)
    assert torch.allclose(forced, wanted, atol=1e-3 * float(wanted.abs().max()))
    unsteered = engine.teacher_forced(ids[0].tolist(), (), 4)
    assert not torch.allclose(forced, unsteered, atol=1e-2 * float(wanted.abs().max()))


def test_the_authors_pool_over_every_token_of_the_template(engines: dict[str, TransformersEngine]) -> None:
    """Their relevance reads the user's turn without the answer's header, their detectors both turns."""
    engine = engines["relu"]
    sae = engine.sae
    assert sae is not None
    asked, said = "why a stone", "how to add numbers"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    for reply, messages in (("", turns[:1]), (said, turns)):
        ids = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
        text = "<s>" + "".join(f"<|{m['role']}|>{m['content']}\n" for m in messages)
        assert ids == tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            h = tiny.model()(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
        z = sae.encode(h)
        found = engine.activations([asked], [reply], over="all")[0]
        np.testing.assert_allclose(found, z.amax(0).numpy(), atol=1e-3)
        assert not np.allclose(found, z[1:].amax(0).numpy(), atol=1e-2), "the first token tells"


def test_activations_are_read_where_clamps_act() -> None:
    """As the preset `authors` has it: clamps at the steer layer, recording at another."""
    target = dataclasses.replace(tiny.target(), clamp_layer=1)
    engine = TransformersEngine(tiny.assemble(target, tiny.model(), tiny.tokenizer(), tiny.sae()), 4)
    sae, prompter = engine.sae, engine.runner.prompter
    assert sae is not None
    head, ids = prompter.tokens("why a stone"), prompter.tokens("why a stone", "how to add numbers")
    with torch.no_grad():
        states = tiny.model()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for at, layer in (("clamp", 1), ("read", engine.runner.site.read_layer)):
        found = engine.activations(["why a stone"], ["how to add numbers"], at=at, pool="mean")
        wanted = sae.encode(states[layer + 1][0][len(head) :]).mean(0)
        np.testing.assert_allclose(found[0], wanted.numpy(), atol=1e-3)


def test_activations_equal_the_residual_encoded(engines: dict[str, TransformersEngine]) -> None:
    engine = engines["jumprelu"]
    sae, prompter = engine.sae, engine.runner.prompter
    assert sae is not None
    prompts = ["the cat explains", "why a stone falls down every single day", "water"] * 4
    replies = ["how to add numbers", "when water boils", ""] * 4
    found = engine.activations(prompts, replies)
    both = engine.activations(prompts, replies, latents=[5, 1], over="words")
    plain = tiny.model()
    for n, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        head, ids = prompter.tokens(prompt), prompter.tokens(prompt, reply)
        with torch.no_grad():
            h = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[3][0]
        said = list(range(len(head), len(ids)))
        user = list(range(2, len(head) - 2))  # after <s> <|user|>, before the template's newline and <|assistant|>
        assert prompter.conversation(prompt, reply).response == tuple(said)
        assert prompter.conversation(prompt, reply).user == tuple(user)
        wanted = sae.encode(h[said]).amax(0) if said else torch.zeros(sae.n_latents)
        np.testing.assert_allclose(found[n], wanted.numpy(), atol=1e-3)
        np.testing.assert_allclose(both[n], sae.encode(h[user + said], [5, 1]).amax(0).numpy(), atol=1e-3)


DEVICES = [d for d, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if there]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_gpus_agree_with_the_cpu(engines: dict[str, TransformersEngine], device: str, kind: str) -> None:
    other = tiny.engine(sae_kind=kind, device=device)
    requests = [
        Request(f"{n}{name}", " ".join(WORDS[: 3 + n]), n, Sampling(0.8, 0.9, 1.1, 16), items, record=Recording((1, 9)))
        for n in range(3)
        for name, items in PLANS.items()
    ]
    here, there = collect(engines[kind], requests), collect(other, requests)
    alike = 0
    for request in requests:
        done = there[request.key]
        assert done.receipt_matches(request.interventions)
        ids = [*engines[kind].runner.prompt_of(request), *done.token_ids]
        logits = [
            e.teacher_forced(ids, request.interventions, done.prompt_tokens).cpu() for e in (engines[kind], other)
        ]
        assert (logits[0] - logits[1]).abs().max() < 1e-2 * logits[0].abs().max()
        alike += done.token_ids == here[request.key].token_ids
    assert alike > len(requests) * 0.8  # sampling tips over where two probabilities meet the draw
    replies = ["how to add numbers", "when water boils"]
    np.testing.assert_allclose(
        other.activations(replies, replies), engines[kind].activations(replies, replies), atol=1e-2
    )


def test_named_directions_are_added_and_checked() -> None:
    loaded = tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), tiny.sae(), directions=("north",))
    sae = tiny.sae()
    engine = TransformersEngine(loaded, 4, {"north": sae.W_dec[3] * 2})
    requests = [
        Request("direction", PROMPT, 1, GREEDY, (Intervention("add", "north", 2.0),)),
        Request("latent", PROMPT, 1, GREEDY, (Intervention("add", 3, 4.0),)),
    ]
    done = collect(engine, requests)
    assert done["direction"].token_ids == done["latent"].token_ids
    with pytest.raises(SteerbackError, match=r"'south'.*choose one of: north"):
        collect(engine, [Request("x", PROMPT, 1, GREEDY, (Intervention("add", "south", 1.0),))])
    with pytest.raises(SteerbackError, match="only SAE latents can be clamped"):
        collect(engine, [Request("x", PROMPT, 1, GREEDY, (Intervention("clamp", "north", 1.0),))])
    with pytest.raises(SteerbackError, match=r"shape \(3,\)"):
        TransformersEngine(loaded, 4, {"north": torch.ones(3)})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request("k", PROMPT, 0, GREEDY, (Intervention("add", 64, 1.0),)),
            r"request 'k': interventions\[0\].latent 64",
        ),
        (Request("k", PROMPT, 0, GREEDY, (ADD, Intervention("add", 1, 1.0, layer=4))), r"interventions\[1\].layer 4"),
        (Request("k", PROMPT, 0, GREEDY, (CLAMP, CLAMP)), r"latent 7 is clamped or scaled twice at layer 2"),
        (Request("k", PROMPT, 0, GREEDY, record=Recording((99,))), r"record.latents 99"),
        (Request("k", PROMPT, 0, GREEDY, record=Recording((1,), layer=9)), r"record.layer 9"),
        (Request("k", PROMPT, 0, Sampling(max_new_tokens=600)), "exceed the model's context of 512"),
        (Request("k", PROMPT, 0, Sampling(max_new_tokens=-1)), "max_new_tokens -1 is out of range; .* 1 or more"),
        (Request("k", PROMPT, 0, Sampling(max_new_tokens=0)), "max_new_tokens 0 is out of range"),
        (Request("k", PROMPT, 0, Sampling(max_new_tokens=2.5)), "max_new_tokens 2.5 is out of range"),  # type: ignore[arg-type]
        (Request("k", PROMPT, 0, Sampling(repetition_penalty=-1.0)), "repetition_penalty -1.0 is out of range"),
        (Request("k", PROMPT, 0, Sampling(top_p=0)), r"sampling.top_p 0 is out of range"),
        (Request("k", PROMPT, 0, Sampling(temperature=1e-320)), r"sampling.temperature 1e-320 .*at least 0.0001"),
        (Request("k", PROMPT, 0, Sampling(stop=("",))), "sampling.stop"),
    ],
)
def test_impossible_requests_name_the_field(
    engines: dict[str, TransformersEngine], request_: Request, message: str
) -> None:
    with pytest.raises(SteerbackError, match=message):
        collect(engines["relu"], [Request("fine", PROMPT, 0, GREEDY), request_])


def test_wrong_sae_and_unknown_model_are_refused() -> None:
    with pytest.raises(SteerbackError, match="width 16, but the model has width 32"):
        tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), tiny.sae(d=16))
    with pytest.raises(SteerbackError, match=r"layer 9 is outside the model's layers 0\.\.3"):
        tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), tiny.sae(layer=9))
    with pytest.raises(SteerbackError, match=r"steer_layer 4 is outside 0\.\.3"):
        tiny.assemble(tiny.target(steer=4), tiny.model(), tiny.tokenizer(), tiny.sae())
    with pytest.raises(SteerbackError, match=r"'gpt_neox' cannot be steered yet; supported: llama"):
        tiny.assemble(tiny.target(), tiny.model("gpt_neox"), tiny.tokenizer(), tiny.sae())
