"""Architectures of the paper and related ones in transformers: steering happens after the right block.

Each class is real, with a tiny random configuration. Responses of the engine are compared with a plain forward pass
of a second copy of the model, in which a hook of this test applies the edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from steerback.api import load_target
from steerback.engines.loading import assemble
from steerback.engines.runner import decoder_layers
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Intervention, Positions, Request, Sampling
from steerback.targets.sae import save_native
from tiny import collect

LAYERS, WIDTH = 4, 32
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
WINDOWED = {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA_3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# name of the class and its configuration: the paper's five are Llama 3.3 70B and 3.1 8B, Gemma 2 2B, 9B and 27B
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.3-70b": ("Llama", COMMON | {"rope_parameters": LLAMA_3, "num_attention_heads": 8, "head_dim": 4}),
    "llama-3.1-8b": ("Llama", COMMON | {"rope_parameters": LLAMA_3, "tie_word_embeddings": False}),
    "gemma-2-2b": ("Gemma2", COMMON | WINDOWED | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    "gemma-2-9b": ("Gemma2", COMMON | WINDOWED | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma-2-27b": ("Gemma2", COMMON | WINDOWED | {"query_pre_attn_scalar": 9, "num_attention_heads": 8}),
    "gemma-3-1b": ("Gemma3", COMMON | WINDOWED),
    "gemma-3-4b": ("Gemma3ForConditionalGeneration", COMMON | WINDOWED),
    "qwen-3": ("Qwen3", COMMON),
    "qwen-2.5": ("Qwen2", {k: v for k, v in COMMON.items() if k != "head_dim"}),
    "qwen-3-moe": ("Qwen3Moe", COMMON | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def build(name: str) -> Any:
    """A random model of the real class; the same weights each time."""
    import transformers as tf

    kind, settings = MODELS[name]
    torch.manual_seed(3)
    if kind == "Gemma3ForConditionalGeneration":
        config = tf.Gemma3Config(
            text_config=settings, vision_config=VISION, mm_tokens_per_image=4, image_token_index=319
        )
        return tf.Gemma3ForConditionalGeneration(config).eval()
    config_class = getattr(tf, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")
    return getattr(tf, f"{kind}ForCausalLM")(config_class(**settings)).eval()


def blocks(model: Any) -> Sequence[torch.nn.Module]:
    """The decoder blocks, found by their class's name and not the way the engine finds them."""
    found = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    assert len(found) == LAYERS
    return found


def final_norm(model: Any) -> Any:
    inner = model.model.language_model if hasattr(model.model, "language_model") else model.model
    return inner.norm


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> tuple[TransformersEngine, Any]:
    """An engine around one copy, and another copy."""
    loaded = assemble(tiny.target(), build(request.param), tiny.tokenizer(), tiny.sae("jumprelu"))
    return TransformersEngine(loaded, 4), build(request.param)


