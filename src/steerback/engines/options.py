"""Options of each engine, parsed from a run's `engine_options` before any model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import Field, JsonValue, field_validator

from steerback.config import Settings, parse
from steerback.errors import unknown
from steerback.records import Completion, Request

GPU_MEMORY = 0.9
"""Share of a GPU's memory for all vLLM engines on it together; CUDA needs the rest."""


SMALL = 50_000_000
"""Number of parameters below which a model on a CPU decodes in several one-threaded batches."""


class TransformersOptions(Settings):
    """Options of the transformers engine."""

    batch_size: int | None = Field(None, ge=1)
    """Rows that decode together; None: estimated from the machine's memory."""
    device: str | None = None
    """`cuda`, `mps` or `cpu`; None: the first of these that is available."""
    workers: int | None = Field(None, ge=1)
    """Batches that decode in parallel; None: one per thread (at most 4) for small models on a CPU, else 1."""


REFUSED = {
    **dict.fromkeys(
        ("model", "revision", "worker_cls", "additional_config", "disable_log_stats"), "is set by steerback"
    ),
    "max_model_len": "is set with max_model_len",
    "max_num_seqs": "is set with batch_size",
    "tensor_parallel_size": "is set with tensor_parallel",
    "data_parallel_size": "is set with replicas",
    "pipeline_parallel_size": "is refused: this engine does not steer under pipeline parallelism; use tensor_parallel",
    "skip_tokenizer_init": "is set with stop_strings",
    "speculative_config": "is refused: steering was not tested with speculative decoding",
    "enable_dbo": "is refused: steering was not tested with dual-batch overlap",
    "trust_remote_code": "is refused: code in a model's folder is never run",
}
"""Arguments of vLLM's engine that users may not set, with the reason."""


class VllmOptions(Settings):
    """Options of the vLLM engine."""

    batch_size: int | None = Field(None, ge=1)
    """Requests that run together in one engine (vLLM's `max_num_seqs`); None: 512 with a GPU (divided by the engines
    that share it, at least 128), else 64."""
    replicas: int = Field(1, ge=1)
    """Parallel engines, each with `tensor_parallel` GPUs. Each request goes to the engine with the fewest.

    If there are more engines than GPUs (only with `tensor_parallel` 1), engines share GPUs and divide the memory
    equally.
    """
    tensor_parallel: int = Field(1, ge=1)
    """GPUs per engine."""
    max_model_len: int | None = Field(None, ge=1)
    """Maximum length of prompt and response together, at most the model's context; None: 4096."""
    layers: tuple[int, ...] = ()
    """Further layers for interventions and recordings, in addition to the target's steer, SAE and read layers."""
    columns: int = Field(128, ge=0)
    """Distinct latents that can be clamped or recorded at one time, over all running requests."""
    record_latents: int = Field(32, ge=0)
    """Latents that a request of full length can record; a shorter request can record more."""
    adapters: tuple[str, ...] = ()
    """Folders of LoRA adapters that the engine can serve with its model, one at a time. Fine-tuning sets its own."""
    poolers: int = Field(128, ge=1)
    """Texts that can be pooled over the whole SAE at one time."""
    stop_strings: bool = False
    """Whether requests may have stop strings, for which vLLM needs the tokenizer: it copies it, which takes seconds."""
    options: Mapping[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of vLLM's engine."""

    def per_gpu(self, available: int) -> int:
        """Return how many replicas share one GPU at most, for `available` GPUs (may be 0)."""
        return max(1, -(-self.replicas // available)) if available and self.tensor_parallel == 1 else 1

    def memory(self, available: int) -> dict[str, JsonValue]:
        """Return vLLM's argument for the share of GPU memory if replicas share a GPU; the user's value has priority."""
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
    """Accepted so that a run may set a batch size; the scripted engine has no batches."""
    script: Callable[[Request], str | Completion] | None = None
    fail_receipts: Callable[[Request], bool] | None = None
    raise_on: Callable[[Request], bool] | None = None
    shuffled: bool = False


class RayOptions(Settings):
    """Options of the Ray engine, which starts workers on the machines of a cluster."""

    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    """Engine of each worker."""
    options: Mapping[str, object] = Field(default_factory=dict)
    """Options of that engine."""
    workers: int = Field(1, ge=1)
    """Requested number of workers. The run starts with the first ready worker; others join when a machine has room."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs per worker, all on one machine (with vLLM: for tensor parallelism); None: 1 for vLLM, else 0."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores that the cluster reserves for each worker."""
    address: str | None = None
    """Address of the cluster (`auto` or HOST:PORT); None: the cluster on this machine, which is started if
    necessary."""
    attempts: int = Field(3, ge=1)
    """Number of workers that may fail during a request before the request is abandoned and its trial marked."""
    deadline: float = Field(900.0, gt=0)
    """Seconds without a response after which a busy worker is replaced."""
    in_flight: int | None = Field(None, ge=1)
    """Maximum number of open requests per worker; None: enough to keep its engine busy."""
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
        """GPUs per worker; a fraction if workers share one."""
        each = int(self.engine == "vllm") if self.gpus_per_worker is None else self.gpus_per_worker
        return int(each) if each == int(each) else each  # Ray accepts whole numbers, or fractions of one

    @property
    def inner(self) -> TransformersOptions | VllmOptions | ScriptedOptions:
        """Checked options of the engine that each worker runs."""
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


def has_one_queue(options: EngineOptions) -> bool:
    """Return True if an engine takes the requests of several callers at a time, in one queue."""
    return isinstance(options, VllmOptions)


def parse_options(engine: str, values: Mapping[str, object], batch_size: int | None = None) -> EngineOptions:
    """Return the checked options of an engine; options that are None keep their default.

    `batch_size` applies unless `values` contain one. Raises SteerbackError for an unknown engine, option, type or
    value.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ("auto", *ENGINES))
    chosen = {key: value for key, value in {"batch_size": batch_size, **values}.items() if value is not None}
    options = parse(ENGINES[engine], chosen, f"engine_options of {engine!r}")
    if isinstance(options, RayOptions):
        _ = options.inner  # report invalid options of the workers' engine early
    return options
