"""A target: a model with its SAE, layers, labels and the prior of the threshold boost.

A `Target` is plain data, made by `targets.registry` from a table or a folder, or in code. It loads no weights and knows
nothing about engines.
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
"""The tokenizer's chat template, the unchanged prompt, or the template with Llama's header twice (see `Prompter`)."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}
"""Bytes per parameter."""


def _prior(value: object) -> BoostPrior:
    """Return a prior from {mean, sd, low, high} or from the four numbers in this order."""
    names = ("mean", "sd", "low", "high")
    if isinstance(value, BoostPrior):
        return value
    fields = dict(zip(names, value, strict=False)) if isinstance(value, list | tuple) and len(value) == 4 else value
    if not (isinstance(fields, dict) and set(fields) == set(names) and all(map(_is_number, fields.values()))):
        raise ValueError(f"{value!r} should be {{mean, sd, low, high}}, in raw decoder units")
    try:
        return BoostPrior(**{name: float(number) for name, number in fields.items()})
    except SteerbackError as error:
        raise ValueError(str(error)) from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


PriorField = Annotated[BoostPrior, BeforeValidator(_prior)]
"""A prior in a target's table or in `sae.json`."""


class SaeMetadata(Settings):
    """The keys of a `sae.json` that are read; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)
    kind: Kind
    layer: int = Field(ge=0)
    d_model: int | None = Field(None, ge=1)
    n_latents: int | None = Field(None, ge=1)
    k: int | None = Field(None, ge=1)
    boost_prior: PriorField | None = None
    """Measured with these weights, so it overrides the registry's prior."""


def read_metadata(folder: Path) -> SaeMetadata:
    """Read the `sae.json` of a folder in steerback's format."""
    path = folder / "sae.json"
    if not path.is_file():
        raise SteerbackError(f"{folder}: no sae.json there; an SAE folder needs sae.safetensors and sae.json")
    return parse(SaeMetadata, read_json_table(path, "metadata"), str(path))


