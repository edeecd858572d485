"""From a request to what vLLM is sent, once it is known to fit the worker's tables.

Everything a worker cannot do is refused here, in one line that names the field.
"""

from __future__ import annotations

from typing import Any

from steerback.engines.vllm.driver import VllmJob
from steerback.engines.vllm.loading import PreparedTarget
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.errors import SteerbackError
from steerback.records import Request


def job_of(where: str, request: Request, settings: TableSettings, loaded: PreparedTarget) -> VllmJob:
    """Prompt tokens, ticket and sampling of a checked request; SteerbackError for what this engine cannot do."""
    prompt = loaded.prompter.tokens(request.prompt, request.prefill, request.system)
    until = len(prompt) + request.sampling.max_new_tokens
    check_length(settings, where, len(prompt), request.sampling.max_new_tokens)
    return VllmJob(_ticket(where, request, settings, until), prompt, _sampling(request, loaded))


def check_length(settings: TableSettings, where: str, prompt: int, new: int) -> None:
    """Raises SteerbackError if prompt and response cannot both fit the engine's context."""
    if prompt == 0:
        raise SteerbackError(f"{where}: the prompt has no tokens")
    if prompt + new > settings.length:
        raise SteerbackError(
            f"{where}: prompt of {prompt} tokens and max_new_tokens {new} exceed {settings.length}, the "
            "engine's max_model_len; shorten the prompt, lower max_new_tokens or raise max_model_len"
        )


def _ticket(where: str, request: Request, settings: TableSettings, until: int) -> Ticket:
    site, record = settings.site, request.record
    layer = -1 if record is None else site.read_layer if record.layer is None else record.layer
    latents = () if record is None else tuple(record.latents)
    if len(set(latents)) != len(latents):
        raise SteerbackError(f"{where}: record.latents names a latent twice")
    ticket = Ticket(request.key, request.interventions, latents, layer, until)
    check_ticket(where, ticket, settings)
    if until * len(latents) > settings.room:
        raise SteerbackError(
            f"{where}: record.latents: {len(latents)} latents at {until} positions are more than the "
            f"{settings.room} values prepared for a request; start the engine with a higher record_latents"
        )
    return ticket


def check_ticket(where: str, ticket: Ticket, settings: TableSettings) -> None:
    """Raises SteerbackError if the tables lack a layer or the columns for a request, which would wait for ever."""
    used = [(f"interventions[{n}].layer", settings.site.layer_of(edit)) for n, edit in enumerate(ticket.edits)]
    for field, wanted in [*used, *([("record.layer", ticket.layer)] if ticket.layer >= 0 else [])]:
        if wanted not in settings.layers:
            raise SteerbackError(
                f"{where}: {field} {wanted} is not prepared; this engine edits and reads layers "
                f"{', '.join(map(str, settings.layers))}; start it with layers=[{wanted}] as well"
            )
    if len(ticket.latents()) > settings.columns:
        raise SteerbackError(
            f"{where}: {len(ticket.latents())} latents clamped or recorded, the engine has {settings.columns} "
            "columns; start it with more columns"
        )


def _sampling(request: Request, loaded: PreparedTarget) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams; what ends a response is what does so in the reference engine."""
    sampling = request.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed % (1 << 31),
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(loaded.ends),
        "ignore_eos": True,
        "detokenize": bool(sampling.stop),
    }
