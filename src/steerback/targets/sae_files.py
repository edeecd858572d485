"""Locate the files of an SAE, in a folder or on a model hub, and load them as an `Sae`.

    steerback      sae.safetensors (W_enc, b_enc, W_dec, b_dec, threshold) and sae.json
    goodfire       .pt or .pth, a state dict: encoder_linear.weight (n, d), encoder_linear.bias (n,),
                   decoder_linear.weight (d, n), decoder_linear.bias (d,); ReLU
    gemma-scope    params.npz: W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,); JumpReLU
    gemma-scope-2  params.safetensors with the same names in lower case, and an optional config.json
    saelens        sae_weights.safetensors and cfg.json, see `targets.saelens`
    sae-lens       a release that SAELens lists: location is the release, file the id; needs the extra `sae-lens`

Goodfire and Gemma Scope subtract no input bias and normalise nothing. Gemma Scope's activations must be strictly above
their threshold (Lieberum et al. 2024). No loader can run code from a file.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from steerback.errors import SteerbackError, unknown
from steerback.readers import read_json_table
from steerback.targets.download import NoSuchFile, commit_of, hub_file
from steerback.targets.sae import TENSORS, Sae, stored
from steerback.targets.saelens import convert
from steerback.targets.target import Dtype, SaeSource, read_metadata

DAMAGED = (
    *(OSError, EOFError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError),
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, SyntaxError, OverflowError, RecursionError),
    *(RuntimeError, MemoryError, NotImplementedError),
)
"""Exceptions that the libraries raise for a damaged file or a file of another format."""


@dataclass(frozen=True, slots=True)
class Place:
    """The files of an SAE on this machine; `config` is None if the format has no config or the file is missing."""

    weights: Path
    config: Path | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """How to locate and read the files of one format.

    `weights` and `config` are file names in the SAE's folder; without `weights`, any file with one of `suffixes` is
    read. A format without suffixes has no files; its SAE comes from a library.
    """

    read: Callable[[Place, SaeSource], Sae]
    suffixes: tuple[str, ...] = ()
    weights: str | None = None
    config: str | None = None
    config_needed: bool = False


def load_sae(source: Path | SaeSource, format: str = "steerback") -> Sae:
    """Load an SAE on the CPU and check it.

    `source` is a path, read in `format`, or a source, which names its format. Raises SteerbackError if the SAE is
    missing, damaged or of another layer.
    """
    if isinstance(source, Path):
        source = SaeSource(str(source), format)
    form = format_of(source)
    place = locate(source) if form.suffixes else Place(Path(source.location))
    try:
        sae = form.read(place, source)
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SteerbackError(f"{place.weights}: not a readable {source.format} SAE ({reason[:200]})") from error
    if source.layer is not None and sae.layer != source.layer:
        raise SteerbackError(
            f"{place.weights}: an SAE of layer {sae.layer}, but the target's sae_layer is {source.layer}; correct it"
        )
    if source.dtype is not None:
        if source.dtype not in get_args(Dtype):
            raise unknown("dtype of an SAE", source.dtype, get_args(Dtype))
        sae = sae.to("cpu", torch.bfloat16 if source.dtype == "bfloat16" else torch.float32)
    return sae.check(str(place.weights))


def locate(source: SaeSource) -> Place:
    """Return the files of a source: local files, or else those of a hub repository, downloaded if necessary."""
    form = format_of(source)
    here = Path(source.location).expanduser()
    if not here.exists() and (source.location.count("/") != 1 or source.location.startswith((".", "~", "/"))):
        raise SteerbackError(
            f"SAE {source.location!r}: neither an existing folder or file nor the name of a repository (owner/name)"
        )
    if here.is_file():
        return _local(here, form)
    inside = source.file or ""
    named = inside.endswith(form.suffixes)
    if not named and form.weights is None:
        if not here.is_dir():
            raise SteerbackError(f"SAE {source.location!r}: name the file of the repository, sae = {{file = ...}}")
        return Place(_only_file(here / inside, form.suffixes))
    weights = inside if named else f"{inside}/{form.weights}".lstrip("/")
    if here.is_dir():
        if not (here / weights).is_file():
            raise SteerbackError(f"{here}: has no {weights}, where the format {source.format} stores an SAE's weights")
        return _local(here / weights, form)
    cached = hub_file(source.location, weights, source.revision)
    if form.config is None:
        return Place(cached)
    try:
        return Place(cached, hub_file(source.location, str(Path(weights).with_name(form.config)), source.revision))
    except NoSuchFile:
        if form.config_needed:
            raise
        return Place(cached)


def describe(source: SaeSource) -> dict[str, str | None]:
    """Describe the origin of a loaded SAE for the manifest; for a hub with the commit and the file's SHA-256."""
    known = {"format": source.format, "revision": source.revision, "file": source.file}
    here = Path(source.location).expanduser()
    if not format_of(source).suffixes:
        return known | {"location": source.location}
    if here.exists():
        return known | {"location": here.name}
    weights = locate(source).weights
    return known | {"location": source.location, "commit": commit_of(weights), "sha256": weights.resolve().name}


