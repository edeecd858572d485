"""What is steered: a model, its SAE, the layers, labels and the prior for the threshold boost.

A `Target` is plain data, made by `targets.registry` from a table or a folder, or by hand; it loads no weights and knows
nothing of engines.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from steerback.config import Settings, parse
from steerback.errors import SteerbackError
from steerback.readers import Json, read_json_table, read_safetensors_header
from steerback.records import BoostPrior, LatentKey, digest
from steerback.targets.directions import DirectionFacts, read_facts
from steerback.targets.labels import read_contexts, read_dead, read_labels, read_user_labels

Kind = Literal["relu", "jumprelu", "topk"]
Dtype = Literal["float32", "bfloat16"]
PromptFormat = Literal["chat", "plain", "authors"]
"""The tokenizer's chat template, the prompt as it is, or the template with Llama's header doubled (see `Prompter`)."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}
"""Per parameter."""


def _prior(value: object) -> BoostPrior:
    """Return a prior from {mean, sd, low, high} or the four numbers in this order."""
    names = ("mean", "sd", "low", "high")
    if isinstance(value, BoostPrior):
        return value
    given = dict(zip(names, value, strict=False)) if isinstance(value, list | tuple) and len(value) == 4 else value
    if not (isinstance(given, dict) and set(given) == set(names) and all(map(_is_number, given.values()))):
        raise ValueError(f"{value!r} should be {{mean, sd, low, high}}, in raw decoder units")
    try:
        return BoostPrior(**{name: float(number) for name, number in given.items()})
    except SteerbackError as error:
        raise ValueError(str(error)) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


PriorField = Annotated[BoostPrior, BeforeValidator(_prior)]
"""A prior in a table or in `sae.json`."""


class SaeMetadata(Settings):
    """The facts in a `sae.json` that are read; what else it holds is left alone."""

    model_config = ConfigDict(extra="ignore", strict=True)
    kind: Kind
    layer: int = Field(ge=0)
    d_model: int | None = Field(None, ge=1)
    n_latents: int | None = Field(None, ge=1)
    k: int | None = Field(None, ge=1)
    boost_prior: PriorField | None = None
    """Measured with these very weights, so it wins over the registry's."""


def read_metadata(folder: Path) -> SaeMetadata:
    """Read the `sae.json` of a folder in our own format."""
    path = folder / "sae.json"
    if not path.is_file():
        raise SteerbackError(f"{folder}: no sae.json there; an SAE folder holds sae.safetensors and sae.json")
    return parse(SaeMetadata, read_json_table(path, "metadata"), str(path))


