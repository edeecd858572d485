"""Load a target's model, tokenizer and SAE, record their hashes, and estimate the number of rows that fit the machine.

Weights are loaded from safetensors, without pickle. Local folders are read offline. This module does not know about
requests.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from steerback.engines.adapters import with_adapter
from steerback.engines.base import EngineRecord
from steerback.engines.checks import site_of
from steerback.engines.prompting import Prompter
from steerback.engines.runner import Runner, decoder_layers
from steerback.errors import SteerbackError, unknown
from steerback.readers import reason_of
from steerback.records import digest
from steerback.store.files import until_changed
from steerback.targets.download import commit_of, hash_file
from steerback.targets.fit import available_memory, check_ready, fetch, model_folder
from steerback.targets.sae import Sae
from steerback.targets.sae_files import describe, load_sae
from steerback.targets.target import ADAPTER_FILES, check_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from steerback.targets import Target


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with the name of its target, and the hashes and revisions of the loaded files."""

    runner: Runner
    sae: Sae | None
    target: str
    provenance: EngineRecord = field(default_factory=dict)


def load(target: Target, device: str | None = None, directions: tuple[str, ...] = ()) -> LoadedModel:
    """Load a target. Raises SteerbackError with one line if a part is missing or the parts do not fit together."""
    place = pick_device(device)
    check_ready(target, *free_memory(place))
    fetch(target)
    sae = None if target.sae is None else on_device(load_sae(target.sae), place)
    tokenizer = load_tokenizer(target)
    model = load_weights(target, getattr(torch, target.dtype))
    if target.adapter is not None:
        model = with_adapter(target, model)
    return assemble(target, model.to(place), tokenizer, sae, provenance_of(target, tokenizer, sae), directions)


def load_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer. Raises SteerbackError if that fails."""
    from transformers import AutoTokenizer

    with load_errors(target, f"cannot load the tokenizer of {target.model}"):
        return AutoTokenizer.from_pretrained(target.model, **hub_arguments(target))


def load_weights(target: Target, dtype: torch.dtype) -> PreTrainedModel:
    """Load a target's model. Raises SteerbackError with one line if weights are missing or have another shape."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the library prints a table of the weights that do not fit
    try:
        with load_errors(target, f"cannot load {target.model}"):
            model, report = AutoModelForCausalLM.from_pretrained(
                target.model,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                **hub_arguments(target),
            )
    finally:
        logging.set_verbosity(level)
    # transformers fills missing weights, and those of another shape, with random numbers
    wrong = {"lacks {} weights of this architecture": report["missing_keys"]}
    wrong["has {} weights of another shape than its config.json says"] = {key for key, *_ in report["mismatched_keys"]}
    for what, keys in wrong.items():
        if keys:
            raise SteerbackError(
                f"target {target.name!r}: {target.model} {what.format(len(keys))}, the first is {min(keys)}; the file "
                "is incomplete or belongs to another config.json"
            )
    return model


def hub_arguments(target: Target) -> dict[str, str | bool | None]:
    """Return arguments for `from_pretrained`: the pinned revision of a hub model, and no remote code."""
    # Without trust_remote_code=False, transformers asks on the terminal and runs the model's code after a "y".
    code: dict[str, str | bool | None] = {"trust_remote_code": False}
    return code if Path(target.model).is_dir() else {**code, "revision": target.revision}


@contextlib.contextmanager
def load_errors(target: Target, failure: str) -> Iterator[None]:
    """Turn library errors about missing or damaged files into one line that names target and file."""
    try:
        yield
    except SteerbackError:
        raise
    except Exception as error:  # damaged files raise errors of many types in these libraries
        reason = reason_of(error)
        if "trust_remote_code" in str(error):
            reason = "it needs Python code from the model's folder, which steerback never runs; use another model"
        if isinstance(error, ZeroDivisionError):
            reason = "a number in config.json is 0, for example the number of attention heads; correct the file"
        ours = ZeroDivisionError, OSError, ValueError, RuntimeError
        kind = "" if isinstance(error, ours) else f"{type(error).__name__}: "
        raise SteerbackError(f"target {target.name!r}: {failure}: {kind}{reason}") from error


