"""Targets by name: the built-in registry, a user's own TOML file, a folder.

One table of TOML is one target. It reads what tables and `sae.json` say and loads no weights.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from steerback.errors import SteerbackError, unknown
from steerback.records import BoostPrior
from steerback.targets.directions import PRIOR, find_directions, read_facts
from steerback.targets.labels import read_metadata
from steerback.targets.target import Dtype, PromptFormat, SaeSource, Target, user_key

REGISTRY = Path(__file__).with_name("registry.toml")
Tables = Mapping[str, Mapping[str, Any]]
"""Definitions of targets as their TOML file holds them, by name."""


def builtin_targets() -> tuple[Target, ...]:
    """All built-in targets, whether their weights are there or not."""
    return tuple(_from_entry(name, entry, complete=False) for name, entry in tables().items())


def list_targets() -> tuple[Target, ...]:
    """All built-in targets and those of the user's file, each as completely as what is on this machine allows."""
    entries = {**tables(), **user_tables()}
    return tuple(_from_entry(name, entry, complete=_is_there(name, entry)) for name, entry in entries.items())


def resolve(name: str, own: Tables | None = None) -> Target:
    """A target by name, or a folder in our own format by its path.

    Names are those of `own` (a run's definitions), of the user's file and of the built-in targets, in this order.
    NAME+FOLDER is a target with the LoRA adapter of a folder.

    Raises SteerbackError listing the choices for an unknown name, and saying what to build where weights are missing.
    """
    known = {**tables(), **user_tables(), **(own or {})}
    if name in known:
        return _from_entry(name, known[name], complete=True)
    folder = Path(name).expanduser()
    if folder.is_dir() and (folder / "config.json").is_file():
        return from_folder(folder)
    base, plus, adapter = name.partition("+")
    if plus and (base in known or Path(base).expanduser().is_dir()):
        return _adapted(resolve(base, own), Path(adapter).expanduser())
    raise unknown("target", name, [*known, "(a folder with config.json and sae.json)"])


def _adapted(target: Target, adapter: Path) -> Target:
    if not (adapter / "adapter_config.json").is_file():
        raise SteerbackError(
            f"target {target.name}+{adapter}: no LoRA adapter there (adapter_config.json, adapter_model.safetensors)"
        )
    return target.with_adapter(adapter.resolve())


USER_FILE = "STEERBACK_TARGETS"
"""Environment variable with the path of the user's file of targets; the option --targets sets it."""


def user_tables() -> dict[str, dict[str, Any]]:
    """The targets of the user's file, by name; none where STEERBACK_TARGETS names no file."""
    file = os.environ.get(USER_FILE)
    return read_targets(Path(file).expanduser()) if file else {}


def read_targets(file: Path) -> dict[str, dict[str, Any]]:
    """The targets of a user's TOML file, variants included, checked, their paths made absolute.

    Paths are relative to the file. Raises SteerbackError naming the file, the target and the key that is wrong.
    """
    try:
        loaded = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteerbackError(f"file of targets {file} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SteerbackError(f"file of targets {file}: {' '.join(str(error).split())}") from error
    for name, entry in loaded.items():
        if not isinstance(entry, dict):
            raise SteerbackError(f"file of targets {file}: {name!r} is not a table; each target is one, [{name}]")
        if "model" not in entry:
            hint = "" if len(entry) != 1 else f'; a name with a dot has to be quoted, ["{name}.{next(iter(entry))}"]'
            raise SteerbackError(f"file of targets {file}: target {name!r} says no model (a folder or a hub id){hint}")
        if name in tables():
            raise SteerbackError(f"file of targets {file}: {name!r} is a built-in target; choose another name")
        _check_types(f"file of targets {file}: target {name!r}", entry, _kinds())
        for variant, changes in entry.get("variants", {}).items():
            _check_types(f"file of targets {file}: target {f'{name}@{variant}'!r}", changes, _kinds())
    found = {name: _absolute(entry, file.resolve().parent) for name, entry in _variants(loaded).items()}
    for name, entry in found.items():
        _from_entry(name, entry, complete=False)
    return found


@cache
def _kinds() -> dict[str, Any]:
    """What a table may hold in each field: what `Target` holds there, or its own; the last are checked later."""
    texts = dict[str, str]
    own = {"sae": dict[str, Any], "labels": str, "directions": str | list[str] | texts, "provenance": texts}
    checked_later = dict.fromkeys(("boost_prior", "dtype", "prompt_format"), Any)
    return {**get_type_hints(Target), **own, "variants": dict[str, dict[str, Any]], **checked_later}


def _check_types(where: str, table: Mapping[str, Any], kinds: Mapping[str, Any], inside: str = "") -> None:
    """Raises SteerbackError for the first field of another type than it has to be; unknown ones are checked later."""
    for field in (name for name in table if name in kinds):
        try:
            TypeAdapter(kinds[field]).validate_python(table[field], strict=True)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in error.errors()))
            raise SteerbackError(f"{where}: {inside}{field} {table[field]!r}: should be {wanted}") from None
    if "sae" in table and not inside:
        _check_types(where, table["sae"], get_type_hints(SaeSource), "sae.")


