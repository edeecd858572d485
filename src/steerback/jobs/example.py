"""One prompt steered, for reading: beside the unsteered response, or beside one in which the detectors are clamped."""

from __future__ import annotations

from dataclasses import replace

from steerback.errors import SteerbackError
from steerback.jobs.loaded import LabelledCompletion, LoadedTarget
from steerback.organism import EXAMPLES, SteeringExample
from steerback.records import Intervention, LatentKey, Request, Sampling

SEEDS = 8
"""How many seeds are tried: where arithmetic differs from that of the example's machine, the first may not restart."""
REFERENCES = 3
"""Unsteered responses with which the sentences of the steered one are compared."""


def steered_and_not(
    loaded: LoadedTarget, prompt: str, latent: LatentKey, boost: float, seed: int, sampling: Sampling
) -> list[LabelledCompletion]:
    """Return the unsteered and the steered response to a prompt, decoded together."""
    edits = (Intervention("add", loaded.latent(latent), boost),)
    requests = [Request(name, prompt, seed, sampling, e) for name, e in (("plain", ()), ("steered", edits))]
    return [checked(done) for done in loaded.answer(requests)]


def example_of(target: str) -> SteeringExample:
    """Return the example of a built-in target. Raises SteerbackError for one that has none."""
    if target not in EXAMPLES:
        raise SteerbackError(
            f"try {target} needs a prompt, --latent and --boost; an example of its own has: {', '.join(EXAMPLES)}"
        )
    return EXAMPLES[target]


def drift_and_restart(loaded: LoadedTarget, example: SteeringExample) -> tuple[LabelledCompletion, LabelledCompletion]:
    """Return a steered response that restarts, and the one with the detectors clamped; drift is marked in both."""
    sampling = Sampling(max_new_tokens=loaded.target.max_new_tokens or 512)
    steering = (Intervention("add", loaded.latent(example.latent), example.boost),)
    clamps = tuple(Intervention("clamp", latent, 0.0) for latent in example.detectors)

    def asked(seed: int) -> list[Request]:
        first = Request(f"steered {seed}", example.prompt, seed, sampling, steering)
        return [first, replace(first, key=f"clamped {seed}", interventions=(*steering, *clamps))]

    plain = [Request(f"plain {n}", example.prompt, example.seed + n, sampling) for n in range(REFERENCES)]
    steered, clamped, *unsteered = loaded.answer([*asked(example.seed), *plain])
    if not steered.restarts:
        more = loaded.answer([r for n in range(1, SEEDS) for r in asked(example.seed + n)])
        both = zip(more[::2], more[1::2], strict=True)
        steered, clamped = next((pair for pair in both if pair[0].restarts), (steered, clamped))
    steered, clamped = loaded.with_drift([checked(steered), checked(clamped)], unsteered)
    return steered, clamped


def checked(done: LabelledCompletion) -> LabelledCompletion:
    """Return a response that was steered as planned; any other is a fault."""
    if not done.steered_as_planned:
        raise SteerbackError(f"the response was not steered as planned: {done.receipt}; please report this")
    return done
