"""Prepare a target for vLLM without loading its model: tokenizer, layers, hashes, arguments of vLLM's engine."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from steerback.engines.base import START_LOG, ModelProvenance
from steerback.engines.checks import site_of
from steerback.engines.interventions import Site
from steerback.engines.prompting import Prompter
from steerback.errors import SteerbackError
from steerback.records import digest
from steerback.store.files import make_folder, user_folder, write_atomic
from steerback.targets.target import adapter_config, check_adapter

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from steerback.targets import Target

TESTED = "0.26.0 and 0.32.0"
"""The vLLM releases that the tests ran on; with any release, every engine has to pass a self-test at its start."""


@dataclass(frozen=True)
class PreparedTarget:
    """The tokenizer, layers and hashes of a target whose model vLLM loads."""

    prompter: Prompter
    ends: frozenset[int]
    site: Site
    context: int
    sae_hash: str | None
    norms: NDArray[np.float32] | None
    provenance: ModelProvenance


def require_vllm() -> str:
    """Return vLLM's version; SteerbackError that says how to install it. Its log is kept to errors by default."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise SteerbackError(
            f"engine 'vllm' needs vLLM ({error}); install vllm (tested: {TESTED}), or use --engine transformers"
        ) from error
    return str(vllm.__version__)


def start_log() -> Path:
    """Return the file for vLLM's own output: that of the run which starts it, else one in the user's folder."""
    return START_LOG.get() or make_folder(user_folder("logs")) / "vllm.log"


@contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Append what this process and the processes that it starts print to `file`, instead of the terminal."""
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
    """Return how many GPUs vLLM will find here, without initialising CUDA."""
    import torch

    return torch.cuda.device_count()


def device_shares(replicas: int, tensor_parallel: int, available: int = 0) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for each replica: `tensor_parallel` GPUs of those visible now.

    Replicas of one GPU each take the `available` GPUs in turn, so more replicas than GPUs share them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (
        [str(n) for n in range(available or replicas * tensor_parallel)] if visible is None else visible.split(",")
    )
    if tensor_parallel == 1 and available:
        return [devices[n % available] for n in range(replicas)]
    return [",".join(devices[n * tensor_parallel : (n + 1) * tensor_parallel]) for n in range(replicas)]


def prepare(target: Target, directions: tuple[str, ...]) -> PreparedTarget:
    """Return tokenizer, layers and hashes of a target; SteerbackError for what is missing or does not fit together."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from steerback.engines.adapters import check_fits
    from steerback.engines.loading import hub_arguments, load_errors, provenance_of
    from steerback.engines.runner import end_tokens
    from steerback.targets.sae_files import load_sae

    origin = hub_arguments(target)
    with load_errors(target, f"cannot load {target.model}"):
        config = AutoConfig.from_pretrained(target.model, **origin)
        tokenizer = AutoTokenizer.from_pretrained(target.model, **origin)
        if target.adapter is not None:  # vLLM would go on with the part of it that fits
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            check_fits(f"target {target.name!r}: cannot use adapter {target.adapter}", Path(target.adapter), model)
    try:
        generation = GenerationConfig.from_pretrained(target.model, revision=origin.get("revision"))
    except OSError:
        generation = None
    text = config.get_text_config()
    sae = None if target.sae is None else load_sae(target.sae)
    site = site_of(target, text.num_hidden_layers, text.hidden_size, sae, directions)
    return PreparedTarget(
        prompter=Prompter(tokenizer, target.prompt_format),
        ends=end_tokens(generation, config, tokenizer),
        site=site,
        context=getattr(text, "max_position_embeddings", 4096),
        sae_hash=None if sae is None else sae.hash,
        norms=None if sae is None else sae.decoder_norms.numpy(),
        provenance=provenance_of(target, tokenizer, sae),
    )


def model_alone(target: Target) -> str:
    """Return a folder with the model's files only: vLLM takes every safetensors file it finds for weights of the model.

    Links under a name that stays, as the path is part of the key of vLLM's compile cache.
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
    for name, path in wanted.items():  # a right link stays: another process may be reading it
        link, fresh = links / name, links / f".{os.getpid()}-{threading.get_ident()}-{name}"
        if not (link.is_symlink() and link.readlink() == path):
            fresh.symlink_to(path)
            fresh.replace(link)
    return str(links)


def save_directions(directions: Mapping[str, Tensor]) -> str | None:
    """Return a file with the directions, named by its contents for the same reason."""
    if not directions:
        return None
    import torch
    from safetensors.torch import save

    data = save({k: v.detach().to("cpu", torch.float32).contiguous() for k, v in directions.items()})
    name = f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    return str(write_atomic(make_folder(user_folder("vllm", "directions")) / name, data))


def cpu_arguments(length: int) -> dict[str, JsonValue]:
    """vLLM's CPU build fails on a seeded request whose prefill is split over steps, so it is not split there."""
    return {
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(length, 2048),
    }


def lora_arguments(folder: str, dtype: str) -> dict[str, JsonValue]:
    """Return vLLM's arguments for an adapter; SteerbackError where vLLM could not serve it."""
    if gpus() and dtype == "float32":
        raise SteerbackError(
            f"lora {folder!r}: vLLM's adapter kernels take no float32 on a GPU; use a target in bfloat16, or --engine "
            "transformers"
        )
    check_adapter(f"lora {folder!r}", Path(folder))
    rank = adapter_config(Path(folder)).get("r")
    if not isinstance(rank, int) or rank < 1:
        raise SteerbackError(
            f"lora {folder!r}: its configuration gives the rank r as {rank!r}, not as a number above 0"
        )
    return {"enable_lora": True, "max_lora_rank": next((r for r in (8, 16, 32, 64, 128, 256, 512) if r >= rank), rank)}


def engine_arguments(target: Target, length: int, rows: int, tensor_parallel: int) -> dict[str, JsonValue]:
    """Return the arguments of vLLM's engine for a target; the user's options override them."""
    return {
        "model": model_alone(target),
        "revision": target.revision,
        "dtype": target.dtype,
        "max_model_len": length,
        "max_num_seqs": rows,
        "tensor_parallel_size": tensor_parallel,
        "seed": 0,
        "generation_config": "vllm",
        **({} if gpus() else cpu_arguments(length)),
        **(lora_arguments(target.adapter, target.dtype) if target.adapter else {}),
    }
