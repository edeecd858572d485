"""Tiny random models, SAEs and a tokenizer for the engine tests; nothing is downloaded."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import torch

from steerback.engines.loading import LoadedModel, assemble
from steerback.engines.transformers import TransformersEngine
from steerback.records import Completion, Request
from steerback.targets import BoostPrior, Target
from steerback.targets.sae import Sae

torch.set_num_threads(1)  # models this small lose time to a second thread

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = "the cat explains how to add numbers when water boils and why a stone falls down every single day"
WORDS = TEXT.split()
PRIOR = BoostPrior(5, 5, 0, 20)


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 320 entries with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special[3:],
    )
    found.chat_template = TEMPLATE
    return found


def model(kind: str = "llama", layers: int = 4, scale: float = 0.3, **changes: Any) -> Any:
    """A random causal model whose logits are far from flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": scale,
        "tie_word_embeddings": False,
    }
    if kind.startswith("gemma"):
        settings |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
        settings["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes))).eval().float()


def sae(kind: str = "relu", layer: int = 2, d: int = 32, n: int = 64, seed: int = 1) -> Sae:
    """A random SAE, its decoder rows of unit norm."""
    g = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n, d, generator=g)
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Sae(
        kind=kind,  # type: ignore[arg-type]
        layer=layer,
        W_enc=torch.randn(d, n, generator=g) * 0.3,
        b_enc=torch.randn(n, generator=g) * 0.1,
        W_dec=decoder,
        b_dec=torch.randn(d, generator=g) * 0.1,
        threshold=torch.rand(n, generator=g) * 0.5 if kind == "jumprelu" else torch.zeros(n),
        k=6 if kind == "topk" else None,
    )


def target(steer: int = 2, read: int = 2, **changes: Any) -> Target:
    return Target("tiny", "memory", steer, read, PRIOR, n_latents=64, **changes)


def loaded(kind: str = "llama", sae_kind: str = "relu", device: str = "cpu", **changes: Any) -> LoadedModel:
    return assemble(target(), model(kind, **changes).to(device), tokenizer(), sae(sae_kind).to(device))


def engine(kind: str = "llama", sae_kind: str = "relu", rows: int = 16, **changes: Any) -> TransformersEngine:
    return TransformersEngine(loaded(kind, sae_kind, **changes), rows)


def collect(made: Any, requests: list[Request]) -> dict[str, Completion]:
    """All completions of `requests` by key."""

    async def run() -> dict[str, Completion]:
        return {key: done async for key, done in made.generate(requests)}

    return asyncio.run(run())
