"""Named directions of the residual stream, to steer without an SAE.

    NAME.safetensors    steerback's format: tensor `direction` (d,), with `DirectionFacts` in the header
    other safetensors   one tensor (d,), or `direction.N` / `N` per layer
    .npy                one array (d,)
    .gguf               control vector of llama.cpp: `direction.N` acts on the residual after block N

Directions are scaled to length 1, so a boost is the L2 norm of the added vector and comparable among directions. Names
and facts are read without a tensor library. This module knows nothing about models, texts or engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from steerback.errors import SteerbackError, one_line
from steerback.readers import read_safetensors_header
from steerback.store.files import make_folder, user_folder, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

DirectionFiles = Mapping[str, str] | Sequence[str]
"""A target's directions: {name: file}, or a list of files and folders, where each file's stem is the name."""
SUFFIXES = (".safetensors", ".npy", ".gguf")
KEY, HEADER = "direction", "steerback.direction"
PRIOR = (0.5, 0.3, 2.0)
"""Prior of a direction's threshold boost: mean, sd and upper bound as shares of the residual's norm."""


@dataclass(frozen=True, slots=True)
class DirectionFacts:
    """Facts about a direction, stored with its vector in steerback's format; other formats have no facts.

    `norm` is the length before scaling to 1, `residual_norm` the median norm of the residual that it was made from.
    """

    layer: int | None = None  # 0-based, the residual after the block
    norm: float | None = None
    residual_norm: float | None = None
    source: str = ""
    model: str = ""
    contexts: tuple[str, ...] = ()
    """A few texts that express the direction; an offline judge uses them as references."""

    def prior(self) -> tuple[float, float, float, float] | None:
        """Return the prior (mean, sd, low, high) of the threshold boost; None if the residual's norm is unknown."""
        if self.residual_norm is None:
            return None
        mean, sd, high = (share * self.residual_norm for share in PRIOR)
        return mean, sd, 0.0, high


def user_directions(target: str) -> Path:
    """Return the folder with the user's directions for a target, one file per direction."""
    return user_folder("directions", target)


def find_directions(listed: DirectionFiles, target: str, key: str | None = None) -> tuple[tuple[str, str], ...]:
    """Return (name, file) of each direction: the `listed` ones first, then those in the user's folder.

    `key` is the name of the target's folder among the user's. An unnamed direction is named after its file (without the
    suffix). Raises SteerbackError for a missing file or folder.
    """
    directions: dict[str, str] = {}
    named = listed.items() if isinstance(listed, Mapping) else [(None, place) for place in listed]
    for name, place in named:
        path = Path(place).expanduser()
        files = _in_folder(path) if path.is_dir() else [path]
        if name is not None and path.is_dir():
            raise SteerbackError(f"target {target!r}: direction {name!r} is the folder {path}; name a file")
        for file in files:
            if not file.is_file() or file.suffix not in SUFFIXES:
                raise SteerbackError(
                    f"target {target!r}: directions {place!r}: no such folder or {', '.join(SUFFIXES)} file"
                )
            directions[name or file.stem] = str(file)
    for file in _in_folder(user_directions(key or target)):
        directions.setdefault(file.stem, str(file))
    return tuple(directions.items())


def _in_folder(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES) if folder.is_dir() else []


def read_facts(path: Path) -> DirectionFacts:
    """Return the facts in the header of a file in steerback's format; default facts for other formats."""
    if path.suffix != ".safetensors":
        return DirectionFacts()
    stored = read_safetensors_header(path, "direction").get("__metadata__", {}).get(HEADER, "{}")
    try:
        return TypeAdapter(DirectionFacts).validate_json(str(stored))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise SteerbackError(f"direction {path}: damaged facts in its header ({reason[:200]})") from error


