"""Convert a request to vLLM's form after checking that it fits the worker's tables; self-test of a new engine.

A request that a worker cannot handle is refused with one line that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerback.engines import checks
from steerback.engines.vllm.driver import Driver, SamplingFields, VllmJob
from steerback.engines.vllm.loading import PreparedTarget
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.errors import SteerbackError
from steerback.records import Intervention, LatentKey, Request

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

TOLERANCE = 1e-3
"""Maximum relative error of an edit on random residuals in float32."""


def job_of(
    where: str, request: Request, settings: TableSettings, prepared: PreparedTarget, adapter: LoRARequest | None
) -> VllmJob:
    """Return prompt tokens, ticket and sampling of a checked request; raise SteerbackError if vLLM cannot run it."""
    prompt, sampling = prepared.prompter.prompt(request), request.sampling
    until = len(prompt) + sampling.max_new_tokens
    check_length(settings, where, len(prompt), sampling.max_new_tokens)
    latents = () if request.record is None else tuple(request.record.latents)
    if len(set(latents)) != len(latents):
        raise SteerbackError(f"{where}: record.latents names a latent twice")
    layer = settings.site.record_layer(request.record)
    boundary = None if request.prefix is None else request.boundary(len(prompt))
    ticket = Ticket(request.key, request.interventions, latents, -1 if layer is None else layer, until, boundary)
    check_ticket(where, ticket, settings)
    if until * len(latents) > settings.room:
        raise SteerbackError(
            f"{where}: record.latents: {len(latents)} latents at {until} positions are more than the "
            f"{settings.room} values prepared for a request; start the engine with a higher record_latents"
        )
    fields: SamplingFields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed % (1 << 31),
        "stop": list(sampling.stop),
        "stop_token_ids": sorted(prepared.ends),  # the same end tokens as in the reference engine
        "ignore_eos": True,
        "detokenize": bool(sampling.stop),
    }
    return VllmJob(ticket, prompt, fields, adapter)


def check_stops(requests: Sequence[Request]) -> None:
    """Raise SteerbackError for a request with stop strings, to an engine that was started without them."""
    if asking := [request.key for request in requests if request.sampling.stop]:
        raise SteerbackError(
            f"request {asking[0]!r} has stop strings, which need vLLM's tokenizer: start this engine with "
            "stop_strings=true"
        )


def check_length(settings: TableSettings, where: str, prompt: int, new: int) -> None:
    """Raise SteerbackError if prompt and response exceed the engine's context."""
    checks.check_length(where, prompt, new, settings.length, "the engine's max_model_len of", " or raise max_model_len")


def check_ticket(where: str, ticket: Ticket, settings: TableSettings) -> None:
    """Raise SteerbackError if the tables lack the layer or columns of a request, which would wait forever."""
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


def steering_fault(
    driver: Driver,
    settings: TableSettings,
    prompt: tuple[int, ...],
    boost: float,
    latent: int | None,
    adapter: LoRARequest | None,
) -> str | None:
    """Test arithmetic, hooks and effect of steering on each worker of a new engine; return the fault, or None.

    A release of vLLM may move a hook point without an error, and an unsteered model would then be reported as steered.
    `boost` is a strong one for this target, `latent` one with a nonzero decoder row (None: the target has no SAE).
    """
    site = settings.site
    latents: list[LatentKey] = [*([] if latent is None else [latent]), *site.directions[:1]]
    if not latents:
        return None
    few = range(min(site.n_latents, settings.columns, 3))
    clamps = [Intervention("scale" if k % 2 else "clamp", k, 1.5, layer=n) for k in few for n in settings.layers]
    mixed = Ticket("check", (Intervention("add", latents[0], 2.0, "generated"), *clamps))
    for error in driver.call("steerback_check", mixed.as_args(), 0):
        if not error < TOLERANCE:  # also true for NaN
            return f"its edits are off by {error:.1e} of their size"
    edits = (Intervention("add", latents[0], boost),)
    sampling = SamplingFields(temperature=0.0, max_tokens=3, logprobs=5, ignore_eos=True, detokenize=False)
    plans = (("plain", ()), ("steered", edits), ("again", ()))
    jobs = [VllmJob(Ticket(key, e), prompt, sampling, adapter) for key, e in plans]
    plain, steered, again = (driver.submit(job).result() for job in jobs)
    entry = steered.entry or {}
    if (entry.get("prompt"), entry.get("generated")) != (len(prompt), 2):
        return f"of {len(prompt)} + 2 positions it edited {entry.get('prompt')} + {entry.get('generated')}"
    first, pushed, later = (
        {token: v.logprob for token, v in answer.output.outputs[0].logprobs[0].items()}
        for answer in (plain, steered, again)
    )
    if all(abs(value - pushed.get(token, -math.inf)) < 1e-6 for token, value in first.items()):
        return "a strong addition does not change the next token's probabilities"
    best = max(first, key=lambda token: first[token])
    if abs(first[best] - later.get(best, -math.inf)) > 0.1:  # two equally likely tokens may change places
        return "an unsteered request differs before and after a steered one"
    return None


def spans(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return ascending positions as [first, last + 1) pairs."""
    out: list[list[int]] = []
    for at in positions:
        if out and out[-1][1] == at:
            out[-1][1] = at + 1
        else:
            out.append([at, at + 1])
    return tuple((a, b) for a, b in out)
