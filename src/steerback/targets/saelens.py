"""Convert SAEs of SAELens (versions 3 to 6) to the convention of `targets.sae`, and save SAEs in the form of version 6.

These conventions are folded into the weights: a decoder bias subtracted from the input, TopK weighted by decoder norms,
one factor on the input. Operations that depend on each input (layer norm, rescaling to a norm) cannot be folded and are
refused, as are SAEs that do not read the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ConfigDict
from torch import Tensor

from steerback.config import Settings, parse
from steerback.errors import SteerbackError, unknown
from steerback.store.files import make_folder, write_atomic, write_json
from steerback.targets.sae import TENSORS, Sae, stored
from steerback.targets.target import Kind

KINDS: Mapping[str, Kind] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}
PER_INPUT = {
    "layer_norm": "standardises each input by itself",
    "constant_norm_rescale": "rescales each input to one norm",
    "covariance_whitening": "whitens its inputs with statistics that are not in its weights",
}
SCALED = (True, "expected_average_only_in")
WRITTEN_AS = "6.0.0"
"""Version of SAELens whose file format `save_saelens` writes."""


class _Part(Settings):
    """Base of settings that ignore keys without influence on the arithmetic."""

    model_config = ConfigDict(extra="ignore", strict=True)


class ActivationOptions(_Part):
    """Options of the activation function, in configs before SAELens 6."""

    k: int | None = None


class TrainingNotes(_Part):
    """The key `metadata` of a config since SAELens 6."""

    hook_name: str | None = None


class SaeLensConfig(_Part):
    """A `cfg.json` of SAELens."""

    architecture: str | None = "standard"
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: ActivationOptions | None = None
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    apply_b_dec_to_input: bool = True
    normalize_activations: bool | str | None = None
    reshape_activations: str | None = None
    hook_name: str | None = None
    hook_point: str | None = None
    metadata: TrainingNotes | None = None


def convert(
    settings: Mapping[str, object], tensors: Mapping[str, Tensor], where: str, input_scale: float | None
) -> Sae:
    """Return an SAE from SAELens' settings and weights; `input_scale` is the factor on the inputs in its training.

    Raises SteerbackError that names a setting which cannot be folded into the weights.
    """
    config = parse(SaeLensConfig, settings, where)
    activation = config.activation_fn or config.activation_fn_str or "relu"
    architecture = "topk" if activation == "topk" else config.architecture or "standard"
    if architecture not in KINDS:
        raise unknown(f"SAE architecture (in {where})", architecture, KINDS)
    if activation not in ("relu", "jumprelu", "topk"):
        raise SteerbackError(
            f"{where}: activation function {activation!r}; only ReLU, JumpReLU and TopK can be steered"
        )
    if config.reshape_activations not in ("none", None):
        raise SteerbackError(f"{where}: an SAE of attention heads; steering needs an SAE of the residual stream")
    kind = KINDS[architecture]
    weights = {name: stored(tensor, f"{where}: {name}") for name, tensor in tensors.items()}
    _refuse_unknown(weights, kind, where)
    if kind == "topk" and config.rescale_acts_by_decoder_norm:
        norms = weights["W_dec"].float().norm(dim=1)  # its TopK ranks activations times these norms
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if config.apply_b_dec_to_input:  # before the scale: SAELens subtracts the bias from the scaled input
        weights["b_enc"] = weights["b_enc"] - (weights["b_dec"].float() @ weights["W_enc"].float())
    _fold_scale(weights, config.normalize_activations, input_scale, where)
    stated = weights.pop("threshold", None)
    threshold = stated.clamp(min=0) if kind == "jumprelu" and stated is not None else torch.zeros_like(weights["b_enc"])
    options = config.activation_fn_kwargs or ActivationOptions()
    k = (config.k or options.k) if kind == "topk" else None
    return Sae(kind, _layer(config, where), threshold=threshold, k=k, **weights)


def _refuse_unknown(weights: dict[str, Tensor], kind: Kind, where: str) -> None:
    """Raise SteerbackError unless the weights have the names of the kind; remove scaling factors equal to 1."""
    needed = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if kind == "jumprelu" else set())
    if absent := sorted(needed - set(weights)):
        raise SteerbackError(f"{where}: lacks {', '.join(absent)}; has {', '.join(sorted(weights)) or 'no weights'}")
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights and not torch.allclose(weights.pop(name).float(), torch.ones(())):
            raise SteerbackError(f"{where}: {name} is not 1: activations rescaled after training cannot be folded")
    if strange := sorted(set(weights) - needed - {"threshold"}):
        raise SteerbackError(f"{where}: unknown weights {', '.join(strange)}; the arithmetic would ignore them")


def _fold_scale(weights: dict[str, Tensor], normalisation: bool | str | None, scale: float | None, where: str) -> None:
    """Fold one factor on the input into the weights: multiply the encoder, divide decoder and decoder bias."""
    if isinstance(normalisation, str) and normalisation in PER_INPUT:
        reason = PER_INPUT[normalisation]
        raise SteerbackError(f"{where}: {normalisation} {reason}, which cannot be folded into the weights")
    if normalisation not in (None, False, "none", *SCALED):
        raise SteerbackError(f"{where}: unknown normalize_activations {normalisation!r}")
    if scale is None:
        if normalisation in SCALED:
            raise SteerbackError(
                f"{where}: its inputs were scaled by a constant that is not in the file; "
                "set it as sae = {input_scale}"
            )
        return
    if not 0 < scale < float("inf"):
        raise SteerbackError(f"{where}: input_scale {scale!r} must be a finite number above 0")
    weights["W_enc"] = weights["W_enc"] * scale
    for name in ("W_dec", "b_dec"):
        weights[name] = weights[name] / scale


def _layer(config: SaeLensConfig, where: str) -> int:
    """Return the block whose output the SAE reads; the input of a block is the output of the block before."""
    notes = config.metadata or TrainingNotes()
    hook = config.hook_name or config.hook_point or notes.hook_name or ""
    match = re.fullmatch(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)", hook)
    if match is None or hook == "blocks.0.hook_resid_pre":
        raise SteerbackError(f"{where}: reads {hook!r}; steering needs an SAE of the residual stream after a block")
    return int(match[1]) - (match[2] == "pre")


def save_saelens(sae: Sae, folder: Path, model: str) -> None:
    """Write an SAE in SAELens' format (`sae_weights.safetensors`, `cfg.json`); `model` is the name of its model."""
    from safetensors.torch import save

    kept = [name for name in TENSORS if name != "threshold" or sae.kind == "jumprelu"]
    tensors = {name: getattr(sae, name).detach().to("cpu", torch.float32).contiguous() for name in kept}
    architecture = next(theirs for theirs, ours in KINDS.items() if ours == sae.kind)
    config = {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": WRITTEN_AS,
            "hook_name": f"blocks.{sae.layer}.hook_resid_post",
            "model_name": model,
        },
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.kind == "topk" else {}),
    }
    make_folder(folder)
    write_atomic(folder / "sae_weights.safetensors", save(tensors))
    write_json(folder / "cfg.json", config)
