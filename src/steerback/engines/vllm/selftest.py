"""Whether an engine that has just started steers at all: arithmetic, hooks and effect, on every worker.

A release of vLLM may move a hook point without an error; what then runs is an unsteered model that looks steered.
"""

from __future__ import annotations

import math

from steerback.engines.vllm.driver import Driver, VllmJob
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.records import Intervention

TOLERANCE = 1e-3
"""Largest error of an edit, relative to its size, on random residuals in float32."""


def fault(
    driver: Driver, settings: TableSettings, prompt: tuple[int, ...], boost: float, latent: int | None
) -> str | None:
    """What is wrong with an engine's steering, if anything.

    `boost` is a strong one for this target, `latent` one with a decoder direction (None: it has no SAE).
    """
    site = settings.site
    latents: list[int | str] = [*([] if latent is None else [latent]), *site.directions[:1]]
    if not latents:
        return None
    few = range(min(site.n_latents, settings.columns, 3))
    clamps = [Intervention("clamp", k, 1.5, layer=n) for k in few for n in settings.layers]
    mixed = Ticket("check", (Intervention("add", latents[0], 2.0, "generated"), *clamps))
    for error in driver.call("steerback_check", mixed.as_args(), 0):
        if not error < TOLERANCE:  # nor NaN
            return f"its edits are off by {error:.1e} of their size"
    edits = (Intervention("add", latents[0], boost),)
    sampling = {"temperature": 0.0, "max_tokens": 3, "logprobs": 5, "ignore_eos": True, "detokenize": False}
    jobs = [VllmJob(Ticket(key, e), prompt, sampling) for key, e in (("plain", ()), ("steered", edits), ("again", ()))]
    plain, steered, again = (driver.submit(job).result() for job in jobs)
    entry = steered.entry or {}
    if (entry.get("prompt"), entry.get("generated")) != (len(prompt), 2):
        return f"of {len(prompt)} + 2 positions it edited {entry.get('prompt')} + {entry.get('generated')}"
    found = [{t: v.logprob for t, v in a.output.outputs[0].logprobs[0].items()} for a in (plain, steered, again)]
    if all(abs(value - found[1].get(token, -math.inf)) < 1e-6 for token, value in found[0].items()):
        return "a strong addition leaves the next token's probabilities as they were"
    best = max(found[0], key=lambda token: found[0][token])
    if abs(found[0][best] - found[2].get(best, -math.inf)) > 0.1:  # two equally good tokens may change places
        return "an unsteered request differs before and after a steered one"
    return None
