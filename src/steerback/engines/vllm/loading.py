"""Prepare a target for vLLM without loading its model: tokenizer, layers, hashes, arguments of vLLM's engine."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from steerback.engines.base import EngineRecord
from steerback.engines.checks import site_of
from steerback.engines.interventions import Site
from steerback.engines.options import GPU_MEMORY, VllmOptions
from steerback.engines.prompting import Prompter
from steerback.errors import SteerbackError
from steerback.records import digest
from steerback.store.files import make_folder, user_folder, write_atomic
from steerback.targets import fit
from steerback.targets.target import adapter_config, check_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedConfig

    from steerback.targets import Target
    from steerback.targets.sae import Sae

RESERVE = 3 << 30
"""Bytes that an engine with a computed cache keeps free for activations, CUDA graphs and the worker's tables."""
READING = (32, 64, 128, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)
"""Sizes of batches with a CUDA graph that also read prompts; vLLM leaves out those above `max_num_batched_tokens`."""
LEAST_HEAD = 32
"""Smallest size of an attention head for vLLM's Triton kernel."""
TESTED = "0.26.0 and 0.32.0"
"""vLLM releases that were tested. With any release, every engine must pass a self-test at its start."""


@dataclass(frozen=True)
class TargetShape:
    """What the worker's tables and vLLM's arguments depend on.

    `context` is the largest number of positions; `triton`: whether vLLM's Triton kernel can
    compute its attention.
    """

    site: Site
    context: int
    triton: bool
    sae_kind: str | None
    sae_k: int | None


@dataclass(frozen=True)
class PreparedTarget:
    """Tokenizer and SAE of a target whose model vLLM loads; `files` are names and hashes of all its files."""

    prompter: Prompter
    ends: frozenset[int]
    sae_hash: str | None
    norms: NDArray[np.float32] | None
    files: EngineRecord


def require_vllm() -> str:
    """Return vLLM's version, or raise SteerbackError with the install command; limit vLLM's log to errors."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise SteerbackError(
            f"engine 'vllm' needs vLLM ({error}); install vllm (tested: {TESTED}), or use --engine transformers"
        ) from error
    return str(vllm.__version__)


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Redirect the output of this process and of its child processes to the end of `file`."""
    kept = []
    try:
        with file.open("ab") as log:
            for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
                stream.flush()
                kept.append((os.dup(number), number))
                os.dup2(log.fileno(), number)
        yield
    finally:
        for before, number in kept:
            (sys.stdout if number == 1 else sys.stderr).flush()
            os.dup2(before, number)
            os.close(before)


def gpus() -> int:
    """Return the number of GPUs that vLLM can use, without initialising CUDA."""
    import torch

    return torch.cuda.device_count()


def device_shares(replicas: int, tensor_parallel: int, available: int = 0) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for each replica: `tensor_parallel` of the visible GPUs.

    Replicas with one GPU each take the `available` GPUs in turn, so replicas share GPUs if there are more replicas than
    GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        [str(n) for n in range(available or replicas * tensor_parallel)] if visible is None else visible.split(",")
    )
    if tensor_parallel == 1 and available:
        return [devices[n % available] for n in range(replicas)]
    return [",".join(devices[n * tensor_parallel : (n + 1) * tensor_parallel]) for n in range(replicas)]


def fits_triton(text: PreTrainedConfig) -> bool:
    """Return whether vLLM's Triton kernel can compute a model's attention: not with compressed keys and values (MLA),
    which have kernels of their own, and not with heads that are too small.
    """
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return getattr(text, "kv_lora_rank", None) is None and size >= LEAST_HEAD


