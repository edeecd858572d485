"""File formats of SAEs: finds the files of a source, here or on a model hub, and reads them into one `Sae`.

Each format is a function from files to an `Sae` in our convention; what cannot be brought into it is refused with the
reason. Knows nothing of models or of what an SAE is used for.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerback.errors import SteerbackError, unknown
from steerback.targets.download import NoSuchFile, commit_of, hub_file
from steerback.targets.sae import Sae, load_native

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource


@dataclass(frozen=True, slots=True)
class Place:
    """The files of an SAE on this machine; `config` is None where the format has none, or none was there."""

    weights: Path
    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How to read one format. `weights` and `config` are names in its folder; no `weights`: any name of `suffixes`.

    `reads` gets the files and the source. A format without files gets its SAE from a library.
    """

    reads: Callable[[Place, SaeSource], Sae]
    suffixes: tuple[str, ...] = ()
    weights: str | None = None
    config: str | None = None
    config_needed: bool = False


def read(source: SaeSource) -> Sae:
    """The SAE of a source, on the CPU and checked. Raises SteerbackError in one line for whatever is wrong with it."""
    form = _format(source)
    place = locate(source) if form.suffixes else Place(Path(source.location))
    try:
        sae = form.reads(place, source)
    except DAMAGED as error:
        raise SteerbackError(f"{place.weights}: not a readable {source.format} SAE ({_short(error)})") from error
    if source.layer is not None and sae.layer != source.layer:
        raise SteerbackError(
            f"{place.weights}: an SAE of layer {sae.layer}, where layer {source.layer} was asked for; correct sae_layer"
        )
    if source.dtype is not None:
        sae = sae.to("cpu", _dtype(source.dtype))
    return sae.check(str(place.weights))


def locate(source: SaeSource) -> Place:
    """The files of a source: those of a local file or folder, else those of a hub repository, downloaded if need be."""
    form = _format(source)
    here = Path(source.location).expanduser()
    if not here.exists() and (source.location.count("/") != 1 or source.location.startswith((".", "~", "/"))):
        raise SteerbackError(
            f"SAE {source.location!r}: no such folder or file, nor the name of a repository (owner/name)"
        )
    inside = source.file or ""
    if here.is_file():
        return Place(here, _beside(here, form))
    named = inside.endswith(form.suffixes)
    if not named and form.weights is None:
        if not here.is_dir():
            raise SteerbackError(f"SAE {source.location!r}: say which file of the repository, sae = {{file = ...}}")
        return Place(_only_file(here / inside, form.suffixes))
    weights = inside if named else f"{inside}/{form.weights}".lstrip("/")
    config = None if form.config is None else str(Path(weights).with_name(form.config))
    if here.is_dir():
        if not (here / weights).is_file():
            raise SteerbackError(f"{here}: no {weights} there; {source.format} keeps an SAE's weights under that name")
        return Place(here / weights, _beside(here / weights, form))
    found = hub_file(source.location, weights, source.revision)
    try:
        return Place(found, None if config is None else hub_file(source.location, config, source.revision))
    except NoSuchFile:
        if form.config_needed:
            raise
        return Place(found)


def describe(source: SaeSource) -> dict[str, Any]:
    """Where an SAE that was read came from, for the manifest: with the commit and the file's SHA-256 if from a hub."""
    said: dict[str, Any] = {"format": source.format, "revision": source.revision, "file": source.file}
    if not _format(source).suffixes:
        return said | {"location": source.location}
    if (here := Path(source.location).expanduser()).exists():
        return said | {"location": here.name}
    weights = locate(source).weights
    return said | {"location": source.location, "commit": commit_of(weights), "sha256": weights.resolve().name}


def _format(source: SaeSource) -> Format:
    if source.format not in FORMATS:
        raise unknown("SAE format", source.format, FORMATS)
    return FORMATS[source.format]


def _beside(weights: Path, form: Format) -> Path | None:
    if form.config is None:
        return None
    path = weights.with_name(form.config)
    if not path.is_file():
        if form.config_needed:
            raise SteerbackError(f"{weights.parent}: no {form.config} there, which says how the weights are meant")
        return None
    return path


def _only_file(folder: Path, suffixes: tuple[str, ...]) -> Path:
    found = sorted(p for p in folder.glob("*") if p.name.endswith(suffixes)) if folder.is_dir() else []
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise SteerbackError(f"{folder}: expected one file *{' or *'.join(suffixes)}, found {names}; name it")
    return found[0]


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def _dtype(name: str) -> Any:
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in types:
        raise unknown("dtype of an SAE", name, types)
    return types[name]


def _native(place: Place, source: SaeSource) -> Sae:
    return load_native(place.weights.parent)


def _lazily(module: str) -> Callable[[Place, SaeSource], Sae]:
    def reads(place: Place, source: SaeSource) -> Sae:
        from importlib import import_module

        sae: Sae = import_module(f"steerback.targets.formats.{module}").read(place, source)
        return sae

    return reads


FORMATS = {
    "steerback": Format(_native, (".safetensors",), "sae.safetensors", "sae.json", config_needed=True),
    "goodfire": Format(_lazily("goodfire"), (".pt", ".pth")),
    "gemma-scope": Format(_lazily("gemma_scope"), (".npz",), "params.npz"),
    "gemma-scope-2": Format(_lazily("gemma_scope_2"), (".safetensors",), "params.safetensors", "config.json"),
    "saelens": Format(_lazily("saelens"), (".safetensors",), "sae_weights.safetensors", "cfg.json", config_needed=True),
    "sae-lens": Format(_lazily("sae_lens_release")),
}


def _damaged() -> tuple[type[BaseException], ...]:
    from safetensors import SafetensorError

    reading = (OSError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError)
    meaning = (ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, OverflowError)
    return (*reading, *meaning, RuntimeError, MemoryError, NotImplementedError)


DAMAGED = _damaged()
"""What readers raise on a damaged file, and on one of another format."""


def with_layer(sae: Sae, source: SaeSource, where: Path) -> Sae:
    """An SAE whose file does not say its layer, with the layer of the source."""
    if source.layer is None:
        raise SteerbackError(f"{where}: the file does not say its layer; give the target sae_layer")
    return replace(sae, layer=source.layer)