@dataclass(frozen=True, slots=True)
class SaeSource:
    """Origin of an SAE: a format of `targets.sae_files`, a folder or hub id, a file in it, a revision.

    `layer` is the target's `sae_layer`, for files that do not contain their layer. `dtype` None keeps bfloat16 and
    converts other types to float32. `input_scale` is the constant that multiplied the inputs in training, if the file
    lacks it.
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
    """A model to steer and where to steer it. Layers are 0-based, the residual stream after the block.

    `model` is a folder or a hub id; `n_latents` is 0 without an SAE; `labels_folder` None means no labels. Additions
    act at `steer_layer`, recording at `read_layer`, clamps at `clamp_layer` (None: the layer of the SAE).
    """

    name: str
    model: str
    steer_layer: int
    read_layer: int
    boost_prior: BoostPrior
    summary: str = ""
    builtin: bool = False
    """Whether the target is in the package's registry and not the user's."""
    planted: bool = False
    """Whether the model was trained to restart, so that its numbers are no evidence about other models."""
    revision: str | None = None
    adapter: str | None = None
    """Folder of a LoRA adapter that is applied to the model, unmerged; see `with_adapter`."""
    dtype: Dtype = "float32"
    sae: SaeSource | None = None
    sae_layer: int | None = None
    clamp_layer: int | None = None
    n_latents: int = 0
    n_layers: int | None = None
    d_model: int | None = None
    n_parameters: int | None = None
    """Number of parameters; like layers and width, used for estimates before the model is loaded."""
    labels_folder: str | None = None
    label_source: str | None = None
    """Source of `steerback labels fetch`; see `targets.label_fetch`."""
    prompt_format: PromptFormat = "chat"
    max_new_tokens: int | None = None
    responses_per_second: float | None = None
    """Measured in calibration on two CPU cores; used only for the estimate before a run."""
    discovery_prompts: str = "discovery"
    random_sets: int = 3
    direction_files: tuple[tuple[str, str], ...] = ()
    """(name, file) of each direction that can be steered like an SAE latent; see `targets.directions`."""
    provenance: tuple[tuple[str, str], ...] = ()
    """(field, origin of its value): specification, authors, measured, derived, published, assumed, ..."""

    def labels(self) -> dict[int, str]:
        """Return the labels by latent, without unlabelled latents; the user's labels override those of the target."""
        return self.own_labels() | {k: named.label for k, named in read_user_labels(self.user_key).items()}

    def own_labels(self) -> dict[int, str]:
        """Return the labels in the target's folder, without the user's."""
        return {} if self.labels_folder is None else read_labels(Path(self.labels_folder))

    @property
    def user_key(self) -> str:
        """Name of the folders with the user's labels and directions for this target."""
        return user_key(self.base, self.model, self.builtin)

    def contexts(self) -> dict[LatentKey, tuple[str, ...]]:
        """Return top-activating text snippets by latent or direction; those without known snippets are absent."""
        contexts = {} if self.labels_folder is None else read_contexts(Path(self.labels_folder))
        return contexts | {name: texts for name in self.directions() if (texts := self.direction_facts(name).contexts)}

    def dead_latents(self) -> frozenset[int]:
        """Return the latents that never fired on the SAE's training corpus, from its metadata."""
        return frozenset() if self.labels_folder is None else read_dead(Path(self.labels_folder))

    @property
    def has_sae(self) -> bool:
        """Whether the target has latents, and not only directions."""
        return self.sae is not None or self.n_latents > 0

    def directions(self) -> tuple[str, ...]:
        """Return the names of the directions that can be steered like SAE latents."""
        return tuple(name for name, _ in self.direction_files)

    def direction_facts(self, name: str) -> DirectionFacts:
        """Return the facts about a direction."""
        return read_facts(Path(dict(self.direction_files)[name]))

    def with_directions(self, names: Collection[str]) -> Target:
        """Return the target with only the named directions, so that a run depends only on those it steers with."""
        return replace(self, direction_files=tuple(f for f in self.direction_files if f[0] in names))

    def with_adapter(self, folder: Path) -> Target:
        """Return the target with a LoRA adapter, named BASE+FOLDER. Labels and directions are those of the base."""
        return replace(self, name=f"{self.base}+{folder.name}", adapter=str(folder))

    @property
    def base(self) -> str:
        """Name of the target without its adapter."""
        return self.name if self.adapter is None else self.name.rpartition("+")[0]

    def prior_of(self, key: LatentKey) -> BoostPrior:
        """Return the boost prior of a latent or direction.

        The prior of a direction of a target with an SAE is scaled by the residual's norm, if that is known.
        """
        values = self.direction_facts(key).prior() if isinstance(key, str) and self.has_sae else None
        return self.boost_prior if values is None else BoostPrior(*values)

    def parameters(self) -> int | None:
        """Return the number of parameters from the model's safetensors files, or else of the table; None if unknown."""
        return sum(weight_sizes(Path(self.model)).values()) or self.n_parameters

    def memory(self, dtype: str | None = None) -> int | None:
        """Estimate the bytes on the device: weights plus 5 %, and 1.5 GB for caches and SAE columns."""
        count = self.parameters()
        if count is None:
            return None
        return int(count * BYTES.get(dtype or self.dtype, 1.0) * 1.05 + (1.5e9 if count > 1e8 else 0))

    @property
    def sae_bytes(self) -> int:
        """Bytes of the SAE in float32: its download size and its use of main memory."""
        return 8 * self.n_latents * (self.d_model or 0)

    def describe(self) -> dict[str, object]:
        """Return the target as JSON-able values, for the manifest."""
        return asdict(self)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""Files of a LoRA adapter. Pickled weights (adapter_model.bin) are never loaded."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a LoRA adapter."""
    return all((folder / name).is_file() for name in ADAPTER_FILES)


def check_adapter(where: str, folder: Path) -> None:
    """Raise SteerbackError unless a folder contains a valid LoRA adapter; `where` begins the message."""
    if not is_adapter(folder):
        raise SteerbackError(f"{where}: no LoRA adapter there ({', '.join(ADAPTER_FILES)})")
    adapter_config(folder)
    read_safetensors_header(folder / ADAPTER_FILES[1], "adapter weights")


def adapter_config(folder: Path) -> dict[str, Json]:
    """Return the configuration of a LoRA adapter."""
    return read_json_table(folder / ADAPTER_FILES[0], "adapter config")


def user_key(name: str, model: str, builtin: bool) -> str:
    """Return a built-in target's name; other names get a hash of the model, because two folders can share a name."""
    return name if builtin else f"{name}-{digest(model)[:8]}"


def model_config(folder: Path) -> dict[str, object]:
    """Return the text-model part of a folder's config.json; empty if it is missing or damaged.

    It is used for estimates and early checks only; loading the model reports a damaged config.
    """
    try:
        config = read_json_table(folder / "config.json", "model config")
    except SteerbackError:
        return {}
    inner = config.get("text_config")
    return dict(inner if isinstance(inner, dict) and inner else config)


def weight_sizes(folder: Path) -> dict[str, int]:
    """Return the number of parameters of each weight of a model, from the headers of its safetensors files.

    A damaged file counts as empty here; loading the model reports the damage.
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
