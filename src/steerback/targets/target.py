"""What is steered: a model, its SAE, the layers, labels and the prior for the threshold boost.

A `Target` is plain data read from a registry (TOML) or a folder; it loads no weights and knows nothing of engines.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from steerback.errors import SteerbackError, unknown
from steerback.records import LatentKey, digest
from steerback.targets.directions import Facts, find_directions, read_facts
from steerback.targets.label_files import read_user_labels
from steerback.targets.labels import read_contexts, read_dead, read_labels, read_metadata

REGISTRY = Path(__file__).with_name("registry.toml")
Dtype = Literal["float32", "bfloat16"]
PromptFormat = Literal["chat", "plain"]


@dataclass(frozen=True, slots=True)
class BoostPrior:
    """Threshold boost before any trial: normal(mean, sd) on [low, high], in raw decoder units."""

    mean: float
    sd: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sd > 0 and self.low < self.high and self.low <= self.mean <= self.high):
            raise SteerbackError(f"boost_prior {asdict(self)}: needs sd > 0 and low <= mean <= high, low < high")


@dataclass(frozen=True, slots=True)
class SaeSource:
    """Where an SAE comes from: a format known to `targets.formats`, a folder or hub id, a file in it, a revision.

    `layer` is the target's `sae_layer`, for files that do not say theirs; `dtype` None keeps bfloat16 and makes
    anything else float32; `input_scale` is the constant that training multiplied inputs by, where the file lacks it.
    """

    location: str
    format: str = "steerback"
    file: str | None = None
    revision: str | None = None
    layer: int | None = None
    dtype: Dtype | None = None
    input_scale: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Everything that says what is steered and where. Layers are 0-based, the residual stream after the block.

    `model` is a folder or a hub id; `n_latents` is 0 without an SAE. `labels_folder` None means no labels.
    """

    name: str
    model: str
    steer_layer: int
    read_layer: int
    boost_prior: BoostPrior
    summary: str = ""
    revision: str | None = None
    dtype: Dtype = "float32"
    sae: SaeSource | None = None
    sae_layer: int | None = None
    n_latents: int = 0
    labels_folder: str | None = None
    label_source: str | None = None
    """Where `steerback labels fetch` gets labels from; see `targets.label_fetch`."""
    prompt_format: PromptFormat = "chat"
    max_new_tokens: int | None = None
    responses_per_second: float | None = None
    """Measured while calibrating on two CPU cores; for the estimate before a run only."""
    discovery_prompts: str = "discovery"
    random_sets: int = 3
    direction_files: tuple[tuple[str, str], ...] = ()
    """(name, file) of each direction that can be added beside (or instead of) SAE latents; see `targets.directions`."""

    def labels(self) -> dict[int, str]:
        """Label per latent, the user's own (fetched, imported, made) before the target's; others are absent."""
        return self.own_labels() | {k: named.label for k, named in read_user_labels(self.user_key).items()}

    def own_labels(self) -> dict[int, str]:
        """The labels that come with the target."""
        return {} if self.labels_folder is None else read_labels(Path(self.labels_folder))

    @property
    def user_key(self) -> str:
        """Name of the folders in which the user's labels and directions for this target are kept."""
        return user_key(self.name, self.model)

    def contexts(self) -> dict[LatentKey, tuple[str, ...]]:
        """Top-activating text snippets per latent (empty where unknown)."""
        found: dict[LatentKey, tuple[str, ...]] = {}
        if self.labels_folder is not None:
            found |= read_contexts(Path(self.labels_folder))
        return found | {name: texts for name in self.directions() if (texts := self.direction_facts(name).contexts)}

    def dead_latents(self) -> frozenset[int]:
        """Latents that never fired on the SAE's own corpus, by its metadata."""
        return frozenset() if self.labels_folder is None else read_dead(Path(self.labels_folder))

    @property
    def has_sae(self) -> bool:
        """Whether there are latents to steer with and to read, or directions alone."""
        return self.sae is not None or self.n_latents > 0

    def directions(self) -> tuple[str, ...]:
        """Names of the directions that can be added beside (or instead of) SAE latents."""
        return tuple(name for name, _ in self.direction_files)

    def direction_facts(self, name: str) -> Facts:
        """What is known of a direction beside its vector."""
        return read_facts(Path(dict(self.direction_files)[name]))

    def with_directions(self, names: Collection[str]) -> Target:
        """The same target with these of its directions alone, so that what a run does not use does not shape it."""
        return replace(self, direction_files=tuple(f for f in self.direction_files if f[0] in names))

    def prior_of(self, key: LatentKey) -> BoostPrior:
        """The boost prior of a latent; that of a direction beside an SAE is scaled to the residual's norm if known."""
        values = self.direction_facts(key).prior() if isinstance(key, str) and self.has_sae else None
        return self.boost_prior if values is None else BoostPrior(*values)

    def parameters(self) -> int | None:
        """Number of the model's parameters, from the headers of its safetensors files; None where there are none."""
        names = [p for p in Path(self.model).glob("*.safetensors") if p.name != "sae.safetensors"]
        return sum(map(_count_parameters, names)) or None

    def describe(self) -> dict[str, Any]:
        """JSON-able form for the manifest."""
        return asdict(self)