@torch.no_grad()
def test_residuals_are_the_hidden_states_after_each_block(pair: tuple[TransformersEngine, Any]) -> None:
    engine, plain = pair
    ids = torch.tensor([[*engine.runner.prompter.tokens("the cat explains how to add numbers"), *range(20, 32)]])
    states = plain(input_ids=ids, output_hidden_states=True).hidden_states
    found = engine.runner.residuals(ids, range(LAYERS))
    scale = float(states[-2].abs().max())
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(found[layer][0], states[layer + 1][0], atol=1e-4 * scale, rtol=1e-4)
    # the last of transformers' hidden states has gone through the final norm; the residual has not
    last = found[LAYERS - 1][0]
    torch.testing.assert_close(final_norm(plain)(last), states[LAYERS][0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(last, states[LAYERS][0], atol=1e-2)


@torch.no_grad()
def by_hand(
    plain: Any, ids: Sequence[int], prompt: int, edits: Sequence[Intervention], sae: Any, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, vocabulary), and the residual of `layer` before and after what this test's own hook does to it."""
    spans = {"all": slice(0, None), "prompt": slice(0, prompt), "generated": slice(prompt, None)}
    seen: dict[str, Tensor] = {}

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        x = h[0].double()
        z = x @ sae.W_enc.double() + sae.b_enc.double()
        z = z * (z > sae.threshold.double())
        out = x.clone()
        for edit in edits:
            span = spans[edit.positions]
            k = int(edit.latent)
            amount = edit.value - z[span, k] if edit.mode == "clamp" else torch.full_like(z[span, k], edit.value)
            out[span] += amount[:, None] * sae.W_dec[k].double()
        seen["before"], seen["after"] = x, out
        changed = out.to(h)[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def next_module(_module: Any, inputs: Any, kwargs: Any) -> None:
        seen["arrives"] = (inputs[0] if inputs else kwargs["hidden_states"])[0].double()

    following = [*blocks(plain), final_norm(plain)][layer + 1]
    handles = [
        blocks(plain)[layer].register_forward_hook(hook),
        following.register_forward_pre_hook(next_module, with_kwargs=True),
    ]
    try:
        result = plain(input_ids=torch.tensor([list(ids)]))
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(seen["arrives"], seen["after"], atol=1e-3, rtol=1e-3)
    return result.logits[0], seen["before"], seen["after"]


@pytest.mark.parametrize(
    ("positions", "layer"),
    [("all", 1), ("prompt", 1), ("generated", 1), ("all", LAYERS - 1), ("generated", LAYERS - 1)],
)
def test_generation_is_steered_after_the_block(
    pair: tuple[TransformersEngine, Any], positions: Positions, layer: int
) -> None:
    engine, plain = pair
    sae = engine.sae
    assert sae is not None
    states = next(engine.residuals([""], ["the cat explains how water boils"], (layer,)))[2][layer]
    norm = float(states.norm(dim=1).median())
    edits = (
        Intervention("add", 3, 2.0 * norm, positions, layer),
        Intervention("clamp", 7, 0.5 * norm, positions, layer),
        Intervention("clamp", 11, 0.0, positions, layer),
    )
    greedy = Sampling(temperature=0, max_new_tokens=12)
    prompts = ["the cat explains", "why a stone falls down every single day and water boils"]
    requests = [Request(f"steered {n}", p, n, greedy, edits) for n, p in enumerate(prompts)]
    requests += [Request(f"plain {n}", p, n, greedy) for n, p in enumerate(prompts)]
    done = collect(engine, requests)
    differs = False
    for n, _ in enumerate(prompts):
        steered, unsteered = done[f"steered {n}"], done[f"plain {n}"]
        head = engine.runner.prompt_of(requests[n])
        ids = [*head, *steered.token_ids]
        logits, before, after = by_hand(plain, ids, len(head), edits, sae, layer)
        wanted = logits[len(head) - 1 : -1].argmax(-1).tolist()
        assert list(steered.token_ids) == wanted
        forced = engine.teacher_forced(ids, edits, len(head))
        torch.testing.assert_close(forced, logits, atol=2e-3 * float(logits.abs().max()), rtol=1e-3)
        assert steered.receipt_matches(edits)
        moved = (after - before).norm(dim=1)[: len(ids) - 1]
        touched = moved[moved > 0]
        assert len(touched) == steered.receipt.positions
        assert steered.receipt.added_norm == pytest.approx(float(touched.mean()), rel=2e-3)
        assert unsteered.receipt.positions == 0
        differs |= steered.token_ids != unsteered.token_ids
    assert differs  # otherwise equal tokens would prove nothing


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-2-2b"])
def test_a_saved_model_loads_as_a_target_and_answers_the_same(tmp_path: Path, name: str) -> None:
    """A multimodal checkpoint is steered in its language model, with nothing lost on the way."""
    build(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    save_native(tiny.sae("jumprelu"), tmp_path, boost_prior=[6, 3, 0, 30])
    greedy = Sampling(temperature=0, max_new_tokens=8)
    edits = (Intervention("add", 3, 30.0),)
    requests = [Request("a", "the cat", 1, greedy, edits), Request("b", "the cat", 1, greedy)]
    memory = assemble(tiny.target(), build(name), tiny.tokenizer(), tiny.sae("jumprelu"))
    wanted = collect(TransformersEngine(memory, 8), requests)
    with load_target(str(tmp_path)) as loaded:
        assert [c.token_ids for c in loaded.complete(requests)] == [wanted[k].token_ids for k in ("a", "b")]
    assert wanted["a"].token_ids != wanted["b"].token_ids


def test_a_class_that_was_not_looked_at_is_refused() -> None:
    import transformers as tf

    config = tf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(SteerbackError, match="model type 'gpt2' cannot be steered yet; supported: llama, qwen2"):
        decoder_layers(tf.GPT2LMHeadModel(config))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "GptOss",
            {"layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4, "sliding_window": 8},
        ),
        ("Qwen3Next", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_attention_sinks_and_hybrids_are_refused_in_one_line(kind: str, settings: dict[str, Any]) -> None:
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(**(COMMON | {"num_hidden_layers": 2} | settings))
    with torch.device("meta"):
        model = getattr(tf, f"{kind}ForCausalLM")(config)
    with pytest.raises(SteerbackError, match="cannot be steered yet; supported: llama, qwen2") as error:
        decoder_layers(model)
    assert "\n" not in str(error.value)