def format_of(source: SaeSource) -> Format:
    """Return the format of a source. Raises SteerbackError that lists the formats if it is unknown."""
    if source.format not in FORMATS:
        raise unknown("SAE format", source.format, FORMATS)
    return FORMATS[source.format]


def _local(weights: Path, form: Format) -> Place:
    """Return a local file of weights and the config file in the same folder."""
    if form.config is None:
        return Place(weights)
    config = weights.with_name(form.config)
    if config.is_file():
        return Place(weights, config)
    if form.config_needed:
        raise SteerbackError(f"{weights.parent}: no {form.config} there; it is needed to interpret the weights")
    return Place(weights)


def _only_file(folder: Path, suffixes: tuple[str, ...]) -> Path:
    files = sorted(p for p in folder.glob("*") if p.name.endswith(suffixes)) if folder.is_dir() else []
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise SteerbackError(f"{folder}: expected one file *{' or *'.join(suffixes)}, got {names}; name one")
    return files[0]


def _pick(tensors: Mapping[str, Tensor], names: Sequence[str], path: Path) -> dict[str, Tensor]:
    """Return the tensors with these `names` under the names in TENSORS; `names` has the order of TENSORS."""
    if absent := [name for name in names if name not in tensors]:
        raise SteerbackError(
            f"{path}: lacks {', '.join(absent)}; the file has {', '.join(sorted(tensors)) or 'no tensors'}"
        )
    return {name: stored(tensors[theirs], f"{path}: {theirs}") for name, theirs in zip(TENSORS, names, strict=False)}


def _layer(source: SaeSource, path: Path) -> int:
    """Return the target's `sae_layer`, for a file that does not contain its layer."""
    if source.layer is None:
        raise SteerbackError(f"{path}: the file does not contain its layer; set sae_layer in the target's table")
    return source.layer


def _native(place: Place, source: SaeSource) -> Sae:
    folder = place.weights.parent
    meta, weights = read_metadata(folder), folder / "sae.safetensors"
    tensors = load_file(weights)
    if "b_enc" in tensors:
        tensors.setdefault("threshold", torch.zeros_like(tensors["b_enc"]))
    sae = Sae(meta.kind, meta.layer, k=meta.k, **_pick(tensors, TENSORS, weights)).check(str(weights))
    for name, noted, value in (("d_model", meta.d_model, sae.d_model), ("n_latents", meta.n_latents, sae.n_latents)):
        if noted is not None and noted != value:
            raise SteerbackError(f"{folder}: sae.json says {name} {noted}, but the weights have {value}")
    return sae