def _absolute(entry: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """A table whose paths do not depend on where one stands: what is there beside the file is meant as a path."""

    def fixed(value: Any) -> Any:
        if isinstance(value, str) and value and (base / Path(value).expanduser()).exists():
            return str((base / Path(value).expanduser()).resolve())
        if isinstance(value, dict):
            return {k: fixed(v) for k, v in value.items()}
        return [fixed(v) for v in value] if isinstance(value, list) else value

    done = {k: fixed(v) if k in ("model", "labels", "directions", "discovery_prompts") else v for k, v in entry.items()}
    if isinstance(entry.get("sae"), dict) and "location" in entry["sae"]:
        done["sae"] = entry["sae"] | {"location": fixed(entry["sae"]["location"])}
    return done


@cache
def tables() -> dict[str, dict[str, Any]]:
    """The built-in targets' tables, variants included, by name."""
    return _variants(tomllib.loads(REGISTRY.read_text(encoding="utf-8")))


def _variants(loaded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables with each `[NAME.variants.VARIANT]` as a target NAME@VARIANT of its own: the target's keys, changed."""
    found: dict[str, dict[str, Any]] = {}
    for name, whole in loaded.items():
        entry = {key: value for key, value in whole.items() if key != "variants"}
        found[name] = entry
        for variant, changes in whole.get("variants", {}).items():
            provenance = entry.get("provenance", {}) | changes.get("provenance", {})
            found[f"{name}@{variant}"] = {**entry, **changes, "provenance": provenance}
    return found


def _is_there(name: str, entry: Mapping[str, Any]) -> bool:
    folder = _builtin_folder(name, check=False) if entry["model"] == "builtin" else Path(entry["model"])
    return entry["model"] != "builtin" or (folder / "sae.json").is_file()


def from_folder(folder: Path, **changes: Any) -> Target:
    """A target from a folder: config.json, weights, tokenizer, sae.json + sae.safetensors, optional labels.

    `boost_prior` ([mean, sd, low, high]) in sae.json wins over the registry's; `changes` set any other key.
    """
    return _from_entry(folder.name, {"model": str(folder), **changes}, complete=True)


def _from_entry(name: str, entry: Mapping[str, Any], complete: bool) -> Target:
    """A target from a table of the registry; `complete` reads the SAE's layer and size from its folder."""
    entry = dict(entry)
    known = (set(Target.__dataclass_fields__) | {"labels", "directions"}) - {"name"}
    if strange := sorted(set(entry) - known):
        raise unknown(f"key of target {name!r}", strange[0], sorted(known))
    builtin = entry["model"] == "builtin"
    if builtin:
        entry["model"] = str(_builtin_folder(name, check=complete))
    folder = Path(entry["model"])
    if isinstance(entry.get("sae"), Mapping):
        entry["sae"] = _source(name, entry["sae"], entry.get("sae_layer"))
    elif "sae" not in entry and ((builtin and not complete) or (folder / "sae.json").is_file()):
        entry["sae"] = SaeSource(str(folder))
    labels = entry.pop("labels", str(folder) if folder.is_dir() else None)
    entry.setdefault("labels_folder", labels)
    entry.setdefault(
        "direction_files", find_directions(entry.pop("directions", ()), name, user_key(name, entry["model"]))
    )
    if entry.get("sae") is None and "boost_prior" not in entry:
        entry["boost_prior"] = _prior_of_directions(name, entry["direction_files"])
    if complete:
        _complete_from_sae(name, entry)
    for key, choices in (("dtype", get_args(Dtype)), ("prompt_format", get_args(PromptFormat))):
        if key in entry and entry[key] not in choices:
            raise unknown(f"{key} of target {name!r}", entry[key], choices)
    entry["boost_prior"] = _prior(name, entry.get("boost_prior"))
    entry["provenance"] = tuple(sorted(dict(entry.get("provenance", ())).items()))
    if folder.is_dir():
        _from_model(folder, entry)
    return Target(name=name, steer_layer=entry.pop("steer_layer", -1), read_layer=entry.pop("read_layer", -1), **entry)


def _prior_of_directions(name: str, files: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """The prior by the residual's norm where one of the directions says it; as long as there is none, any will do."""
    priors = [read_facts(Path(file)).prior() for _, file in files]
    if files and not any(priors):
        raise SteerbackError(
            f"target {name!r}: none of its directions says the residual's norm, so the table has to give a boost_prior "
            f"[mean, sd, low, high]; or take a file over with: steerback directions make {name} NAME --file FILE"
        )
    return next((p for p in priors if p), (*PRIOR[:2], 0.0, PRIOR[2]))


def _complete_from_sae(name: str, entry: dict[str, Any]) -> None:
    """Fills layers, size and prior from `sae.json` where the entry leaves them out."""
    source = entry.get("sae")
    if source is not None and source.format == "steerback":
        meta = read_metadata(Path(source.location))
        entry.setdefault("sae_layer", meta["layer"])
        entry.setdefault("n_latents", int(meta.get("n_latents", 0)))
        if "boost_prior" in meta:  # measured with these very weights
            entry["boost_prior"] = meta["boost_prior"]
    elif source is not None:
        for key in ("sae_layer", "n_latents"):
            if key not in entry:
                raise SteerbackError(f"target {name!r}: an SAE of format {source.format!r} needs {key} beside it")
    layer = entry.get("sae_layer")
    for key in ("steer_layer", "read_layer"):
        if entry.setdefault(key, layer) is None:
            raise SteerbackError(f"target {name!r} has no SAE, so it has to say its {key}")


def _source(name: str, table: Mapping[str, Any], layer: int | None) -> SaeSource:
    known = set(SaeSource.__dataclass_fields__) - {"layer"}
    if strange := sorted(set(table) - known):
        raise unknown(f"key of target {name!r}, sae:", strange[0], sorted(known))
    if "location" not in table:
        raise SteerbackError(f"target {name!r}: sae needs a location, a folder or a hub id")
    return SaeSource(**table, layer=layer)


def _from_model(folder: Path, entry: dict[str, Any]) -> None:
    """Fills layers and width from the model's config.json where the entry leaves them out."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        entry.setdefault("n_layers", config.get("num_hidden_layers"))
        entry.setdefault("d_model", config.get("hidden_size"))
    except (OSError, ValueError, AttributeError):
        return  # for estimates only; loading the model says what is wrong with its config


def _prior(name: str, value: Any) -> BoostPrior:
    try:
        if isinstance(value, BoostPrior):
            return value
        return BoostPrior(**value) if isinstance(value, Mapping) else BoostPrior(*map(float, value))
    except (TypeError, ValueError):
        raise SteerbackError(
            f"target {name!r}: boost_prior {value!r} should be {{mean, sd, low, high}}, in raw decoder units"
        ) from None


def _builtin_folder(name: str, check: bool) -> Path:
    from steerback.organism import weights_dir

    folder = weights_dir(name)
    if check and not (folder / "config.json").is_file():
        raise SteerbackError(f"{name}: no weights in {folder}; make them with: python -m tools.organism build")
    return folder
