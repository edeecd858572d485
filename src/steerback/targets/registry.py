"""Targets by name, from the built-in registry, a user's TOML file, a folder, or a GGUF file.

A target is one TOML table. This module reads tables, `sae.json` and the model's config.json; it loads no weights.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from steerback.config import Settings, parse
from steerback.errors import SteerbackError, unknown
from steerback.organism import NAMES, weights_dir
from steerback.readers import read_toml
from steerback.records import BoostPrior
from steerback.store.files import user_folder
from steerback.targets.directions import PRIOR, DirectionFiles, find_directions, read_facts
from steerback.targets.gguf import SUFFIX, convert_gguf, gguf_folder, has_template, is_gguf, stored_dtype
from steerback.targets.target import (
    Dtype,
    PriorField,
    PromptFormat,
    SaeMetadata,
    SaeSource,
    Target,
    check_adapter,
    model_config,
    read_metadata,
    user_key,
)

REGISTRY = Path(__file__).with_name("registry.toml")
USER_FILE = "STEERBACK_TARGETS"
"""Environment variable with the path of the user's targets file; the option --targets sets it."""
DEPTH, TRAINED = 0.6, "target.toml"
Table = Mapping[str, object]
Tables = Mapping[str, Table]
"""Unchecked tables of targets by name, from TOML or a run's config; `TargetTable` is the checked form."""


class SaeTable(Settings):
    """The key `sae` of a target's table; `SaeSource` explains the fields."""

    model_config = ConfigDict(strict=True)
    location: str = Field(min_length=1)
    format: str = "steerback"
    file: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    input_scale: float | None = Field(None, gt=0)


def _files(value: object) -> object:
    """Return a table {name: file} or a list of files; a single file becomes a list."""
    if isinstance(value, str):
        return [value]
    places = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        raise ValueError(f"{value!r} should be a string, a list of strings, or a table of names and files")
    return value


Layer = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class TargetTable(Settings):
    """The checked table of a target; the top of registry.toml explains the keys."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    model: str = Field(min_length=1)
    summary: str = ""
    planted: bool = False
    revision: str | None = None
    dtype: Dtype = "float32"
    steer_layer: Layer | None = None
    read_layer: Layer | None = None
    clamp_layer: Layer | None = None
    sae: SaeTable | None = None
    sae_layer: Layer | None = None
    n_latents: int | None = Field(None, ge=0)
    labels: str | None = None
    label_source: str | None = None
    directions: Annotated[DirectionFiles, BeforeValidator(_files)] = ()
    boost_prior: PriorField | None = None
    prompt_format: PromptFormat = "chat"
    max_new_tokens: Count | None = None
    n_layers: Count | None = None
    d_model: Count | None = None
    n_parameters: Count | None = None
    responses_per_second: float | None = Field(None, gt=0)
    discovery_prompts: str = "discovery"
    random_sets: Count = 3
    provenance: dict[str, str] = Field(default_factory=dict)


UNCHANGED = {
    *("summary", "planted", "revision", "dtype", "clamp_layer", "n_parameters", "label_source", "prompt_format"),
    *("max_new_tokens", "responses_per_second", "discovery_prompts", "random_sets"),
}
"""Keys of a table that a `Target` has under the same name and with the same value."""


def builtin_targets() -> tuple[Target, ...]:
    """Return all built-in targets, even if their weights are not on this machine."""
    return tuple(_from_table(name, table, complete=False) for name, table in tables().items())


def list_targets() -> tuple[Target, ...]:
    """Return all built-in targets and those of the user's file; facts from files are included if the files exist."""
    known = {**tables(), **user_tables()}
    return tuple(_from_table(name, table, complete=_has_files(name, table)) for name, table in known.items())


def _has_files(name: str, table: Table) -> bool:
    if is_gguf(str(table["model"])):
        return gguf_folder(str(table["model"])) is not None
    return table["model"] != "builtin" or (_weights(name, check=False) / "sae.json").is_file()


