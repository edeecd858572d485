"""Settings with type, default and description, read from the pydantic models for help pages and documentation."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from steerback.experiments import experiment_type


class SettingRow(NamedTuple):
    """One setting: its key for `--set`, its type with bounds, its default and its description."""

    key: str
    kind: str
    default: object
    meaning: str


def setting_rows(model: type[BaseModel], prefix: str = "") -> Iterator[SettingRow]:
    """Yield every setting of a model; settings of nested models have dotted keys."""
    texts = _field_docs(model)
    for name, info in model.model_fields.items():
        inner = _inner_model(info.annotation)
        if inner is not None and isinstance(info.default, BaseModel):
            yield from setting_rows(inner, f"{prefix}{name}.")
            continue
        bounds = ", ".join(
            f"{sign} {getattr(rule, bound):g}"
            for rule in info.metadata
            for bound, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if getattr(rule, bound, None) is not None
        )
        kind = plain_type(info.annotation) + (f", {bounds}" if bounds else "")
        yield SettingRow(f"{prefix}{name}", kind, info.get_default(call_default_factory=True), texts.get(name, ""))


def experiment_rows(name: str) -> list[SettingRow]:
    """Return the settings of one experiment, with their keys for `--set`."""
    return [*setting_rows(experiment_type(name).options_type, "options.")]


def plain_type(kind: object) -> str:
    """Return a readable type without constraints: `int`, `list of int`, `'a' | 'b' | None`."""
    inner = get_args(kind)
    if isinstance(kind, type) and not inner:
        return "None" if kind is type(None) else kind.__name__
    origin = get_origin(kind)
    if origin is Annotated:
        return plain_type(inner[0])
    if origin is Literal:
        return " | ".join(f"'{value}'" for value in inner)
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(plain_type(part) for part in inner))
    if origin in (list, tuple):
        item = plain_type(inner[0])
        return f"list of ({item})" if "|" in item else f"list of {item}"
    return f"{origin.__name__} of {' to '.join(plain_type(part) for part in inner)}" if origin else str(kind)


def _field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring under each field of a model and of its base classes."""
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not (isinstance(cls, type) and issubclass(cls, BaseModel)) or cls is BaseModel:
            continue
        body = ast.parse(inspect.getsource(cls)).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


def _inner_model(annotation: object) -> type[BaseModel] | None:
    """Return the model type of a field, even if the field may be None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