def shared_arguments(target: Target, options: VllmOptions, available: int, triton: bool) -> dict[str, JsonValue]:
    """Return vLLM's arguments for engines that share a GPU: an equal part of its memory each, and their attention.

    The size of each key-value cache is computed, so that no engine has to measure the memory that others leave: its
    part, less the target's memory, the SAE and RESERVE. It is left to vLLM if the sizes are unknown or too small.
    """
    if options.per_gpu(available) == 1:
        return {}
    # Such engines generate many short texts of a small model, for which FlashAttention is slower (LOG.md).
    attention: dict[str, JsonValue] = {"attention_config": {"backend": "TRITON_ATTN"}} if triton else {}
    memory, sizes = options.memory(available), [size for _, size in fit.gpus()]
    needed = target.memory()
    if not sizes or needed is None or "gpu_memory_utilization" in options.options:
        return attention | memory
    part = GPU_MEMORY / options.per_gpu(available) * min(sizes)
    room = int(part) - needed - target.sae_bytes // 2 - RESERVE
    return attention | memory | ({"kv_cache_memory_bytes": room} if room > RESERVE // 2 else {})


def prepare(target: Target, directions: tuple[str, ...]) -> tuple[TargetShape, Callable[[], PreparedTarget]]:
    """Return the shape of a target; raise SteerbackError if a part is missing or does not fit.

    The function that is returned with it prepares the rest, which takes seconds.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from steerback.engines.adapters import check_fits
    from steerback.engines.loading import hub_arguments, load_errors
    from steerback.targets.sae_files import load_sae

    with load_errors(target, f"cannot load {target.model}"):
        config = AutoConfig.from_pretrained(target.model, **hub_arguments(target))
        if target.adapter is not None:  # vLLM would load only the weights that fit
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            check_fits(f"target {target.name!r}: cannot use adapter {target.adapter}", Path(target.adapter), model)
    text = config.get_text_config()
    sae = None if target.sae is None else load_sae(target.sae)
    shape = TargetShape(
        site=site_of(target, text.num_hidden_layers, text.hidden_size, sae, directions),
        context=getattr(text, "max_position_embeddings", 4096),
        triton=fits_triton(text),
        sae_kind=None if sae is None else sae.kind,
        sae_k=None if sae is None else sae.k,
    )
    return shape, partial(_rest, target, config, sae)


def _rest(target: Target, config: PreTrainedConfig, sae: Sae | None) -> PreparedTarget:
    from transformers import AutoTokenizer, GenerationConfig

    from steerback.engines.loading import hub_arguments, load_errors, provenance_of
    from steerback.engines.runner import end_tokens

    origin = hub_arguments(target)
    with load_errors(target, f"cannot load {target.model}"):
        tokenizer = AutoTokenizer.from_pretrained(target.model, **origin)
    try:
        generation = GenerationConfig.from_pretrained(target.model, **origin)
    except OSError:
        generation = None
    return PreparedTarget(
        prompter=Prompter(tokenizer, target.prompt_format),
        ends=end_tokens(generation, config, tokenizer),
        sae_hash=None if sae is None else sae.hash,
        norms=None if sae is None else sae.decoder_norms.numpy(),
        files=provenance_of(target, tokenizer, sae),
    )


def model_alone(target: Target) -> str:
    """Return a folder with links to the model's files only, because vLLM loads every safetensors file of a folder.

    The folder has a fixed name, because its path is part of the key of vLLM's compile cache.
    """
    folder = Path(target.model)
    if not (folder / "sae.safetensors").is_file():
        return target.model
    links = make_folder(user_folder("vllm", "models", digest(str(folder.resolve()))[:16]))
    wanted = {
        path.name: path.resolve() for path in folder.iterdir() if path.is_file() and path.name != "sae.safetensors"
    }
    for old in links.iterdir():
        if old.name not in wanted and not old.name.startswith("."):
            old.unlink(missing_ok=True)
    for name, path in wanted.items():  # keep a correct link: another process may be reading it
        link, fresh = links / name, links / f".{os.getpid()}-{threading.get_ident()}-{name}"
        if not (link.is_symlink() and link.readlink() == path):
            fresh.symlink_to(path)
            fresh.replace(link)
    return str(links)


def save_directions(directions: Mapping[str, Tensor]) -> str | None:
    """Return a file with the directions. Its name is a hash of the contents, so that the compile cache stays valid."""
    if not directions:
        return None
    import torch
    from safetensors.torch import save

    data = save({k: v.detach().to("cpu", torch.float32).contiguous() for k, v in directions.items()})
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    return str(write_atomic(make_folder(user_folder("vllm", "directions")) / name, data))


def lora_arguments(folders: Sequence[str], dtype: str) -> dict[str, JsonValue]:
    """Return vLLM's arguments for adapters, one at a time; raise SteerbackError if vLLM cannot serve one."""
    ranks = []
    for folder in folders:
        if gpus() and dtype == "float32":
            raise SteerbackError(
                f"lora {folder!r}: vLLM's adapter kernels lack float32 on a GPU; use a bfloat16 target, or --engine "
                "transformers"
            )
        check_adapter(f"lora {folder!r}", Path(folder))
        rank = adapter_config(Path(folder)).get("r")
        if not isinstance(rank, int) or rank < 1:
            raise SteerbackError(
                f"lora {folder!r}: rank r in its configuration is {rank!r}; it must be a number above 0"
            )
        ranks.append(rank)
    most = max(ranks)
    return {"enable_lora": True, "max_lora_rank": next((r for r in (8, 16, 32, 64, 128, 256, 512) if r >= most), most)}


def engine_arguments(
    target: Target, length: int, rows: int, options: VllmOptions, adapters: Sequence[str] = ()
) -> dict[str, JsonValue]:
    """Return the arguments of vLLM's engine for a target; further `options.options` override them."""
    on_cpu: dict[str, JsonValue] = {
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,  # vLLM's CPU build cannot split the prefill of a seeded request over steps
        "max_num_batched_tokens": max(length, 2048),
    }
    on_gpu: dict[str, JsonValue] = {
        "distributed_executor_backend": "mp",  # scheduler and model in two processes: their Python runs at one time
        "compilation_config": {"cudagraph_capture_sizes": graph_sizes(rows)},
    }
    return {
        "model": model_alone(target),
        "revision": target.revision,
        "dtype": target.dtype,
        "max_model_len": length,
        "max_num_seqs": rows,
        "tensor_parallel_size": options.tensor_parallel,
        "seed": 0,
        "generation_config": "vllm",
        "skip_tokenizer_init": not options.stop_strings,
        **(on_gpu if gpus() else on_cpu),
        **(lora_arguments(adapters, target.dtype) if adapters else {}),
    }


def graph_sizes(rows: int) -> list[JsonValue]:
    """Return the sizes of batches with a CUDA graph, in tokens; larger batches wait for the CPU.

    Sizes up to `rows` are for steps in which every request generates one token, larger ones for steps that also read
    prompts. By default vLLM captures more sizes, which takes longer, and none above 512 tokens.
    """
    generating = (1, 2, 4, 8, *range(16, 256, 16), *range(256, 512, 32), *range(512, READING[-1], 128))
    return [*(n for n in generating if n < rows), min(rows, READING[-1]), *(n for n in READING if n > rows)]