def resolve(name: str, run_tables: Tables | None = None) -> Target:
    """Return a target by its name, or by the path of a folder in steerback's format or of a GGUF file.

    Names are looked up in `run_tables` (a run's definitions), the user's file and the built-in targets, in this order.
    NAME+FOLDER is the target with the LoRA adapter in a folder. Raises SteerbackError for an unknown name (lists the
    choices) and for missing weights (says how to build them).
    """
    known: dict[str, Table] = {**tables(), **user_tables(), **(run_tables or {})}
    if name in known:
        return _from_table(name, known[name], complete=True)
    folder = Path(name).expanduser()
    if is_gguf(name):
        return from_gguf(folder)
    if folder.is_dir() and (folder / "config.json").is_file():
        return from_folder(folder)
    base, plus, place = name.partition("+")
    if plus and (base in known or Path(base).expanduser().is_dir()):
        adapter = Path(place).expanduser()
        check_adapter(f"target {name}", adapter)
        return resolve(base, run_tables).with_adapter(adapter.resolve())
    raise unknown("target", name, [*known, "(a folder with config.json and sae.json)", "(a GGUF file)"])


def from_folder(folder: Path, **changes: object) -> Target:
    """Return the target of a folder with config.json, weights, tokenizer, sae.json, sae.safetensors, optional labels.

    `boost_prior` ([mean, sd, low, high]) in sae.json overrides that of the registry; `changes` set other keys.
    """
    name = Path(os.path.abspath(folder)).name
    return _from_table(name, {"model": str(folder), **changes}, complete=True)


def from_gguf(file: Path, **changes: object) -> Target:
    """Return the target of a GGUF file, converted if necessary; without an SAE, steered at 60 % of its depth."""
    folder = convert_gguf(str(file))
    table: dict[str, object] = {"model": str(file), "dtype": stored_dtype(folder)}
    table |= {} if has_template(folder) else {"prompt_format": "plain"}
    return _from_table(file.name.removesuffix(SUFFIX), table | changes, complete=True)


@cache
def tables() -> dict[str, dict[str, object]]:
    """Return the tables of the built-in targets by name, including variants."""
    return _variants(_registry())


@cache
def _registry() -> dict[str, dict[str, object]]:
    return tomllib.loads(REGISTRY.read_text(encoding="utf-8"))


def user_tables() -> dict[str, dict[str, object]]:
    """Return the tables of locally trained targets and of the user's file (if STEERBACK_TARGETS names one)."""
    made: dict[str, dict[str, object]] = {}
    for path in sorted(trained_folder("*").parent.glob(f"*/{TRAINED}")):
        made |= read_targets(path)
    file = os.environ.get(USER_FILE)
    return made | read_targets(Path(file).expanduser()) if file else made


def trained_folder(name: str) -> Path:
    """Return the folder of the target NAME that `steerback sae train` makes."""
    return user_folder("targets", name)


def read_targets(file: Path) -> dict[str, dict[str, object]]:
    """Read and check a user's TOML file; return its tables by name, including variants, with absolute paths.

    Paths in the file are relative to the file. Raises SteerbackError that names the file, the target and the wrong key.
    """
    where = f"file of targets {file}"
    loaded: dict[str, Table] = {}
    for name, table in read_toml(file, "file of targets").items():
        if not isinstance(table, dict):
            raise SteerbackError(f"{where}: {name!r} is not a table; write each target as a table, [{name}]")
        if "model" not in table and name not in tables():
            hint = "" if len(table) != 1 else f'; a name with a dot must be quoted, ["{name}.{next(iter(table))}"]'
            raise SteerbackError(f"{where}: target {name!r} has no model (a folder or a hub id){hint}")
        if "model" in table and name in tables():
            raise SteerbackError(
                f"{where}: {name!r} is a built-in target; choose another name, or remove `model` to change its values"
            )
        variants = table.get("variants", {})
        if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
            raise SteerbackError(f"{where}: target {name!r}: variants must be tables, [{name}.variants.NAME]")
        loaded[name] = _absolute(table, file.resolve().parent)
    absolute = _variants({name: _changed(name, table) for name, table in loaded.items()})
    for name, expanded in absolute.items():
        _check_name(where, name)
        try:
            _from_table(name, expanded, complete=False)
        except SteerbackError as error:
            raise SteerbackError(f"{where}: {error}") from None
    return absolute


