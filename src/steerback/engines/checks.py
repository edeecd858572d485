"""Checks of a target and its requests before generation, shared by all engines; errors name the field.

This module needs no loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from steerback.engines.interventions import Site, check
from steerback.errors import SteerbackError
from steerback.records import LEAST_TEMPERATURE, Request, Sampling, is_temperature

if TYPE_CHECKING:
    from steerback.targets import Target
    from steerback.targets.sae import Sae


def site_of(target: Target, n_layers: int, d_model: int, sae: Sae | None, directions: tuple[str, ...]) -> Site:
    """Return the layers for editing and reading; raise SteerbackError if model, SAE and layers do not fit together."""
    if sae is not None:
        sae.check(f"SAE of target {target.name!r}", d_model, n_layers)
        if target.n_latents and target.n_latents != sae.n_latents:
            raise SteerbackError(
                f"target {target.name!r}: n_latents is {target.n_latents}, its SAE has {sae.n_latents}; correct it"
            )
    clamp_layer = target.clamp_layer
    if clamp_layer is None:
        clamp_layer = target.steer_layer if sae is None else sae.layer
    layers = {"steer_layer": target.steer_layer, "read_layer": target.read_layer, "clamp_layer": clamp_layer}
    for field, layer in layers.items():
        if not 0 <= layer < n_layers:
            raise SteerbackError(f"target {target.name!r}: {field} {layer} is outside 0..{n_layers - 1}")
    return Site(
        n_layers=n_layers,
        d_model=d_model,
        steer_layer=target.steer_layer,
        sae_layer=clamp_layer,
        read_layer=target.read_layer,
        n_latents=sae.n_latents if sae is not None else 0,
        directions=directions,
        undirected=() if sae is None else tuple((sae.decoder_norms == 0).nonzero().flatten().tolist()),
    )


def checked(requests: Sequence[Request], site: Site) -> Iterator[tuple[str, Request]]:
    """Yield ("request 'key'", request) for each request after checking it; each key may occur only once."""
    keys: set[str] = set()
    for request in requests:
        where = f"request {request.key!r}"
        if request.key in keys:
            raise SteerbackError(f"{where}: another request has the same key")
        keys.add(request.key)
        check_sampling(where, request.sampling)
        check(where, request.interventions, request.record, site)
        yield where, request


def check_sampling(where: str, sampling: Sampling) -> None:
    """Raise SteerbackError if a sampling setting is out of range; the message names the field."""
    whole = isinstance(sampling.max_new_tokens, int)
    for field, good, valid in (
        ("temperature", is_temperature(sampling.temperature), f"0 (greedy) or at least {LEAST_TEMPERATURE:g}"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < float("inf"), "above 0"),
        ("max_new_tokens", whole and sampling.max_new_tokens >= 1, "a whole number of 1 or more"),
    ):
        if not good:
            value = getattr(sampling, field)
            raise SteerbackError(f"{where}: sampling.{field} {value!r} is out of range; it must be {valid}")
    if "" in sampling.stop:
        raise SteerbackError(f"{where}: sampling.stop contains an empty string, which would stop every response")


def check_length(where: str, prompt: int, new: int, most: int, limit: str, advice: str) -> None:
    """Raise SteerbackError if a prompt is empty or exceeds, with its response, `most` tokens (called `limit`)."""
    if prompt == 0:
        raise SteerbackError(f"{where}: the prompt has no tokens")
    if prompt + new > most:
        raise SteerbackError(
            f"{where}: prompt of {prompt} tokens and max_new_tokens {new} exceed {limit} {most}; shorten the prompt, "
            f"lower max_new_tokens{advice}"
        )


def check_texts(prompts: Sequence[str], responses: Sequence[str], latents: Sequence[int] | None, site: Site) -> None:
    """Raise SteerbackError if no activations can be computed for these texts."""
    if not site.n_latents:
        raise SteerbackError("activations need an SAE, but this target has none")
    if len(prompts) != len(responses):
        raise SteerbackError(f"activations: {len(prompts)} prompts and {len(responses)} responses")
    for latent in latents or ():
        if not 0 <= latent < site.n_latents:
            raise SteerbackError(f"activations: latent {latent} is outside 0..{site.n_latents - 1}")
