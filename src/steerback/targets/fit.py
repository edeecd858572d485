"""What a target needs and whether this machine has it: memory, disk, access. Said before anything is loaded.

Sizes are estimates from the number of parameters; access and what is still to be downloaded are asked of the hub.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from steerback.errors import SteerbackError
from steerback.readers import read_json_table
from steerback.targets.download import check_space, free_space, gigabytes, hub_errors, hub_place
from steerback.targets.target import Target, model_config, weight_sizes

if TYPE_CHECKING:
    from tqdm import tqdm

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
"""What is loaded of a hub model; other forms of its weights are left there."""
NOT_MODEL_FILES = ["original/*", "*/*"]
DECODER_LAYER = re.compile(r"(?:.*\.)?(?:language_model|model)\.layers\.(\d{1,6})\.")
"""Weights of a layer of the language model (not of a vision tower), whatever stands before it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: (name, bytes) of each GPU, bytes of memory, and of free disk where models are kept."""

    gpus: tuple[tuple[str, int], ...]
    memory: int
    disk: int

    def describe(self) -> str:
        gpus = ", ".join(f"{name} ({gigabytes(size)})" for name, size in self.gpus) or "no GPU"
        return f"{gpus}; {gigabytes(self.memory)} of memory; {gigabytes(self.disk)} of disk free"


def this_machine() -> Machine:
    """Return the machine this runs on."""
    from huggingface_hub import constants

    return Machine(gpus(), total_memory(), free_space(Path(constants.HF_HUB_CACHE)))


def gpus() -> tuple[tuple[str, int], ...]:
    """Return (name, bytes) of the GPUs that a process here may use.

    PyTorch gives names and sizes only once CUDA is started in this process, after which vLLM can no longer fork its
    own; so the driver's program is asked.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    rows = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
    known = [(name.strip(), int(size) << 20) for name, size in rows if size.strip().isdecimal()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not all(part.strip().isdecimal() for part in visible.split(",") if part.strip()):
        return tuple(known)
    return tuple(known[int(part)] for part in visible.split(",") if part.strip() and int(part) < len(known))


def total_memory() -> int:
    """Return the bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Return the bytes of memory that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def download_bytes(target: Target) -> int:
    """Return the bytes of a hub target's model (in 16 bits) and SAE; 0 for what is in folders."""
    model = 0 if Path(target.model).is_dir() or not target.n_parameters else 2 * target.n_parameters
    local = target.sae is None or Path(target.sae.location).expanduser().exists()
    return model + (0 if local else target.sae_bytes)


def verdict(target: Target, machine: Machine) -> str:
    """Say how a target can run on a machine, or why it cannot."""
    if target.memory() is None:
        return "unknown: its size is not known"
    reasons = []
    if (download := download_bytes(target)) > machine.disk:
        reasons.append(f"{gigabytes(download)} of disk needed if nothing of it is there")
    forms = ("bfloat16", "fp8") if target.dtype == "bfloat16" else (target.dtype,)
    for form in forms:
        needed = target.memory(form) or 0
        where = _where(needed, machine, form)
        if where is not None:
            return " but ".join([f"yes: {form} {where}", *reasons])
    least = gigabytes(target.memory(forms[-1]) or 0)
    return "; ".join([f"no: {forms[-1]} needs {least} of GPU memory, or of memory to run slowly", *reasons])


def _where(needed: int, machine: Machine, form: str) -> str | None:
    sizes = sorted((size for _, size in machine.gpus), reverse=True)
    for count in (1, 2, 4, 8):
        if len(sizes) >= count and needed <= sizes[count - 1] * count * 0.95:
            how = [f"--set engine_options.tensor_parallel={count}"] * (count > 1)
            how += ["--set engine_options.options.quantization=fp8"] * (form == "fp8")
            place = "on one GPU" if count == 1 else f"on {count} GPUs"
            return f"{place} with vLLM ({' '.join(how)})" if how else place
    if form != "fp8" and needed <= machine.memory * 0.95:
        return "in memory, on the CPU" if not machine.gpus else "on the CPU (--set engine_options.device=cpu)"
    return None


def check_ready(target: Target, kind: str = "", free: int = 0, form: str | None = None) -> None:
    """Raise SteerbackError where a target does not fit `free` bytes of a `kind` of memory, or cannot be had.

    `form` is the type of its weights, if not the target's own; `free` 0 leaves memory out. The hub is asked for access
    and sizes, and the disk for room for what is not in its cache.
    """
    needed = target.memory(form)
    if free and needed is not None and needed > free:
        raise SteerbackError(
            f"target {target.name!r} needs about {gigabytes(needed)} of {kind} as {form or target.dtype} and "
            f"{gigabytes(free)} are free; steerback targets --fit says what fits this machine"
        )
    if not Path(target.model).is_dir():
        _check_hub_model(target)


def _check_hub_model(target: Target) -> None:
    from huggingface_hub import constants, errors, snapshot_download

    if target.model.count("/") != 1:
        raise SteerbackError(
            f"target {target.name!r}: model {target.model!r} is neither a folder nor the name of a hub repository"
        )
    if _pinned(target) and snapshot_is_whole(target):
        return
    with hub_errors(target.model, target.revision or "main", "config.json"):
        try:
            files = snapshot_download(
                target.model,
                revision=target.revision,
                endpoint=hub_place(),
                allow_patterns=MODEL_FILES,
                ignore_patterns=NOT_MODEL_FILES,
                tqdm_class=quiet_bar(),
                dry_run=True,
            )
        except errors.DryRunError as error:
            if snapshot_is_whole(target):  # without a network
                return
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise error.__cause__ from None
            raise errors.LocalEntryNotFoundError(str(error)) from error.__cause__
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise SteerbackError(f"{target.model}: no safetensors files there; weights in pickles are not loaded")
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    check_space(Path(constants.HF_HUB_CACHE), missing, f"target {target.name!r}: the rest of {target.model}")


def fetch(target: Target) -> None:
    """Download what the hub's cache lacks of a target, the SAE first, and show progress at a terminal.

    The hub's library keeps each file of a model that is whole, so a stopped download continues with the next file.
    """
    from huggingface_hub import snapshot_download

    from steerback.targets.sae_files import FORMATS, locate

    if target.sae is not None and target.sae.format in FORMATS and FORMATS[target.sae.format].suffixes:
        locate(target.sae)
    if not Path(target.model).is_dir() and not (_pinned(target) and snapshot_is_whole(target)):
        with hub_errors(target.model, target.revision or "main", "config.json"):
            snapshot_download(
                target.model,
                revision=target.revision,
                endpoint=hub_place(),
                allow_patterns=MODEL_FILES,
                ignore_patterns=NOT_MODEL_FILES,
                tqdm_class=None if sys.stderr.isatty() else quiet_bar(),
            )
    check_weights(target)


def check_weights(target: Target) -> None:
    """Raise SteerbackError if a model's files hold more or fewer layers than its config.json says.

    Engines would build the model without the former and never say so; of the latter there could be millions.
    """
    folder = model_folder(target)
    layers = {int(m[1]) for name in weight_sizes(folder) if (m := DECODER_LAYER.match(name))}
    n_layers = model_config(folder).get("num_hidden_layers")
    if layers and isinstance(n_layers, int) and max(layers) + 1 != n_layers:
        raise SteerbackError(
            f"target {target.name!r}: config.json of {target.model} says {n_layers} layers and its weights have "
            f"{max(layers) + 1}; they are not of one model, or a file is incomplete"
        )


def model_folder(target: Target) -> Path:
    """Return the folder of a model's files: its own, or that of a hub model in the local cache."""
    from huggingface_hub import try_to_load_from_cache as cached

    if Path(target.model).is_dir():
        return Path(target.model)
    config = cached(target.model, "config.json", revision=target.revision)
    return Path(config).parent if isinstance(config, str) else Path(target.model)


def _pinned(target: Target) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", target.revision or "") is not None


def quiet_bar() -> type[tqdm]:
    """Return a progress bar that shows nothing."""
    from tqdm import tqdm

    def init(self: tqdm, *args: object, **options: object) -> None:
        tqdm.__init__(self, *args, **options | {"disable": True})

    return type("QuietBar", (tqdm,), {"__init__": init})


def snapshot_is_whole(target: Target) -> bool:
    """Return whether the hub's cache has config and weights of a target's model."""
    from huggingface_hub import try_to_load_from_cache as cached

    def there(name: str) -> str | None:
        found = cached(target.model, name, revision=target.revision)
        return found if isinstance(found, str) else None

    index = there("model.safetensors.index.json")
    if index is not None:
        listed = read_json_table(Path(index), "list of weights").get("weight_map")
        names = set(map(str, listed.values())) if isinstance(listed, dict) else {""}
        return there("config.json") is not None and all(there(name) for name in names)
    return there("config.json") is not None and there("model.safetensors") is not None
