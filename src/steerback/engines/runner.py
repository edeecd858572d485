"""A Hugging Face model as the engine needs it: its decoder layers, a forward pass with masks and a cache of our own.

Serves decoders whose blocks return the residual stream (Llama, Qwen 2/3, Gemma 2/3); refuses others in one line.
Knows nothing of requests, sampling or what a pass edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerback.engines.interventions import Site
from steerback.engines.kv import ATTENTION, mask
from steerback.engines.prompting import Prompter
from steerback.engines.steering import Enough, Hooks, Pass
from steerback.errors import SteerbackError
from steerback.records import Request

SUPPORTED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")


class Runner:
    """Model, tokenizer and hooks on one device; `site` says where edits act."""

    def __init__(self, model: Any, prompter: Prompter, site: Site) -> None:
        self.model, self.prompter, self.site = model, prompter, site
        self.decoder = model.get_decoder()
        self.config = self.decoder.config
        layers = decoder_layers(model)
        model.set_attn_implementation(ATTENTION)
        model.eval().requires_grad_(False)
        self.device: torch.device = next(model.parameters()).device
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.ends = end_tokens(model, prompter.tokenizer)
        self.hooks = Hooks(layers)
        self._windowed = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())

    def prompt_of(self, request: Request) -> tuple[int, ...]:
        """Token ids of a request's prompt, prefill included."""
        return self.prompter.tokens(request.prompt, request.prefill, request.system)

    def hidden(self, ids: Tensor, positions: Tensor, length: int, cache: Any, forward: Pass) -> Tensor:
        """Final hidden states (rows, Q, d) of ids (rows, Q) at positions (rows or 1, Q), seeing `length` keys."""
        masks: Any = mask(positions, length, self.dtype)
        if self._windowed:
            window = mask(positions, length, self.dtype, self.config.sliding_window)
            masks = {"full_attention": masks, "sliding_attention": window}
        with self.hooks.during(forward):
            result: Tensor = self.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return result

    def residuals(self, ids: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """The unsteered residual (rows, T, d) after each of `layers` of ids (rows, T); no later layer is computed."""
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        forward = Pass(positions, [], stop_after=max(layers), keep=frozenset(layers))
        with contextlib.suppress(Enough):
            self.hidden(ids.to(self.device), positions, ids.shape[1], None, forward)
        return forward.residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of final hidden states (..., d), soft-capped where the model does so."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check_length(self, where: str, prompt: int, new: int) -> None:
        """Raises SteerbackError if prompt and response cannot both fit the model's context."""
        most = getattr(self.config, "max_position_embeddings", None)
        if prompt == 0:
            raise SteerbackError(f"{where}: the prompt has no tokens")
        if most is not None and prompt + new > most:
            raise SteerbackError(
                f"{where}: prompt of {prompt} tokens and max_new_tokens {new} exceed the model's context of {most}; "
                "shorten the prompt or lower max_new_tokens"
            )


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The decoder blocks of a supported model, in order; block i's output is the residual stream after layer i."""
    kind = model.get_decoder().config.model_type
    if kind not in SUPPORTED:
        raise SteerbackError(f"model type {kind!r} cannot be steered yet; supported: {', '.join(SUPPORTED)}")
    layers: nn.ModuleList = model.get_decoder().layers
    return list(layers)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a response: those of the generation config and the tokenizer."""
    found: set[int] = set()
    configs = (getattr(model, "generation_config", None), model.config)
    for value in (*(getattr(c, "eos_token_id", None) for c in configs), tokenizer.eos_token_id):
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)
