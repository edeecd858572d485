"""GGUF files as models: each file is de-quantised once to a folder of safetensors, which both engines can load.

The folder is in the cache, named by the file's SHA-256. Weights of a quantised file are stored as bfloat16, those of a
float32 or float16 file as float32. GGUF files do not contain the vision or audio part of a model. This module knows no
targets and no engines.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from steerback.errors import SteerbackError, one_line, unknown
from steerback.readers import read_json_table
from steerback.store.files import make_folder, user_folder, write_json
from steerback.targets.download import check_space, gigabytes, hash_file

SUFFIX = ".gguf"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3")
"""Architectures that can be steered, by their names in GGUF files."""
FLOAT_FILES = (0, 1)
"""Values of `general.file_type` for files that are not quantised: float32 and float16."""


def is_gguf(model: str) -> bool:
    """Return whether a target's model is a GGUF file, by its name."""
    return model.endswith(SUFFIX)


def gguf_folder(model: str) -> Path | None:
    """Return the folder of a converted GGUF file, None if it is not converted yet."""
    file = Path(model).expanduser()
    folder = _folder(file) if file.is_file() else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def convert_gguf(model: str) -> Path:
    """Convert a GGUF file unless it is converted already; return the folder of the model.

    Raises SteerbackError for a missing or damaged file, an unknown architecture, or a full disk.
    """
    file = Path(model).expanduser()
    if not file.is_file():
        raise SteerbackError(f"model {model}: there is no such file")
    folder = _folder(file)
    if (folder / "config.json").is_file():
        return folder
    with _read_once(file):
        floats = _check(file)
        make_folder(folder.parent)
        size = file.stat().st_size
        check_space(folder.parent, 2 * size if floats else 4 * size, f"model {file.name}, de-quantised,")
        print(f"{file.name}: de-quantising {gigabytes(size)} into {folder}, once", file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:16]}."))
        try:
            with _errors(file), _quiet():
                _convert(file, work, "float32" if floats else "bfloat16")
            with contextlib.suppress(OSError):  # another process was faster
                work.replace(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _read_once(file: Path) -> Iterator[None]:
    """Let `_check` and transformers share one reader of the file, whose data is a plain array.

    Reading tokens and merges takes more than half of a conversion; transformers reads them for tokenizer, config and
    weights again. A slice of a memmap takes twice as long as one of an array.
    """
    import numpy as np

    try:
        import gguf
    except ImportError:
        raise SteerbackError(f"model {file}: GGUF files need the extra 'gguf': pip install 'steerback[gguf]'") from None
    made = gguf.GGUFReader

    class Reader(made):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value.view(np.ndarray) if isinstance(value, np.memmap) else value)

    read = functools.cache(Reader)
    gguf.GGUFReader = lambda path, *mode: read(str(path), *mode)
    try:
        yield
    finally:
        gguf.GGUFReader = made


def has_template(folder: Path) -> bool:
    """Return whether the model in a folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in read_json_table(folder / "tokenizer_config.json", "tokenizer config")
    except SteerbackError:
        return False


def stored_dtype(folder: Path) -> str:
    """Return the type of the weights of a converted file."""
    return str(read_json_table(folder / "config.json", "model config").get("dtype", "bfloat16"))


def _folder(file: Path) -> Path:
    """Return the folder named by the file's hash; the hash is cached until size or time of the file change."""
    stat = file.stat()
    key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    place = user_folder("gguf", "hashes.json")
    known: dict[str, str] = {}
    with contextlib.suppress(SteerbackError):  # missing or damaged: the hash is computed again
        known = {entry: str(value) for entry, value in read_json_table(place, "hashes of models").items()}
    name = json.dumps(key)
    if name not in known:
        known[name] = hash_file(file)
        make_folder(place.parent)
        write_json(place, known)
    return user_folder("gguf", known[name])


def _check(file: Path) -> bool:
    """Return whether a file is unquantised. Raises SteerbackError if it is incomplete or of an unknown architecture."""
    from gguf import GGUFReader

    with _errors(file):
        reader = GGUFReader(file)
        architecture = str(reader.get_field("general.architecture").contents())
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        kind = reader.get_field("general.file_type")
        floats = kind is not None and kind.contents() in FLOAT_FILES
    if architecture not in ARCHITECTURES:
        raise unknown(f"architecture (in {file})", architecture, ARCHITECTURES)
    if not end or end > file.stat().st_size:
        raise SteerbackError(f"model {file}: not a complete GGUF file of a model; download it again")
    return floats


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except SteerbackError:
        raise
    except Exception as error:  # the libraries raise many types of errors for a damaged file
        reason = one_line(error)[:300] or type(error).__name__
        raise SteerbackError(f"model {file}: not a readable GGUF file ({reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the library's progress bars and notes about the conversion."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _convert(file: Path, folder: Path, dtype: str) -> None:
    """Write model and tokenizer of a file as a folder in transformers' format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    model, report = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        trust_remote_code=False,
    )
    if report["missing_keys"]:
        raise SteerbackError(f"model {file}: lacks {len(report['missing_keys'])} weights of its architecture")
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):  # save_pretrained refuses models marked as quantised
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
