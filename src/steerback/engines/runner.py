"""Access to a Hugging Face model: its decoder layers, and a forward pass with steerback's masks and cache.

Supports decoders whose blocks return the residual stream (Llama, Qwen 2 and 3, Qwen 3 mixture of experts, Gemma 2 and
3) and refuses others with one line. This module does not know about requests, sampling or edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steerback.engines.checks import check_length
from steerback.engines.interventions import Site
from steerback.engines.kv import ATTENTION, KeyValues, mask
from steerback.engines.prompting import Prompter
from steerback.engines.steering import Enough, Hooks, Pass
from steerback.errors import SteerbackError
from steerback.records import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")


class Runner:
    """Model, tokenizer and hooks on one device; `site` defines the layers for edits."""

    def __init__(self, model: PreTrainedModel, prompter: Prompter, site: Site) -> None:
        self.model, self.prompter, self.site = model, prompter, site
        self.decoder = model.get_decoder()
        self.config = self.decoder.config
        layers = decoder_layers(model)
        model.set_attn_implementation(ATTENTION)
        model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.ends = end_tokens(getattr(model, "generation_config", None), model.config, prompter.tokenizer)
        self.hooks = Hooks(layers)
        self._windowed = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())

    def prompt_of(self, request: Request) -> tuple[int, ...]:
        """Return the token ids of a request's prompt, prefill and prefix included."""
        return self.prompter.prompt(request)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        length: int,
        cache: KeyValues | None,
        forward: Pass,
    ) -> Tensor:
        """Return final hidden states (rows, Q, d) for ids (rows, Q) at positions (rows or 1, Q), with `length` keys."""
        masks: object = (full := mask(positions, length, self.dtype))
        if self._windowed:
            window = mask(positions, length, self.dtype, self.config.sliding_window)
            masks = {"full_attention": full, "sliding_attention": window}
        with self.hooks.during(forward):
            output = self.decoder(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def residuals(self, ids: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        """Return unsteered residuals (rows, T, d) of ids (rows, T) after each of `layers`; later layers are skipped."""
        positions = torch.arange(ids.shape[1], device=self.device)[None]
        forward = Pass(positions, [], stop_after=max(layers), keep=frozenset(layers))
        with contextlib.suppress(Enough):
            self.hidden(ids.to(self.device), positions, ids.shape[1], None, forward)
        return forward.residual

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocabulary) of final hidden states (..., d), with the model's soft cap, if any."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def check_length(self, where: str, prompt: int, new: int) -> None:
        """Raise SteerbackError if prompt and response exceed the model's context."""
        most = getattr(self.config, "max_position_embeddings", None) or prompt + new
        check_length(where, prompt, new, most, "the model's context of", "")


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder blocks of a supported model; block i's output is the residual stream after layer i."""
    kind = model.get_decoder().config.model_type
    if kind not in SUPPORTED:
        raise SteerbackError(f"model type {kind!r} cannot be steered yet; supported: {', '.join(SUPPORTED)}")
    return list(model.get_decoder().layers)


def end_tokens(*sources: object) -> frozenset[int]:
    """Return the ids of all tokens that end a response, from the model's configs and the tokenizer."""
    ids: set[int] = set()
    for source in sources:
        value: int | list[int] | None = getattr(source, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
