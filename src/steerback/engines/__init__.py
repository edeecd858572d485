"""Engines turn requests into completions: `base` is the protocol, `transformers` the reference, `scripted` a fake."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from steerback.engines.options import (
    ENGINES,
    EngineOptions,
    RayOptions,
    ScriptedOptions,
    TransformersOptions,
    VllmOptions,
    parse_options,
)
from steerback.errors import SteerbackError
from steerback.targets.fit import check_ready, fetch, gpus

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.engines.base import Engine
    from steerback.targets import Target

__all__ = ["ENGINES", "EngineOptions", "TransformersOptions", "check_engine", "default_engine", "make_engine"]


def default_engine() -> str:
    """Return the engine for `auto`: vLLM if it is installed and a GPU is visible, else transformers."""
    if find_spec("vllm") is None:
        return "transformers"
    import torch

    return "vllm" if torch.cuda.device_count() else "transformers"  # device_count() does not initialise CUDA


def check_engine(name: str, values: Mapping[str, object], batch_size: int | None = None) -> EngineOptions:
    """Return the checked options of engine `name`; "auto" selects `default_engine()`.

    Raises SteerbackError if the engine is unknown or not installed, or if an option is unknown or has an invalid value.
    """
    options = parse_options(default_engine() if name == "auto" else name, values, batch_size)
    if isinstance(options, VllmOptions) and find_spec("vllm") is None:
        from steerback.engines.vllm.loading import require_vllm

        require_vllm()  # raises an error with the install command; importing vllm would take seconds
    if isinstance(options, RayOptions) and find_spec("ray") is None:
        raise SteerbackError("the ray engine needs Ray: pip install 'steerback[ray]'")
    return options


def make_engine(target: Target, options: EngineOptions, directions: Mapping[str, Tensor] | None = None) -> Engine:
    """Load a target into the engine that matches the type of `options`; `directions` default to those of the target."""
    if isinstance(options, ScriptedOptions):
        from steerback.engines.scripted import PlantedModel, ScriptedEngine

        prior = target.boost_prior
        return ScriptedEngine(
            options.script or PlantedModel(threshold=prior.mean, slope=prior.sd / 5),
            target=target.name,
            n_latents=target.n_latents,
            fail_receipts=options.fail_receipts,
            raise_on=options.raise_on,
            shuffled=options.shuffled,
        )
    if isinstance(options, VllmOptions):
        devices = gpus()
        memory = sum(size for _, size in devices[: options.tensor_parallel]) // options.per_gpu(len(devices))
        quantization = options.options.get("quantization")
        check_ready(target, "GPU memory", memory, None if quantization is None else str(quantization))
        fetch(target)
    if directions is None and target.direction_files:
        from steerback.targets.directions import load_directions

        directions = load_directions(target.direction_files, target.steer_layer, target.name)
    if isinstance(options, RayOptions):
        from steerback.engines.ray.engine import RayEngine

        return RayEngine(target, options, directions, make_engine)
    if isinstance(options, VllmOptions):
        from steerback.engines.vllm.engine import VllmEngine

        return VllmEngine(target, options, directions)
    from steerback.engines.loading import load
    from steerback.engines.transformers import TransformersEngine

    loaded = load(target, options.device, tuple(directions or ()))
    return TransformersEngine(loaded, options.batch_size, directions, options.workers)
