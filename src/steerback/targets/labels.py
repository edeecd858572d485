"""Labels, contexts, liveness and SAE metadata, read from the files of a target folder.

    labels.csv     index,label
    latents.csv    index,label,density,max_activation,kind
    sae.json       {"kind", "layer", "d_model", "n_latents", ...}
    contexts.json  {"index": ["top-activating snippet", ...]}

A missing label is missing, never invented. It knows nothing of tensors.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from steerback.errors import SteerbackError
from steerback.records import LatentKey


def read_labels(folder: Path) -> dict[int, str]:
    """Label per latent from labels.csv (else latents.csv); latents without one are left out."""
    for name in ("labels.csv", "latents.csv"):
        if (folder / name).is_file():
            rows = _rows(folder / name, "label")
            return {index: row["label"].strip() for index, row in rows if (row["label"] or "").strip()}
    return {}


def read_dead(folder: Path) -> frozenset[int]:
    """Latents that never fired on the SAE's own corpus (density 0 in latents.csv); empty where that is unknown."""
    path = folder / "latents.csv"
    if not path.is_file():
        return frozenset()
    dead = []
    for index, row in _rows(path, "density"):
        try:
            density = float(row["density"] or "nan")
        except ValueError:
            raise SteerbackError(f"{path}: density {row['density']!r} of latent {index} is not a number") from None
        if density == 0:
            dead.append(index)
    return frozenset(dead)


def read_contexts(folder: Path) -> dict[LatentKey, tuple[str, ...]]:
    """Top-activating snippets per latent from contexts.json; empty where there is no such file."""
    path = folder / "contexts.json"
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return {int(index): tuple(str(text) for text in texts) for index, texts in loaded.items()}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValueError, AttributeError, TypeError) as error:
        raise SteerbackError(f'{path}: expected {{"index": ["snippet", ...]}} ({error})') from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """The parsed `sae.json` of a folder in our own format, with `kind` and `layer` checked to be there."""
    path = folder / "sae.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SteerbackError(f"{folder}: no sae.json there; an SAE folder holds sae.safetensors and sae.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SteerbackError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("kind"), str) or type(meta.get("layer")) is not int:
        raise SteerbackError(f'{path}: expected {{"kind": "relu|jumprelu|topk", "layer": int, ...}}')
    return meta


def _rows(path: Path, column: str) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"index", column} <= set(reader.fieldnames or ()):
                raise SteerbackError(f"{path}: needs the columns index and {column}, has {reader.fieldnames}")
            return [(int(row["index"]), row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError) as error:
        raise SteerbackError(f"{path}: not a readable table of latents ({error})") from error
