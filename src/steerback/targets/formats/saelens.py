"""SAELens' folders: `cfg.json` and `sae_weights.safetensors` with W_enc (d, n), b_enc, W_dec (n, d), b_dec, threshold.

Its conventions are folded into ours: the decoder bias subtracted from the input, TopK weighed by decoder norms, one
factor on the input. What depends on each input (layer norm, rescaling to a norm) cannot be and is refused, as is what
is not an SAE of the residual stream. Serves configs of SAELens 3 to 6.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steerback.errors import SteerbackError, unknown
from steerback.targets.formats import Place
from steerback.targets.sae import Kind, Sae, stored

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource

KINDS: Mapping[str, Kind] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
PER_INPUT = {
    "layer_norm": "standardises each input by itself",
    "constant_norm_rescale": "rescales each input to one norm",
    "covariance_whitening": "whitens its inputs with statistics that are not in its weights",
}


def read(place: Place, source: SaeSource) -> Sae:
    """The SAE of a folder."""
    assert place.config is not None  # the format needs it
    config = json.loads(place.config.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise SteerbackError(f"{place.config}: holds no settings")
    return convert(config, load_file(place.weights), str(place.weights), source.input_scale)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, input_scale: float | None) -> Sae:
    """An SAE from SAELens' settings and weights. `input_scale` is the factor that its training put on the input."""
    architecture = str(config.get("architecture", "standard"))
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    options = config.get("activation_fn_kwargs") or {}
    if activation == "topk":
        architecture, activation = "topk", "relu"
    if architecture not in KINDS:
        raise unknown(f"SAE architecture (in {where})", architecture, KINDS)
    kind = KINDS[architecture]
    if activation not in ("relu", "jumprelu", "topk", None):
        raise SteerbackError(
            f"{where}: activation function {activation!r}; only ReLU, JumpReLU and TopK can be steered"
        )
    if config.get("reshape_activations", "none") not in ("none", None):
        raise SteerbackError(f"{where}: an SAE of attention heads; steering needs one of the residual stream")
    weights = {name: stored(tensor) for name, tensor in tensors.items()}
    _refuse_unknown(weights, kind, where)
    k = config.get("k", options.get("k")) if kind == "topk" else None
    if kind == "topk" and config.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norms(weights)
    if config.get("apply_b_dec_to_input", True):
        weights["b_enc"] = weights["b_enc"] - (weights["b_dec"].float() @ weights["W_enc"].float())
    _fold_scale(weights, config.get("normalize_activations"), input_scale, where)
    threshold = weights["threshold"].clamp(min=0) if kind == "jumprelu" else torch.zeros_like(weights["b_enc"])
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return Sae(kind, _layer(config, where), **{n: weights[n] for n in names}, threshold=threshold, k=k)


def _refuse_unknown(weights: dict[str, Tensor], kind: Kind, where: str) -> None:
    needed = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if kind == "jumprelu" else set())
    if absent := sorted(needed - set(weights)):
        raise SteerbackError(f"{where}: {', '.join(absent)} missing; found {', '.join(sorted(weights)) or 'nothing'}")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights and not torch.allclose(weights.pop(name), torch.ones(())):
            raise SteerbackError(f"{where}: {name} is not 1: activations rescaled after training cannot be folded")
    if strange := sorted(set(weights) - needed - {"threshold"}):
        raise SteerbackError(f"{where}: unknown weights {', '.join(strange)}; they would be left out of the arithmetic")


def _fold_decoder_norms(weights: dict[str, Tensor]) -> None:
    """TopK by activation times decoder norm: the norm moves into the encoder, and the decoder has norm 1."""
    norms = weights["W_dec"].float().norm(dim=1)
    weights["W_enc"] = weights["W_enc"] * norms
    weights["b_enc"] = weights["b_enc"] * norms
    weights["W_dec"] = weights["W_dec"] / norms[:, None]


def _fold_scale(weights: dict[str, Tensor], normalisation: Any, scale: float | None, where: str) -> None:
    """One factor on the input: the encoder takes it up, decoder and decoder bias give it back."""
    if normalisation in PER_INPUT:
        reason = PER_INPUT[normalisation]
        raise SteerbackError(f"{where}: {normalisation} {reason}, which cannot be folded into the weights")
    if normalisation in (True, "expected_average_only_in") and scale is None:
        raise SteerbackError(
            f"{where}: its inputs were scaled by a constant that is not in the file; give it as sae = {{input_scale}}"
        )
    if normalisation not in (None, False, "none", True, "expected_average_only_in"):
        raise SteerbackError(f"{where}: unknown normalize_activations {normalisation!r}")
    if scale is not None:
        if not scale > 0:
            raise SteerbackError(f"{where}: input_scale {scale!r} is not above 0")
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"] = weights["W_dec"] / scale
        weights["b_dec"] = weights["b_dec"] / scale


def _layer(config: Mapping[str, Any], where: str) -> int:
    """The block whose output the SAE reads: what enters a block is what leaves the one before it."""
    details = config.get("metadata") or {}
    hook = str(config.get("hook_name") or config.get("hook_point") or details.get("hook_name"))
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook)
    if found is None or hook == "blocks.0.hook_resid_pre":
        raise SteerbackError(f"{where}: reads {hook!r}; steering needs an SAE of the residual stream after a block")
    return int(found[1]) - (found[2] == "pre")