def _changed(name: str, changes: Table) -> Table:
    """Apply the user's changes to the table of a built-in target and its variants; return other tables unchanged."""
    if name not in tables():
        return changes
    builtin = _registry().get(name, tables()[name])
    old, new = builtin.get("provenance", {}), changes.get("provenance", {})
    assert isinstance(old, dict)
    changed = {key: "the user's file of targets" for key in changes if key not in ("summary", "provenance", "variants")}
    return {**builtin, **changes, "provenance": {**old, **changed, **new} if isinstance(new, dict) else new}


def _check_name(where: str, name: str) -> None:
    """Raise SteerbackError for a name that is no valid name of a folder, because the target's labels need a folder."""
    if not re.fullmatch(r"[\w@+-][\w.@+ -]{0,99}", name):
        raise SteerbackError(
            f"{where}: target name {name[:120]!r} is invalid; use at most 100 letters, digits and . @ + - _, and no "
            "dot at the beginning"
        )


def _variants(loaded: Mapping[str, Table]) -> dict[str, dict[str, object]]:
    """Expand each `[NAME.variants.VARIANT]` to a target NAME@VARIANT: the target's table with the variant's changes."""
    split: dict[str, dict[str, object]] = {}
    for name, whole in loaded.items():
        table = {key: value for key, value in whole.items() if key != "variants"}
        split[name] = table
        variants = whole.get("variants", {})
        assert isinstance(variants, dict)
        for variant, changes in variants.items():
            old, new = table.get("provenance", {}), changes.get("provenance", {})
            both = {"provenance": {**old, **new}} if isinstance(old, dict) and isinstance(new, dict) else {}
            split[f"{name}@{variant}"] = {**table, **changes, **both}
    return split


def _absolute(table: Table, base: Path) -> dict[str, object]:
    """Make the paths of a table absolute; a value is a path if it exists relative to `base`."""

    def fixed(value: object) -> object:
        if isinstance(value, str) and value:
            path = base / os.path.expanduser(value)
            try:
                return str(path.resolve()) if path.exists() else value
            except OSError as error:
                raise SteerbackError(f"{value[:80]!r} cannot be a path or a name: {error.strerror}") from None
        if isinstance(value, dict):
            return {k: fixed(v) for k, v in value.items()}
        return [fixed(v) for v in value] if isinstance(value, list) else value

    paths = ("model", "labels", "directions", "discovery_prompts")
    done = {key: fixed(value) if key in paths else value for key, value in table.items()}
    if isinstance(variants := table.get("variants"), dict):
        done["variants"] = {name: _absolute(v, base) if isinstance(v, dict) else v for name, v in variants.items()}
    if isinstance(sae := table.get("sae"), dict) and "location" in sae:
        done["sae"] = sae | {"location": fixed(sae["location"])}
    return done


def _from_table(name: str, raw: Table, complete: bool) -> Target:
    """Return the target of a table; `complete` raises SteerbackError if table and files leave a layer or size open."""
    where = f"target {name!r}"
    table = parse(TargetTable, raw, where)
    builtin = name in tables() and table.model == tables()[name]["model"]
    model = str(_weights(name, check=complete)) if table.model == "builtin" else table.model
    if is_gguf(model):
        model = str(convert_gguf(model) if complete else gguf_folder(model) or model)
    folder = Path(model)
    directions = find_directions(table.directions, name, user_key(name, model, builtin))
    sae, meta = _sae(table, folder, complete)
    sae_layer = meta.layer if table.sae_layer is None and meta is not None else table.sae_layer
    n_latents = meta.n_latents if table.n_latents is None and meta is not None else table.n_latents
    steer, read = (sae_layer if layer is None else layer for layer in (table.steer_layer, table.read_layer))
    n_layers, d_model = _sizes(table, folder)
    if sae is None and n_layers is not None:  # directions alone: steer and read at the default depth
        steer, read = (default_layer(n_layers) if layer is None else layer for layer in (steer, read))
    if complete:
        _check_complete(where, sae, sae_layer=sae_layer, n_latents=n_latents, steer_layer=steer, read_layer=read)
    layers = {"steer_layer": steer, "read_layer": read, "clamp_layer": table.clamp_layer, "sae_layer": sae_layer}
    for key, layer in layers.items():
        if layer is not None and n_layers is not None and layer >= n_layers:
            raise SteerbackError(f"{where}: {key} {layer} is outside 0..{n_layers - 1}, the layers of its model")
    return Target(
        name=name,
        model=model,
        steer_layer=-1 if steer is None else steer,
        read_layer=-1 if read is None else read,
        boost_prior=_boost_prior(where, table, sae, meta, directions),
        builtin=builtin,
        sae=sae,
        sae_layer=sae_layer,
        n_latents=n_latents or 0,
        n_layers=n_layers,
        d_model=d_model,
        labels_folder=str(folder) if table.labels is None and folder.is_dir() else table.labels,
        direction_files=directions,
        provenance=tuple(sorted(table.provenance.items())),
        **table.model_dump(include=UNCHANGED),
    )