def user_key(name: str, model: str) -> str:
    """A built-in target's name; any other's with a mark of its model, as two folders may have one name."""
    return name if name.split("@")[0] in _registry() else f"{name}-{digest(model)[:8]}"


def _count_parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def builtin_targets() -> tuple[Target, ...]:
    """All built-in targets, whether their weights are there or not."""
    return tuple(_from_entry(name, entry, complete=False) for name, entry in _registry().items())


def resolve(name: str) -> Target:
    """A built-in target by name, or a folder in our own format by its path.

    Raises SteerbackError listing the choices for an unknown name, and saying what to build where weights are missing.
    """
    if name in _registry():
        return _from_entry(name, _registry()[name], complete=True)
    folder = Path(name).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return from_folder(folder)
    raise unknown("target", name, [*_registry(), "(a folder with config.json and sae.json)"])


def from_folder(folder: Path, **changes: Any) -> Target:
    """A target from a folder: config.json, weights, tokenizer, sae.json + sae.safetensors, optional labels.

    `boost_prior` ([mean, sd, low, high]) in sae.json wins over the registry's; `changes` set any other key.
    """
    return _from_entry(folder.name, {"model": str(folder), **changes}, complete=True)


def _from_entry(name: str, entry: Mapping[str, Any], complete: bool) -> Target:
    """A target from a table of the registry; `complete` reads the SAE's layer and size from its folder."""
    entry = dict(entry)
    strange = set(entry) - set(Target.__dataclass_fields__) - {"labels", "directions"}
    if strange:
        raise unknown(f"key of target {name!r}", sorted(strange)[0], sorted(Target.__dataclass_fields__))
    if entry["model"] == "builtin":
        entry["model"] = str(_builtin_folder(name, check=complete))
    folder = Path(entry["model"])
    if isinstance(entry.get("sae"), Mapping):
        entry["sae"] = SaeSource(**entry["sae"])
    elif "sae" not in entry and (not complete or (folder / "sae.json").is_file()):
        entry["sae"] = SaeSource(str(folder))
    labels = entry.pop("labels", str(folder) if folder.is_dir() else None)
    entry.setdefault("labels_folder", labels)
    entry.setdefault("direction_files", find_directions(entry.pop("directions", ()), user_key(name, entry["model"])))
    if entry.get("sae") is None and "boost_prior" not in entry:
        known = (read_facts(Path(file)).prior() for _, file in entry["direction_files"])
        entry["boost_prior"] = next((p for p in known if p is not None), None)
    if complete:
        _complete_from_sae(name, entry)
    for key, choices in (("dtype", get_args(Dtype)), ("prompt_format", get_args(PromptFormat))):
        if key in entry and entry[key] not in choices:
            raise unknown(f"{key} of target {name!r}", entry[key], choices)
    entry["boost_prior"] = _prior(name, entry.get("boost_prior"))
    return Target(name=name, steer_layer=entry.pop("steer_layer", -1), read_layer=entry.pop("read_layer", -1), **entry)


def _complete_from_sae(name: str, entry: dict[str, Any]) -> None:
    """Fills layers, size and prior from `sae.json` where the entry leaves them out."""
    source = entry.get("sae")
    if source is not None and source.format == "steerback":
        meta = read_metadata(Path(source.location))
        entry.setdefault("sae_layer", meta["layer"])
        entry.setdefault("n_latents", int(meta.get("n_latents", 0)))
        if "boost_prior" in meta:  # measured with these very weights
            entry["boost_prior"] = meta["boost_prior"]
    layer = entry.get("sae_layer")
    for key in ("steer_layer", "read_layer"):
        if entry.setdefault(key, layer) is None:
            raise SteerbackError(f"target {name!r} has no SAE, so it has to say its {key}")


def _prior(name: str, value: Any) -> BoostPrior:
    try:
        if isinstance(value, BoostPrior):
            return value
        return BoostPrior(**value) if isinstance(value, Mapping) else BoostPrior(*map(float, value))
    except TypeError:
        raise SteerbackError(
            f"target {name!r}: boost_prior {value!r} should be {{mean, sd, low, high}}, in raw decoder units"
        ) from None


def _builtin_folder(name: str, check: bool) -> Path:
    from steerback.organism import weights_dir

    folder = weights_dir(name)
    if check and not (folder / "config.json").is_file():
        raise SteerbackError(f"{name}: no weights in {folder}; make them with: python -m steerback.organism build")
    return folder


@cache
def _registry() -> dict[str, dict[str, Any]]:
    return tomllib.loads(REGISTRY.read_text(encoding="utf-8"))
