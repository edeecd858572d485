"""What is steered: a model, its SAE, the layers, labels and the prior for the threshold boost.

A `Target` is plain data, made by `targets.registry` from a table or a folder, or by hand; it loads no weights and knows
nothing of engines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steerback.records import BoostPrior, LatentKey, digest
from steerback.targets.directions import Facts, read_facts
from steerback.targets.label_files import read_user_labels
from steerback.targets.labels import read_contexts, read_dead, read_labels

Dtype = Literal["float32", "bfloat16"]
PromptFormat = Literal["chat", "plain", "authors"]
"""The tokenizer's chat template, the prompt as it is, or the template with Llama's header doubled (see `Prompter`)."""
BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0}
"""Per parameter."""


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

    `model` is a folder or a hub id; `n_latents` is 0 without an SAE. `labels_folder` None means no labels. Additions
    act at `steer_layer`, recording at `read_layer`, clamps at `clamp_layer` (None: the SAE's own layer).
    """

    name: str
    model: str
    steer_layer: int
    read_layer: int
    boost_prior: BoostPrior
    summary: str = ""
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
        """Label per latent, the user's own (fetched, imported, made) before the target's; others are absent."""
        return self.own_labels() | {k: named.label for k, named in read_user_labels(self.user_key).items()}

    def own_labels(self) -> dict[int, str]:
        """The labels that come with the target."""
        return {} if self.labels_folder is None else read_labels(Path(self.labels_folder))

    @property
    def user_key(self) -> str:
        """Name of the folders in which the user's labels and directions for this target are kept."""
        return user_key(self.base, self.model)

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

    def with_adapter(self, folder: Path) -> Target:
        """The same target with a LoRA adapter, named after both: BASE+FOLDER. Labels and directions stay the base's."""
        return replace(self, name=f"{self.base}+{folder.name}", adapter=str(folder))

    @property
    def base(self) -> str:
        """Name of the target without its adapter."""
        return self.name if self.adapter is None else self.name.rpartition("+")[0]

    def prior_of(self, key: LatentKey) -> BoostPrior:
        """The boost prior of a latent; that of a direction beside an SAE is scaled to the residual's norm if known."""
        values = self.direction_facts(key).prior() if isinstance(key, str) and self.has_sae else None
        return self.boost_prior if values is None else BoostPrior(*values)

    def parameters(self) -> int | None:
        """Number of the model's parameters, from the headers of its safetensors files or as given; None if unknown."""
        names = [p for p in Path(self.model).glob("*.safetensors") if p.name != "sae.safetensors"]
        return sum(map(_count_parameters, names)) or self.n_parameters

    def memory(self, dtype: str | None = None) -> int | None:
        """Estimated bytes on the device (weights, 5 %, and 1.5 GB for caches and the SAE's columns in use)."""
        count = self.parameters()
        if count is None:
            return None
        return int(count * BYTES.get(dtype or self.dtype, 1.0) * 1.05 + (1.5e9 if count > 1e8 else 0))

    @property
    def sae_bytes(self) -> int:
        """Size of the SAE in float32, which is its download and what it takes of the machine's memory."""
        return 8 * self.n_latents * (self.d_model or 0)

    def describe(self) -> dict[str, Any]:
        """JSON-able form for the manifest."""
        return asdict(self)


def user_key(name: str, model: str) -> str:
    """A built-in target's name; any other's with a mark of its model, as two folders may have one name."""
    from steerback.targets.registry import tables

    return name if name.split("@")[0] in tables() else f"{name}-{digest(model)[:8]}"


def _count_parameters(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