def read_vector(path: Path, layer: int) -> Tensor:
    """Return the unscaled vector (d,) float32 of a file; from a file with one vector per layer, that of `layer`."""
    import torch

    reader = {".safetensors": _safetensors, ".npy": _npy, ".gguf": _gguf}.get(path.suffix)
    if reader is None:
        raise SteerbackError(f"direction {path}: unknown suffix; supported: {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise SteerbackError(f"direction {path}: there is no such file")
    stored = _one(path, reader(path), layer)
    if stored.is_complex():
        raise SteerbackError(f"direction {path}: has complex numbers; expected real numbers")
    vector: Tensor = stored.to(torch.float32)
    if vector.ndim != 1:
        raise SteerbackError(
            f"direction {path}: has shape {tuple(vector.shape)}, expected one vector (width of the model,)"
        )
    if not 0 < float(vector.norm()) < float("inf"):  # also true for NaN
        raise SteerbackError(f"direction {path}: is zero, contains NaN or infinity, or its norm is infinite")
    return vector


def _one(path: Path, tensors: Mapping[str, Tensor], layer: int) -> Tensor:
    """Return the single tensor of a file, or that of `layer` among tensors named `direction.N`, `layer_N` or `N`."""
    if len(tensors) == 1 and not re.search(r"\d$", next(iter(tensors))):
        return next(iter(tensors.values()))
    by_layer = {int(m[1]): t for key, t in tensors.items() if (m := re.search(r"(?:^|\D)(\d+)$", key))}
    if len(by_layer) != len(tensors) or layer not in by_layer:
        names = ", ".join(sorted(tensors)[:8]) or "no tensor"
        raise SteerbackError(f"direction {path}: has no vector for layer {layer}; it has {names}")
    return by_layer[layer]


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise SteerbackError(f"direction {path}: not a readable safetensors file ({error})") from error


def _npy(path: Path) -> dict[str, Tensor]:
    import numpy as np
    import torch

    try:
        array = np.asarray(np.load(path, allow_pickle=False))
        with np.errstate(over="ignore"):  # a number above the range of float32 becomes infinite, which is refused later
            return {KEY: torch.from_numpy(array if np.iscomplexobj(array) else array.astype(np.float32))}
    except Exception as error:  # numpy raises many types of errors for a damaged header
        raise SteerbackError(
            f"direction {path}: not a readable .npy file of numbers ({one_line(error)[:200]})"
        ) from error


def _gguf(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise SteerbackError(
            f"direction {path}: gguf files need the extra 'gguf': pip install 'steerback[gguf]'"
        ) from None
    try:
        tensors = GGUFReader(path).tensors
        return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}
    except Exception as error:  # the library raises many types of errors for a damaged file
        raise SteerbackError(f"direction {path}: not a readable gguf file ({' '.join(str(error).split())})") from error


def save_direction(path: Path, vector: Tensor, facts: DirectionFacts) -> None:
    """Write a direction (d,) in steerback's format, atomically and without scaling it."""
    import torch
    from safetensors.torch import save

    make_folder(path.parent)
    kept = vector.detach().to("cpu", torch.float32).contiguous()
    write_atomic(path, save({KEY: kept}, {HEADER: json.dumps(asdict(facts), ensure_ascii=False)}))


def load_directions(files: Iterable[tuple[str, str]], layer: int, target: str) -> dict[str, Tensor]:
    """Return unit vectors (d,) by name. Raises SteerbackError for a direction made at another layer than `layer`."""
    vectors = {}
    for name, place in files:
        made_at = read_facts(Path(place)).layer
        if made_at is not None and made_at != layer:
            raise SteerbackError(
                f"direction {name!r} was made at layer {made_at}, but target {target!r} steers at layer {layer}: "
                f"make it again with --layer {layer}, or set steer_layer = {made_at} for the target"
            )
        vector = read_vector(Path(place), layer)
        vectors[name] = vector / vector.norm()
    return vectors


def difference_of_means(positive: Tensor, negative: Tensor) -> Tensor:
    """Return the mean of positive rows (n, d) minus the mean of negative rows (m, d), computed in float64: (d,)."""
    import torch

    return (positive.double().mean(0) - negative.double().mean(0)).to(torch.float32)
