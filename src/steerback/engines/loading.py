"""Loads a target's model, tokenizer and SAE, says exactly what was loaded, and how many rows fit the machine.

Weights load from safetensors without pickle code; a folder is read offline. Knows nothing of requests.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steerback.engines.adapters import with_adapter
from steerback.engines.checks import site_of
from steerback.engines.prompting import Prompter
from steerback.engines.runner import Runner, decoder_layers
from steerback.errors import SteerbackError, unknown
from steerback.records import digest
from steerback.targets.download import commit_of
from steerback.targets.fit import available_memory, check_ready, fetch
from steerback.targets.sae import Sae
from steerback.targets.sae_files import describe, load_sae
from steerback.targets.target import ADAPTER_FILES, check_adapter

if TYPE_CHECKING:
    from steerback.targets import Target


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be steered, with the hashes and revisions that say which one it is."""

    runner: Runner
    sae: Sae | None
    provenance: dict[str, object]


def load(target: Target, device: str | None = None, directions: tuple[str, ...] = ()) -> LoadedModel:
    """Loads everything of a target; SteerbackError in one line for what is missing or does not fit together."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    place = pick_device(device)
    check_ready(target, *free_memory(place))
    fetch(target)
    folder = Path(target.model)
    origin: dict[str, Any] = {} if folder.is_dir() else {"revision": target.revision}
    origin["trust_remote_code"] = False  # otherwise transformers asks on the terminal whether to run a model's code
    sae = None if target.sae is None else on_device(load_sae(target.sae), place)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(target.model, **origin)
        model, report = AutoModelForCausalLM.from_pretrained(
            target.model, dtype=getattr(torch, target.dtype), use_safetensors=True, output_loading_info=True, **origin
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise SteerbackError(f"target {target.name!r}: cannot load {target.model}: {reason}") from error
    if report["missing_keys"]:  # transformers would go on with random numbers in their place
        raise SteerbackError(
            f"target {target.name!r}: {target.model} lacks {len(report['missing_keys'])} weights of this architecture, "
            f"the first is {min(report['missing_keys'])}; the file is incomplete or belongs to another config.json"
        )
    if target.adapter is not None:
        model = with_adapter(target, model)
    model = model.to(place)
    return assemble(target, model, tokenizer, sae, provenance_of(target, tokenizer, sae), directions)


def provenance_of(target: Target, tokenizer: Any, sae: Sae | None) -> dict[str, object]:
    """Which model, adapter, tokenizer and SAE were loaded: names, commits, hashes, a summary of the decoder norms."""
    known: dict[str, object] = {
        "target": target.name,
        "model": target.base if Path(target.model).is_dir() else target.model,
        "revision": target.revision,
        "commit": hub_commit(target.model, target.revision),
        "files": hash_files(target.model, target.revision),
        "tokenizer": hash_tokenizer(tokenizer),
    }
    if target.adapter is not None:
        known["lora"] = hash_adapter(target.adapter)
    if sae is not None and target.sae is not None:
        known |= {"sae_source": describe(target.sae), "decoder_norms": sae.norms()}
    return known


def hash_adapter(folder: str) -> dict[str, str]:
    """Return the SHA-256 of an adapter's weights and configuration, the only files of it that are loaded."""
    check_adapter(f"adapter {folder}", Path(folder))
    return {name: _sha256(Path(folder) / name) for name in ADAPTER_FILES}


def on_device(sae: Sae, place: torch.device) -> Sae:
    """TopK on the device, as it has to encode everything; of the others only what is used goes there, when it is."""
    return sae.to(place) if sae.kind == "topk" and place.type != "cpu" else sae


def free_memory(place: torch.device) -> tuple[str, int]:
    """What kind of memory models take on a device, and how many bytes of it are free."""
    if place.type == "cuda":
        return "GPU memory", int(torch.cuda.mem_get_info(place)[0])
    return "memory", available_memory()


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash of all that a fast tokenizer and its chat template do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return digest([rules, tokenizer.chat_template])


def assemble(
    target: Target,
    model: Any,
    tokenizer: Any,
    sae: Sae | None,
    provenance: dict[str, object] | None = None,
    directions: tuple[str, ...] = (),
) -> LoadedModel:
    """Checks that model, SAE and layers of a target fit together."""
    n_layers, d_model = len(decoder_layers(model)), model.get_decoder().config.hidden_size
    site = site_of(target, n_layers, d_model, sae, directions)
    runner = Runner(model, Prompter(tokenizer, target.prompt_format), site)
    return LoadedModel(runner, sae, provenance or {"target": target.name})


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is: cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, found in there.items() if found))
    if not there.get(name.split(":")[0], False):
        raise unknown("device", name, [kind for kind, found in there.items() if found])
    return torch.device(name)


def batch_rows(runner: Runner) -> int:
    """How many rows decode together: what fits in half of the memory the weights leave, at most 256 (48 on CPU).

    More rows than 48 gain little on a CPU and idle while a small round ends. Estimated for 1,024 tokens a row from the
    machine's whole memory, not from what happens to be free, so that the same machine gives the same shape again.
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
        pages = getattr(os, "sysconf", lambda _: 0)("SC_PHYS_PAGES")  # absent on Windows: assume 8 GiB
        memory = pages * os.sysconf("SC_PAGE_SIZE") if pages else 2**33
    most = 256 if runner.device.type == "cuda" else 48
    rows = int(max(memory * 0.9 - weights, 0) * 0.5 / (cache + logits))
    return max(1, min(most, rows) // 8 * 8 or min(most, rows, 4))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return bool(re.search(r"out of memory|can't allocate memory", str(error)))


def hub_commit(model: str, revision: str | None) -> str | None:
    """The commit that a hub model was loaded from, whatever branch or tag was named; None for a folder."""
    return None if Path(model).is_dir() else commit_of(_folder(model, revision) / "config.json")


def _folder(model: str, revision: str | None) -> Path:
    """The folder of a model's files: its own, or that of a hub model in the local cache."""
    if Path(model).is_dir():
        return Path(model)
    from transformers.utils import cached_file

    return Path(str(cached_file(model, "config.json", revision=revision, local_files_only=True))).parent


def hash_files(model: str, revision: str | None) -> dict[str, str]:
    """SHA-256 per weight, config and tokenizer file of a folder, or of a hub model's files in the local cache."""
    folder = _folder(model, revision)
    names = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json") and p.stem != "contexts")
    return {path.name: _sha256(path) for path in names if path.is_file()}


def _sha256(path: Path) -> str:
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob):  # the hub's cache names large files by their own SHA-256
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
