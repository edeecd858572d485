"""Pairs of responses to read: unsteered and steered, or steered with and without clamped detectors."""

from __future__ import annotations

from dataclasses import replace

from steerback.errors import SteerbackError
from steerback.jobs.loaded import LabelledCompletion, LoadedTarget
from steerback.organism import EXAMPLES, SteeringExample
from steerback.records import Intervention, LatentKey, Request, Sampling

SEEDS = 8
"""Number of seeds to try. On a machine with other floating-point arithmetic, the first seed may show no restart."""
REFERENCES = 3
"""Number of unsteered responses that the offline judge compares the sentences with."""


def steered_and_not(
    loaded: LoadedTarget, prompt: str, latent: LatentKey, boost: float, seed: int, sampling: Sampling
) -> list[LabelledCompletion]:
    """Return the unsteered and the steered response to a prompt, decoded together."""
    edits = (Intervention("add", loaded.latent(latent), boost),)
    requests = [Request(name, prompt, seed, sampling, e) for name, e in (("plain", ()), ("steered", edits))]
    return [checked(done) for done in loaded.answer(requests)]


def example_of(target: str) -> SteeringExample:
    """Return the example of a built-in target. Raises SteerbackError if the target has none."""
    if target not in EXAMPLES:
        raise SteerbackError(
            f"try {target} needs a prompt, --latent and --boost; targets with a built-in example: {', '.join(EXAMPLES)}"
        )
    return EXAMPLES[target]


def drift_and_restart(loaded: LoadedTarget, example: SteeringExample) -> tuple[LabelledCompletion, LabelledCompletion]:
    """Return a steered response with a restart, and the same request with clamped detectors. Both have drift marks."""
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
    """Return the response. Raises SteerbackError if its receipt differs from its plan."""
    if not done.steered_as_planned:
        raise SteerbackError(f"the response was not steered as planned: {done.receipt}; please report this")
    return done
