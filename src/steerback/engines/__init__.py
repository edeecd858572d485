"""Engines turn requests into completions. `base` is the protocol, `transformers` the reference, `scripted` the fake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steerback.errors import SteerbackError, unknown

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.targets import Target

ENGINES = ("transformers", "scripted")


def default_engine() -> str:
    """The engine that `auto` means on this machine."""
    return "transformers"


def make_engine(target: Target, name: str = "auto", **options: Any) -> Engine:
    """Loads a target into the named engine ("auto": `default_engine()`); options that are None are left out.

    transformers: batch_size, device. scripted: script (a function or PlantedModel).
    """
    chosen = default_engine() if name == "auto" else name
    given = {key: value for key, value in options.items() if value is not None}
    if chosen == "transformers":
        from steerback.engines.transformers import TransformersEngine

        return TransformersEngine(target, **given)
    if chosen == "scripted":
        from steerback.engines.scripted import PlantedModel, ScriptedEngine

        given.pop("batch_size", None)  # a fake has no batches
        prior = target.boost_prior
        script = given.pop("script", None) or PlantedModel(threshold=prior.mean, slope=prior.sd / 5)
        return ScriptedEngine(script, target=target.name, n_latents=target.n_latents, **given)
    if chosen == "vllm":
        raise SteerbackError("engine 'vllm' is not part of this version; use --engine transformers")
    raise unknown("engine", name, ("auto", *ENGINES))
