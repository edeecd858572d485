"""Typed settings from nested tables: checked with one clear line for a mistake, merged in layers, flattened.

This module knows no setting of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar, get_args

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from steerback.errors import SteerbackError, did_you_mean, one_line
from steerback.readers import DEEPEST, parse_yaml


class Settings(BaseModel):
    """Base class of typed settings. Unknown keys, NaN and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


def parse(model: type[S], values: Mapping[str, object], where: str) -> S:
    """Return checked settings. Raises SteerbackError, which names the first invalid field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = f"{where}: {one_line(field) or 'values'}: {first['msg'].removeprefix('Value error, ')}"
        if first["msg"].startswith("Input should") and isinstance(first["input"], str | int | float):
            message += f", not {repr(first['input'])[:80]}"
        if first["type"] == "extra_forbidden":
            known = _choices(model, first["loc"])
            choices = f"choose one of: {', '.join(known)}" if known else "there are none"
            message = f"{where}: unknown setting {field!r};{_similar(model, field)} {choices}"
        raise SteerbackError(message) from None


def assignment(text: str) -> tuple[str, JsonValue]:
    """Return key and value of a `key=value` text. The value is parsed as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise SteerbackError(f"--set {text[:80]!r} is not of the form key=value, e.g. --set sampling.temperature=0.8")
    if key.count(".") > DEEPEST:
        raise SteerbackError(f"--set {text[:80]!r}: the key has more than {DEEPEST} levels")
    return key.strip(), parse_yaml(value, f"--set {text[:80]!r}: the value")


def nested(key: str, value: JsonValue) -> dict[str, object]:
    """Return nested tables for a key such as `a.b.c` and its value."""
    first, dot, rest = key.partition(".")
    return {first: nested(rest, value) if dot else value}


def merge(into: dict[str, object], layer: Mapping[str, object]) -> None:
    """Change nested tables to the values of another layer."""
    for key, value in layer.items():
        inner = into.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            merge(inner, value)
        else:
            into[key] = value


def drop(row: dict[str, object], layer: Mapping[str, object]) -> None:
    """Remove the settings that another layer sets."""
    for key, value in layer.items():
        inner = row.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            drop(inner, value)
        else:
            row.pop(key, None)


def _choices(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        for inner in (annotation, *get_args(annotation)):  # the annotation is a model, or `model | None`
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return sorted(model.model_fields)


def _similar(model: type[BaseModel], key: str) -> str:
    """Return ` did you mean KEY?` for a misspelt setting, or for one without its group."""
    keys = list(_keys(model))
    same_end = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return did_you_mean(same_end[0] if same_end else key, keys)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested tables as one table with dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
