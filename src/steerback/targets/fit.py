"""Check before loading whether a target fits this machine: memory, disk space, access to the hub.

Sizes are estimated from the number of parameters. The hub reports access and the files that are still missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from steerback.errors import SteerbackError
from steerback.organism import is_builtin
from steerback.readers import read_json_table, read_safetensors_header
from steerback.targets.download import check_space, free_space, gigabytes, hub_errors, hub_place
from steerback.targets.target import Target, model_config, weight_sizes

if TYPE_CHECKING:
    from tqdm import tqdm

MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja"]
"""Files of a hub model that are downloaded; other forms of its weights are skipped."""
NOT_MODEL_FILES = ["original/*", "*/*"]
DECODER_LAYER = re.compile(r"(?:.*\.)?(?:language_model|model)\.layers\.(\d{1,6})\.")
"""Name of a weight in a layer of the language model (not of a vision tower), with any prefix."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine: (name, bytes) of each GPU, bytes of memory, and free bytes on the disk of the hub's cache."""

    gpus: tuple[tuple[str, int], ...]
    memory: int
    disk: int

    def describe(self) -> str:
        gpus = ", ".join(f"{name} ({gigabytes(size)})" for name, size in self.gpus) or "no GPU"
        return f"{gpus}; {gigabytes(self.memory)} of memory; {gigabytes(self.disk)} of disk free"


def this_machine() -> Machine:
    """Return the machine that this process runs on."""
    from huggingface_hub import constants

    return Machine(gpus(), psutil.virtual_memory().total, free_space(Path(constants.HF_HUB_CACHE)))


def gpus() -> tuple[tuple[str, int], ...]:
    """Return (name, bytes) of the GPUs that this process may use, as nvidia-smi reports them.

    PyTorch would have to initialise CUDA in this process for that, after which vLLM could no longer fork its workers.
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


def available_memory() -> int:
    """Return the bytes of memory that are available without swapping."""
    return int(psutil.virtual_memory().available)


def download_bytes(target: Target) -> int:
    """Return the download size in bytes of a hub target: model in 16 bits plus SAE; local parts count 0."""
    model = 0 if Path(target.model).is_dir() or not target.n_parameters else 2 * target.n_parameters
    local = target.sae is None or Path(target.sae.location).expanduser().exists()
    return model + (0 if local else target.sae_bytes)


def verdict(target: Target, machine: Machine) -> str:
    """Describe how a target can run on a machine, or why it cannot."""
    if target.memory() is None:
        return "unknown: the number of parameters is not known"
    reasons = []
    if (download := download_bytes(target)) > machine.disk:
        reasons.append(f"{gigabytes(download)} of disk needed if nothing is downloaded yet")
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
    """Raise SteerbackError if a target does not fit in `free` bytes of a `kind` of memory or cannot be downloaded.

    `form` is the type of the weights, None for the target's dtype; `free` 0 skips the check of memory. Checks access at
    the hub, and disk space for the files that its cache lacks.
    """
    needed = target.memory(form)
    if free and needed is not None and needed > free:
        raise SteerbackError(
            f"target {target.name!r} needs about {gigabytes(needed)} of {kind} as {form or target.dtype}, but "
            f"{gigabytes(free)} are free; steerback targets --fit lists the targets that fit this machine"
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
            if snapshot_is_whole(target):  # no network, but everything is in the cache
                return
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                raise error.__cause__ from None
            raise errors.LocalEntryNotFoundError(str(error)) from error.__cause__
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise SteerbackError(f"{target.model}: has no safetensors files; pickled weights are refused")
    missing = sum(file.file_size or 0 for file in files if file.will_download)
    check_space(Path(constants.HF_HUB_CACHE), missing, f"target {target.name!r}: the rest of {target.model}")


def fetch(target: Target) -> None:
    """Download the files of a target that the hub's cache lacks, the SAE first; shows progress on a terminal.

    The hub's library keeps each complete file of a model, so an interrupted download continues with the next file.
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
    """Raise SteerbackError if a model has more or fewer layers than its config.json says, or its SAE another shape.

    Engines would silently ignore extra layers, and a wrong config.json could ask for millions of missing ones. They
    would also ignore generation settings that they cannot read, and with them the tokens that end a response.
    """
    for key, size in _sae_sizes(target).items():
        if (noted := getattr(target, key)) and noted != size:
            raise SteerbackError(f"target {target.name!r}: {key} is {noted}, its SAE has {size}; correct it")
    folder = model_folder(target)
    if (settings := folder / "generation_config.json").is_file():
        read_json_table(settings, "generation settings")
        if settings.read_bytes().startswith(BOM_UTF8):
            raise SteerbackError(f"generation settings {settings} begin with a byte-order mark; save them without it")
    layers = {int(m[1]) for name in weight_sizes(folder) if (m := DECODER_LAYER.match(name))}
    n_layers = model_config(folder).get("num_hidden_layers")
    if layers and isinstance(n_layers, int) and max(layers) + 1 != n_layers:
        raise SteerbackError(
            f"target {target.name!r}: config.json of {target.model} says {n_layers} layers, but its weights have "
            f"{max(layers) + 1}; they belong to different models, or a file is incomplete"
        )


def _sae_sizes(target: Target) -> dict[str, int]:
    """Return d_model and n_latents from the header of a local SAE in safetensors; empty for any other SAE.

    Empty also for built-in targets: reading the header imports torch, and then no process can fork (`can_fork`).
    """
    if is_builtin(target.name):
        return {}
    from steerback.targets.sae_files import FORMATS, locate

    source = target.sae
    if source is None or source.format not in FORMATS or ".safetensors" not in FORMATS[source.format].suffixes:
        return {}
    if not Path(source.location).expanduser().exists():
        return {}
    header = read_safetensors_header(locate(source).weights, "SAE")
    shape = next((header[name].get("shape") for name in ("W_enc", "w_enc") if name in header), None)
    sizes = shape if isinstance(shape, list) and len(shape) == 2 else ()
    return {key: size for key, size in zip(("d_model", "n_latents"), sizes, strict=False) if isinstance(size, int)}


def model_folder(target: Target) -> Path:
    """Return the folder of a model's files: the model's folder, or a hub model's folder in the local cache."""
    from huggingface_hub import try_to_load_from_cache as cached

    if Path(target.model).is_dir():
        return Path(target.model)
    config = cached(target.model, "config.json", revision=target.revision)
    return Path(config).parent if isinstance(config, str) else Path(target.model)


def _pinned(target: Target) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", target.revision or "") is not None


def quiet_bar() -> type[tqdm]:
    """Return a tqdm class that displays nothing."""
    from tqdm import tqdm

    def init(self: tqdm, *args: object, **options: object) -> None:
        tqdm.__init__(self, *args, **options | {"disable": True})

    return type("QuietBar", (tqdm,), {"__init__": init})


def snapshot_is_whole(target: Target) -> bool:
    """Return whether the hub's cache has config and all weights of a target's model."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        path = try_to_load_from_cache(target.model, name, revision=target.revision)
        return path if isinstance(path, str) else None

    names = {"model.safetensors"}
    if index := cached("model.safetensors.index.json"):
        listed = read_json_table(Path(index), "list of weights").get("weight_map")
        names = set(map(str, listed.values())) if isinstance(listed, dict) else {""}
    return all(cached(name) for name in {"config.json", *names})