def _goodfire(place: Place, source: SaeSource) -> Sae:
    """Load a checkpoint as a memory map; its matrices are transposed views, not copies."""
    path = place.weights
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about pickle protocols; real problems are raised
            # only the zip format of a checkpoint can be mapped; the older format is loaded into memory
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise SteerbackError(
            f"{path}: a pickle with objects other than tensors; refused, because loading it would run code from it"
        ) from error
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    names = [f"{part}_linear.{kind}" for part in ("encoder", "decoder") for kind in ("weight", "bias")]
    weights = _pick(tensors, names, path)
    for name in ("W_enc", "W_dec"):
        if weights[name].ndim != 2:
            raise SteerbackError(f"{path}: a weight has {weights[name].ndim} dimensions, expected 2")
        weights[name] = weights[name].T
    return Sae("relu", _layer(source, path), threshold=torch.zeros_like(weights["b_enc"]), k=None, **weights)


def _jumprelu(tensors: Mapping[str, Tensor], layer: int, path: Path) -> Sae:
    """Build Gemma Scope's SAE. A negative threshold is treated as 0, because its JumpReLU also applies ReLU."""
    weights = _pick(tensors, [name.lower() for name in TENSORS], path)
    return Sae("jumprelu", layer, k=None, **weights | {"threshold": weights["threshold"].clamp(min=0)})


def _gemma_scope(place: Place, source: SaeSource) -> Sae:
    path = place.weights
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        # the case of names differs between releases
        tensors = {name.lower(): torch.from_numpy(archive[name]) for name in archive.files}
    if not torch.allclose(tensors.get("scaling_factor", torch.ones(1)), torch.ones(1)):
        raise SteerbackError(f"{path}: has a scaling_factor other than 1, which is not supported")
    return _jumprelu(tensors, _layer(source, path), path)


def _gemma_scope_2(place: Place, source: SaeSource) -> Sae:
    path, config = place.weights, place.config
    tensors = load_file(path)
    if "affine_skip_connection" in tensors:
        raise SteerbackError(f"{path}: a transcoder; steering needs an SAE of the residual stream (resid_post)")
    return _jumprelu(tensors, _layer(source, path) if config is None else _gemma_layer(config), path)


def _gemma_layer(path: Path) -> int:
    """Return the block whose output an SAE of Gemma Scope 2 reads, from its config."""
    config = read_json_table(path, "SAE config")
    if config.get("architecture") != "jump_relu":
        raise SteerbackError(f"{path}: architecture {config.get('architecture')!r}, expected 'jump_relu'")
    hook = str(config.get("hf_hook_point_in"))
    layer = re.fullmatch(r"(?:\w+\.)*layers\.(\d{1,4})\.output", hook)
    if layer is None:
        raise SteerbackError(f"{path}: reads {hook!r}; steering needs an SAE of a block's output")
    return int(layer[1])


def _saelens(place: Place, source: SaeSource) -> Sae:
    assert place.config is not None  # the format needs it
    config = read_json_table(place.config, "SAE config")
    return convert(config, load_file(place.weights), str(place.weights), source.input_scale)


def _sae_lens_release(place: Place, source: SaeSource) -> Sae:
    where = f"SAELens {source.location}/{source.file}"
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise SteerbackError(
            f"{where}: needs SAELens ({error}); install it with: pip install 'steerback[sae-lens]'"
        ) from error
    if source.file is None:
        raise SteerbackError(f"{where}: name the SAE of the release, sae = {{file = ...}}")
    if source.revision is not None:
        raise SteerbackError(f"{where}: SAELens takes no revision; remove it, or name the repository and its format")
    loaded = SAE.from_pretrained(source.location, source.file, device="cpu")
    tensors = {name: tensor.detach() for name, tensor in loaded.state_dict().items()}
    return convert(loaded.cfg.to_dict(), tensors, where, source.input_scale)


FORMATS = {
    "steerback": Format(_native, (".safetensors",), "sae.safetensors", "sae.json", config_needed=True),
    "goodfire": Format(_goodfire, (".pt", ".pth")),
    "gemma-scope": Format(_gemma_scope, (".npz",), "params.npz"),
    "gemma-scope-2": Format(_gemma_scope_2, (".safetensors",), "params.safetensors", "config.json"),
    "saelens": Format(_saelens, (".safetensors",), "sae_weights.safetensors", "cfg.json", config_needed=True),
    "sae-lens": Format(_sae_lens_release),
}
