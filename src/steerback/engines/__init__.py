"""Engines turn requests into completions: `base` is the protocol, `transformers` the reference, `scripted` the fake."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from steerback.errors import unknown
from steerback.targets.fit import check_ready, fetch, gpus

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.targets import Target

ENGINES = ("transformers", "vllm", "scripted")


def default_engine() -> str:
    """The engine that `auto` means on this machine: vLLM where it is installed and there is a GPU for it."""
    if find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.device_count() else "transformers"  # counting does not initialise CUDA


def make_engine(target: Target, name: str = "auto", **options: Any) -> Engine:
    """Loads a target into the named engine ("auto": `default_engine()`); options that are None are left out.

    transformers: batch_size, device. vllm: see `VllmEngine`. scripted: script (a function or PlantedModel).
    Raises SteerbackError for an option that the engine does not know.
    """
    given = {key: value for key, value in options.items() if value is not None}
    chosen, make = check_engine(name, given)
    if chosen == "vllm":
        room = sum(size for _, size in gpus()[: given.get("tensor_parallel", 1)])
        check_ready(target, "GPU memory", room, dict(given.get("options", {})).get("quantization"))
        fetch(target)
    elif chosen == "scripted":
        from steerback.engines.scripted import PlantedModel

        given.pop("batch_size", None)  # a fake has no batches
        prior = target.boost_prior
        given.setdefault("script", PlantedModel(threshold=prior.mean, slope=prior.sd / 5))
        given |= {"target": target.name, "n_latents": target.n_latents}
        return make(**given)
    if target.direction_files and "directions" not in given:
        from steerback.targets.directions import load_directions

        given["directions"] = load_directions(target.direction_files, target.steer_layer, target.name)
    return make(target, **given)


def check_engine(name: str, options: Mapping[str, Any]) -> tuple[str, Callable[..., Engine]]:
    """What `name` means here, and what makes it; SteerbackError if it is not there or does not know an option."""
    chosen = default_engine() if name == "auto" else name
    make: Any
    if chosen == "transformers":
        from steerback.engines.transformers import TransformersEngine as make
    elif chosen == "vllm":
        from steerback.engines.vllm.engine import VllmEngine as make
    elif chosen == "scripted":
        from steerback.engines.scripted import ScriptedEngine as make
    else:
        raise unknown("engine", name, ("auto", *ENGINES))
    known = [p for p in inspect.signature(make).parameters if p != "target"]
    for key in options:
        if key not in known and (chosen, key) != ("scripted", "batch_size"):
            raise unknown(f"option of engine {chosen!r}", key, known)
    if chosen == "vllm" and find_spec("vllm") is None:
        from steerback.engines.vllm.loading import require_vllm

        require_vllm()  # importing it takes long: done here only to say what is missing
    return chosen, make
