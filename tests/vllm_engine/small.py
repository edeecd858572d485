"""A small random model with real logits, a tokenizer of letters, and SAEs of every kind, written to a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steerback.engines import make_engine
from steerback.engines.interventions import Site
from steerback.engines.options import TransformersOptions, VllmOptions
from steerback.engines.vllm.settings import TableSettings
from steerback.targets import Target, from_folder
from steerback.targets.sae import Kind, Sae, save_native
from steerback.targets.target import SaeSource

GPU = torch.cuda.device_count() > 0
TOLERANCE = 1e-3 if GPU else 1e-4
"""On log-probabilities and activations in float32; kernels differ in the order of their sums."""
POOLED = 2e-2 if GPU else TOLERANCE
"""On whole-SAE activations, which are computed in TensorFloat-32 on a GPU."""
EFFECT = 1.0
"""What an intervention has to move the log-probabilities by, at least, for agreement to mean anything."""
OPTIONS: dict[str, Any] = (
    {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30}
    if GPU
    else {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
)
"""GPU: little memory, so that two runs of the tests may share one. CPU: one process less to start."""
SEEN: dict[str, float] = {}
"""The largest differences met, by what was compared."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the second model runner on a CPU, which is not compiled then
# Short of cache blocks, so that requests are preempted, and of tokens in a step, so that prefills are split.
TIGHT: dict[str, Any] = {
    "enforce_eager": INTERPRETED,
    "num_gpu_blocks_override": 40,
    "block_size": 32,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 96,
}

SITE = Site(n_layers=3, d_model=16, steer_layer=0, sae_layer=1, read_layer=1, n_latents=40)
SETTINGS = TableSettings(SITE, (0, 1), 8, 20, 96, 2, 24, "1", "0", SaeSource(""))
"""Of an engine that is only pretended."""

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}<u>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def reference_engine(target: Target) -> Any:
    """The engine that the other one is compared with."""
    return make_engine(target, TransformersOptions(batch_size=2, device="cpu"))


def near(what: str, got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Asserts that two arrays agree, and remembers how well."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    SEEN[what] = max(SEEN.get(what, 0.0), float(np.abs(got - want).max(initial=0.0)))
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


def tokenizer() -> Any:
    """One token a letter; <s>, <u>, <a> and </s> are special."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<u>", "<a>", "<unk>"]
    vocabulary = {t: n for n, t in enumerate([*special, *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def sae(kind: Kind, d: int, n: int, layer: int, seed: int = 1) -> Sae:
    """A random SAE some of whose latents are active on a random residual."""
    draw = torch.Generator().manual_seed(seed)
    decoder = torch.randn(n, d, generator=draw)
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Sae(
        kind=kind,
        layer=layer,
        W_enc=decoder.T.contiguous() * 2,
        b_enc=torch.randn(n, generator=draw) * 0.1,
        W_dec=decoder,
        b_dec=torch.zeros(d),
        threshold=torch.rand(n, generator=draw) * 0.3 if kind == "jumprelu" else torch.zeros(n),
        k=8 if kind == "topk" else None,
    )


def write(
    folder: Path,
    kind: Kind = "relu",
    steer: int = 1,
    layer: int = 2,
    read: int = 2,
    model: str = "llama",
    seed: int = 0,
    n: int = 96,
    **sizes: Any,
) -> Target:
    """Writes model, tokenizer and SAE to `folder`; returns the target."""
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

    torch.manual_seed(seed)
    words = tokenizer()
    config_class = {"llama": LlamaConfig, "gemma2": Gemma2Config, "qwen2": Qwen2Config}[model]
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
    } | sizes
    config = config_class(
        vocab_size=len(words),
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=model == "gemma2",
        **shape,
    )
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in {lm.get_output_embeddings().weight, lm.get_input_embeddings().weight}:
            weight.mul_(8)  # logits with an opinion
    lm.save_pretrained(folder)
    words.save_pretrained(folder)
    save_native(sae(kind, shape["hidden_size"], n, layer), folder, boost_prior=[2.0, 1.0, 0.0, 10.0])
    return from_folder(folder, steer_layer=steer, read_layer=read)


class Pair:
    """A target in both engines; the reference engine may have another one that should answer alike."""

    def __init__(self, target: Any, reference: Any = None, adapters: tuple[str, ...] = (), **options: Any) -> None:
        self.target = target
        options = OPTIONS | {"max_logprobs": -1} | options
        chosen = VllmOptions(
            batch_size=32, max_model_len=256, layers=(0,), adapters=adapters, options=options, stop_strings=True
        )
        self.vllm = make_engine(target, chosen)
        self.reference = reference_engine(reference or target)