def provenance_of(target: Target, tokenizer: PreTrainedTokenizerBase, sae: Sae | None) -> EngineRecord:
    """Return names, commits and hashes of model, adapter, tokenizer and SAE, with a summary of the decoder norms."""
    known: EngineRecord = {
        "model": target.base if Path(target.model).is_dir() else target.model,
        "revision": target.revision,
        "commit": None if Path(target.model).is_dir() else commit_of(model_folder(target) / "config.json"),
        "files": hash_files(target),
        "tokenizer": hash_tokenizer(tokenizer),
    }
    if target.adapter is not None:
        known["lora"] = hash_adapter(target.adapter)
    if sae is not None and target.sae is not None:
        known["sae_source"] = describe(target.sae)
        known["decoder_norms"] = sae.norms()
    return known


def hash_adapter(folder: str) -> dict[str, str]:
    """Return the SHA-256 of an adapter's weights and configuration; no other file of the adapter is loaded."""
    check_adapter(f"adapter {folder}", Path(folder))
    return {name: _sha256(Path(folder) / name) for name in ADAPTER_FILES}


def on_device(sae: Sae, place: torch.device) -> Sae:
    """Move a TopK SAE to the device, because it encodes all latents; other SAEs copy columns when needed."""
    return sae.to(place) if sae.kind == "topk" and place.type != "cpu" else sae


def free_memory(place: torch.device) -> tuple[str, int]:
    """Return the type of memory that models use on a device, and its free bytes."""
    if place.type == "cuda":
        return "GPU memory", int(torch.cuda.mem_get_info(place)[0])
    return "memory", available_memory()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a fast tokenizer's behaviour and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([rules, tokenizer.chat_template])


def assemble(
    target: Target,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: Sae | None,
    provenance: EngineRecord | None = None,
    directions: tuple[str, ...] = (),
) -> LoadedModel:
    """Combine model, tokenizer and SAE; raise SteerbackError if they or the target's layers do not fit together."""
    n_layers, d_model = len(decoder_layers(model)), model.get_decoder().config.hidden_size
    site = site_of(target, n_layers, d_model, sae, directions)
    runner = Runner(model, Prompter(tokenizer, target.prompt_format), site)
    return LoadedModel(runner, sae, target.name, provenance or {})


def pick_device(name: str | None) -> torch.device:
    """Return the requested device, or the first available of cuda, mps and cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    present = [kind for kind, there in available.items() if there]
    if name is not None and name.split(":")[0] not in present:
        raise unknown("device", name, present)
    return torch.device(name or present[0])


def batch_rows(runner: Runner, most: int | None = None) -> int:
    """Return how many rows decode together: those that fit in half of the remaining memory, at most `most`.

    `most` is 256 by default and 48 on a CPU. More than 48 rows gain little on a CPU, and they idle at the end of a
    small round. The estimate assumes 1,024 tokens per row. It uses the total memory, not the free memory, so that the
    same machine always gets the same shape.
    """
    config = runner.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = torch.finfo(runner.dtype).bits // 8
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * item * 1024
    logits = runner.vocabulary * 4 * 6  # logits, probabilities and their float64 sums
    weights = sum(p.numel() * p.element_size() for p in runner.model.parameters())
    if runner.device.type == "cuda":
        memory = torch.cuda.get_device_properties(runner.device).total_memory
    else:
        memory = psutil.virtual_memory().total
    most = most or (256 if runner.device.type == "cuda" else 48)
    rows = int(max(memory * 0.9 - weights, 0) * 0.5 / (cache + logits))
    return max(1, min(most, rows) // 8 * 8 or min(most, rows, 4))


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(re.search(r"out of memory|can't allocate memory", str(error)))


def hash_files(target: Target) -> dict[str, str]:
    """Return the SHA-256 of every weight, config and tokenizer file of a target's model."""
    files = sorted(model_folder(target).iterdir())
    return {
        p.name: _sha256(p)
        for p in files
        if p.suffix in (".safetensors", ".json") and p.stem != "contexts" and p.is_file()
    }


def _sha256(path: Path) -> str:
    path = path.resolve()
    blob = path.name  # the hub's cache names large files by their SHA-256
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else _hash(path)


_hash = until_changed(hash_file)  # each adapter of a run needs the hash of their base