def default_layer(n_layers: int) -> int:
    """Return the default steering layer, at 60 % of a model's depth like the paper's SAEs."""
    return min(round(DEPTH * n_layers), n_layers - 1)


def _weights(name: str, check: bool) -> Path:
    """Return the folder of a built-in model; `check` raises SteerbackError if it has no weights."""
    if name not in NAMES:
        choices = ", ".join(NAMES)
        raise SteerbackError(f"target {name!r}: the model 'builtin' is for {choices} only; name a folder or a hub id")
    folder = weights_dir(name)
    if check and not (folder / "config.json").is_file():
        raise SteerbackError(f"{name}: no weights in {folder}; make them with: python -m tools.organism build")
    return folder


def _sae(table: TargetTable, folder: Path, complete: bool) -> tuple[SaeSource | None, SaeMetadata | None]:
    """Return the source of a target's SAE, and its `sae.json` if it is in steerback's format and on this machine."""
    sae = None
    if table.sae is not None:
        sae = SaeSource(**table.sae.model_dump(), layer=table.sae_layer)
    elif "sae" not in table.model_fields_set and (table.model == "builtin" or (folder / "sae.json").is_file()):
        sae = SaeSource(str(folder))
    if sae is None or sae.format != "steerback":
        return sae, None
    place = Path(sae.location).expanduser()
    return sae, read_metadata(place) if complete or (place / "sae.json").is_file() else None


def _sizes(table: TargetTable, folder: Path) -> tuple[int | None, int | None]:
    """Return number of layers and width from the table, or else from the model's config.json; None if unknown."""
    config = model_config(folder)
    n_layers, d_model = config.get("num_hidden_layers"), config.get("hidden_size")
    return (
        table.n_layers if table.n_layers is not None else n_layers if isinstance(n_layers, int) else None,
        table.d_model if table.d_model is not None else d_model if isinstance(d_model, int) else None,
    )


def _check_complete(where: str, sae: SaeSource | None, **needed: int | None) -> None:
    """Raise SteerbackError for a layer or size that neither the table nor a file gives."""
    for key, value in needed.items():
        if value is None and sae is None and key in ("steer_layer", "read_layer"):
            raise SteerbackError(f"{where} has no SAE, so its table must set {key}")
        if value is None and sae is not None and sae.format != "steerback":
            raise SteerbackError(f"{where}: with an SAE of format {sae.format!r}, the table must set {key}")


def _boost_prior(
    where: str,
    table: TargetTable,
    sae: SaeSource | None,
    meta: SaeMetadata | None,
    directions: Sequence[tuple[str, str]],
) -> BoostPrior:
    """Return the prior of `sae.json`, or else of the table, or else one from the residual's norm for directions."""
    prior = table.boost_prior if meta is None or meta.boost_prior is None else meta.boost_prior
    if prior is not None:
        return prior
    if sae is not None:
        raise SteerbackError(f"{where}: boost_prior is missing; set {{mean, sd, low, high}} in raw decoder units")
    priors = [read_facts(Path(file)).prior() for _, file in directions]
    if directions and not any(priors):
        raise SteerbackError(
            f"{where}: its direction files lack the residual's norm; set boost_prior [mean, sd, low, high], "
            "or import a file with: steerback directions make TARGET NAME --file FILE"
        )
    mean, sd, high = PRIOR  # without directions the prior is never used
    return BoostPrior(*next((p for p in priors if p), (mean, sd, 0.0, high)))
