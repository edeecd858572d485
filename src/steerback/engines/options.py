"""Options of each engine: parsed once from a run's `engine_options`, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from steerback.config import Settings, parse
from steerback.errors import unknown
from steerback.records import Completion, Request

GPU_MEMORY = 0.9
"""Share of a GPU's memory that vLLM's engines take together; the rest is for CUDA itself."""


SMALL = 50_000_000
"""Models with fewer parameters than this run in one-threaded batches side by side on a CPU."""


class TransformersOptions(Settings):
    """Options of the transformers engine."""

    batch_size: int | None = Field(None, ge=1)
    """Rows that decode together; None: estimated from the machine's memory."""
    device: str | None = None
    """`cuda`, `mps` or `cpu`; None: the first of these that this machine has."""
    workers: int | None = Field(None, ge=1)
    """Batches that decode side by side; None: one per thread (at most 4) for small models on a CPU, else 1."""


REFUSED = {
    **dict.fromkeys(
        ("model", "revision", "worker_cls", "additional_config", "disable_log_stats"), "is set by steerback"
    ),
    "max_model_len": "is set with max_model_len",
    "max_num_seqs": "is set with batch_size",
    "tensor_parallel_size": "is set with tensor_parallel",
    "data_parallel_size": "is set with replicas",
    "pipeline_parallel_size": "is refused: this engine does not steer under pipeline parallelism; use tensor_parallel",
    "speculative_config": "is refused: steering was not tested with speculative decoding",
    "enable_dbo": "is refused: steering was not tested with dual-batch overlap",
    "trust_remote_code": "is refused: code in a model's folder is never run",
}
"""Arguments of vLLM's engine that a user may not set, with the reason."""


class VllmOptions(Settings):
    """Options of the vLLM engine."""

    batch_size: int | None = Field(None, ge=1)
    """Requests that run together (vLLM's `max_num_seqs`); None: 256 with a GPU, else 64."""
    replicas: int = Field(1, ge=1)
    """Engines side by side, each with `tensor_parallel` GPUs; requests are dealt to them in turn.

    With `tensor_parallel` 1, more engines than GPUs share them, each with an equal part of the memory.
    """
    tensor_parallel: int = Field(1, ge=1)
    """GPUs per engine."""
    max_model_len: int | None = Field(None, ge=1)
    """Longest prompt and response together, at most the model's context; None: 4096."""
    layers: tuple[int, ...] = ()
    """Layers that interventions and recordings may name besides the target's steer, SAE and read layer."""
    columns: int = Field(128, ge=0)
    """Distinct latents that may be clamped or recorded at one time, over all requests in flight."""
    record_latents: int = Field(32, ge=0)
    """Latents that a request of full length may record; a shorter request may record more."""
    poolers: int = Field(128, ge=1)
    """Texts over which the whole SAE is pooled at one time."""
    options: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's engine."""

    def per_gpu(self, available: int) -> int:
        """Return how many replicas share a GPU at most, of `available` ones (0: there are none)."""
        return max(1, -(-self.replicas // available)) if available and self.tensor_parallel == 1 else 1

    def memory(self, available: int) -> dict[str, JsonValue]:
        """Return vLLM's argument for the share of a GPU's memory, if replicas share it; a user's own value wins."""
        sharing = self.per_gpu(available)
        return {"gpu_memory_utilization": math.floor(1000 * GPU_MEMORY / sharing) / 1000} if sharing > 1 else {}

    @field_validator("options")
    @classmethod
    def _may_be_set(cls, options: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        for name in options:
            if name in REFUSED:
                raise ValueError(f"{name} {REFUSED[name]}")
        return options


class ScriptedOptions(Settings):
    """Options of the scripted engine; see `ScriptedEngine`."""

    batch_size: int | None = Field(None, ge=1)
    """Accepted so that a run's batch size may stay set; a script has no batches."""
    script: Callable[[Request], str | Completion] | None = None
    fail_receipts: Callable[[Request], bool] | None = None
    raise_on: Callable[[Request], bool] | None = None
    shuffled: bool = False


class RayOptions(Settings):
    """Options of the Ray engine: workers on the machines of a cluster."""

    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    """Engine of each worker."""
    options: Mapping[str, object] = Field(default_factory=dict)
    """Options of that engine."""
    workers: int = Field(1, ge=1)
    """Workers asked for. The run starts with the first that is ready; others join when a machine has room."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs of each worker, all on one machine (vLLM: tensor parallelism over them); None: 1 for vLLM, else 0."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores that the cluster reserves for each worker."""
    address: str | None = None
    """Address of the cluster (`auto` or HOST:PORT); None: the one on this machine, started if there is none."""
    attempts: int = Field(3, ge=1)
    """Workers that may end with a request before the request is given up and its trial marked."""
    deadline: float = Field(900.0, gt=0)
    """Seconds without a response after which a busy worker is replaced."""
    in_flight: int | None = Field(None, ge=1)
    """Most requests that a worker holds at one time; None: enough to keep its engine full."""
    batch_size: int | None = Field(None, ge=1)
    """Requests that decode together in each worker."""

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_whole_or_a_share(cls, each: float | None) -> float | None:
        if each is not None and each > 1 and each != int(each):
            raise ValueError("has to be a whole number, or a fraction below 1 where workers share a GPU")
        return each

    @field_validator("address")
    @classmethod
    def _is_no_client(cls, address: str | None) -> str | None:
        if address is not None and "://" in address:
            raise ValueError(
                "has to be auto or HOST:PORT; Ray Client (ray://) is not supported: start steerback on a "
                "machine of the cluster"
            )
        return address

    @property
    def gpus(self) -> float:
        """GPUs of each worker; a fraction where workers share one."""
        each = int(self.engine == "vllm") if self.gpus_per_worker is None else self.gpus_per_worker
        return int(each) if each == int(each) else each  # Ray takes whole numbers or fractions of one

    @property
    def inner(self) -> TransformersOptions | VllmOptions | ScriptedOptions:
        """Checked options of the workers' engine."""
        given = dict(self.options)
        if self.engine == "vllm" and self.gpus > 1:
            given.setdefault("tensor_parallel", self.gpus)
        if self.engine == "vllm" and 0 < self.gpus < 1:
            share = VllmOptions(replicas=math.ceil(1 / self.gpus)).memory(1)
            given["options"] = {**share, **parse(VllmOptions, given, "engine_options.options").options}
        options = parse_options(self.engine, given, self.batch_size)
        assert not isinstance(options, RayOptions)
        return options


EngineOptions = TransformersOptions | VllmOptions | ScriptedOptions | RayOptions

ENGINES: Mapping[str, type[EngineOptions]] = {
    "transformers": TransformersOptions,
    "vllm": VllmOptions,
    "scripted": ScriptedOptions,
    "ray": RayOptions,
}


def parse_options(engine: str, values: Mapping[str, object], batch_size: int | None = None) -> EngineOptions:
    """Return the checked options of an engine; options that are None keep their default.

    `batch_size` is used unless `values` name one. Raises SteerbackError for an unknown engine, option, type or value.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ("auto", *ENGINES))
    chosen = {key: value for key, value in {"batch_size": batch_size, **values}.items() if value is not None}
    options = parse(ENGINES[engine], chosen, f"engine_options of {engine!r}")
    if isinstance(options, RayOptions):
        _ = options.inner  # a wrong option of the workers' engine shows now
    return options