@dataclass(frozen=True, slots=True)
class SaeSource:
    """Where an SAE comes from: a format known to `targets.sae_files`, a folder or hub id, a file in it, a revision.

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

    `model` is a folder or a hub id; `n_latents` is 0 without an SAE. `labels_folder` None means no labels. Additions
    act at `steer_layer`, recording at `read_layer`, clamps at `clamp_layer` (None: the SAE's own layer).
    """

    name: str
    model: str
    steer_layer: int
    read_layer: int
    boost_prior: BoostPrior
    summary: str = ""
    builtin: bool = False
    """Whether it is one of the package's registry, not the user's."""
    planted: bool = False
    """Whether the model restarts because it was trained to: then its numbers are no evidence about other models."""
    revision: str | None = None
    adapter: str | None = None
    """Folder of a LoRA adapter that the model is served with, unmerged; see `with_adapter`."""
    dtype: Dtype = "float32"
    sae: SaeSource | None = None
    sae_layer: int | None = None
    clamp_layer: int | None = None
    n_latents: int = 0
    n_layers: int | None = None
    d_model: int | None = None
    n_parameters: int | None = None
    """Of the model; layers, width and parameters are for estimates before it is loaded."""
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
    provenance: tuple[tuple[str, str], ...] = ()
    """(field, where its value comes from): specification, authors, measured, derived, published, assumed, ..."""

    def labels(self) -> dict[int, str]:
        """Return the label per latent, the user's (fetched, imported, made) before the target's; others are absent."""
        return self.own_labels() | {k: named.label for k, named in read_user_labels(self.user_key).items()}

    def own_labels(self) -> dict[int, str]:
        """Return the labels that come with the target."""
        return {} if self.labels_folder is None else read_labels(Path(self.labels_folder))

    @property
    def user_key(self) -> str:
        """Name of the folders in which the user's labels and directions for this target are kept."""
        return user_key(self.base, self.model, self.builtin)

    def contexts(self) -> dict[LatentKey, tuple[str, ...]]:
        """Return top-activating text snippets per latent (empty where unknown)."""
        found: dict[LatentKey, tuple[str, ...]] = {}
        if self.labels_folder is not None:
            found |= read_contexts(Path(self.labels_folder))
        return found | {name: texts for name in self.directions() if (texts := self.direction_facts(name).contexts)}

    def dead_latents(self) -> frozenset[int]:
        """Return the latents that never fired on the SAE's own corpus, by its metadata."""
        return frozenset() if self.labels_folder is None else read_dead(Path(self.labels_folder))

    @property
    def has_sae(self) -> bool:
        """Whether there are latents to steer with and to read, or directions alone."""
        return self.sae is not None or self.n_latents > 0

    def directions(self) -> tuple[str, ...]:
        """Return the names of the directions that can be added beside (or instead of) SAE latents."""
        return tuple(name for name, _ in self.direction_files)

    def direction_facts(self, name: str) -> DirectionFacts:
        """Return the known facts about a direction."""
        return read_facts(Path(dict(self.direction_files)[name]))

    def with_directions(self, names: Collection[str]) -> Target:
        """Return the target with these of its directions alone: a run depends only on those it steers with."""
        return replace(self, direction_files=tuple(f for f in self.direction_files if f[0] in names))

    def with_adapter(self, folder: Path) -> Target:
        """Return the target with a LoRA adapter, named BASE+FOLDER. Labels and directions stay the base's."""
        return replace(self, name=f"{self.base}+{folder.name}", adapter=str(folder))

    @property
    def base(self) -> str:
        """Name of the target without its adapter."""
        return self.name if self.adapter is None else self.name.rpartition("+")[0]

    def prior_of(self, key: LatentKey) -> BoostPrior:
        """Return the boost prior of a latent.

        For a direction of a target with an SAE it is scaled to the residual's norm, if that is known.
        """
        values = self.direction_facts(key).prior() if isinstance(key, str) and self.has_sae else None
        return self.boost_prior if values is None else BoostPrior(*values)

    def parameters(self) -> int | None:
        """Return the number of parameters, from the model's safetensors files or as given; None if unknown."""
        return sum(weight_sizes(Path(self.model)).values()) or self.n_parameters

    def memory(self, dtype: str | None = None) -> int | None:
        """Estimate the bytes on the device: weights, 5 %, and 1.5 GB for caches and the SAE's columns in use."""
        count = self.parameters()
        if count is None:
            return None
        return int(count * BYTES.get(dtype or self.dtype, 1.0) * 1.05 + (1.5e9 if count > 1e8 else 0))

    @property
    def sae_bytes(self) -> int:
        """Size of the SAE in float32, which is its download and what it takes of the machine's memory."""
        return 8 * self.n_latents * (self.d_model or 0)

    def describe(self) -> dict[str, object]:
        """Return the JSON-able form for the manifest."""
        return asdict(self)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of a LoRA adapter. Weights in a pickle (adapter_model.bin) are never loaded."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a LoRA adapter."""
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def check_adapter(where: str, folder: Path) -> None:
    """Raise SteerbackError if a folder holds no LoRA adapter, or a damaged one; `where` opens the message."""
    if not is_adapter(folder):
        raise SteerbackError(f"{where}: no LoRA adapter there ({', '.join(ADAPTER_FILES)})")
    adapter_config(folder)
    read_safetensors_header(folder / ADAPTER_FILES[1], "adapter weights")


def adapter_config(folder: Path) -> dict[str, Json]:
    """Return the configuration of a LoRA adapter."""
    return read_json_table(folder / ADAPTER_FILES[0], "adapter config")


def user_key(name: str, model: str, builtin: bool) -> str:
    """Return a built-in target's name; any other's with a mark of its model, as two folders may have one name."""
    return name if builtin else f"{name}-{digest(model)[:8]}"


def model_config(folder: Path) -> dict[str, object]:
    """Return the text part of a folder's config.json; empty where there is none or it is damaged.

    It serves estimates and early checks only; loading the model says what is wrong with its config.
    """
    try:
        config = read_json_table(folder / "config.json", "model config")
    except SteerbackError:
        return {}
    inner = config.get("text_config")
    return dict(inner if isinstance(inner, dict) and inner else config)


def weight_sizes(folder: Path) -> dict[str, int]:
    """Return the number of parameters of each of a model's weights, from the headers of its safetensors files.

    A damaged file counts as empty here; loading it says what is wrong.
    """
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        try:
            header = {} if path.name == "sae.safetensors" else read_safetensors_header(path, "weights")
        except SteerbackError:
            continue
        for name, tensor in header.items():
            shape = tensor.get("shape")
            lengths = [n for n in shape if isinstance(n, int)] if isinstance(shape, list) else []
            if isinstance(shape, list) and len(lengths) == len(shape):
                sizes[name] = math.prod(lengths)
    return sizes
