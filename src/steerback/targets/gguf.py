"""A GGUF file as a model: de-quantised once into a folder of safetensors in the cache, which both engines load.

The folder is named by the file's SHA-256. Weights of a quantised file are kept as bfloat16, those of a float32 or
float16 file as float32. A vision or audio part of the model is not in such files. It knows no target and no engine.
"""

from __future__ import annotations

import contextlib
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
"""What files call the architectures that can be steered."""
FLOAT_FILES = (0, 1)
"""`general.file_type` of files that are not quantised: float32 and float16."""


def is_gguf(model: str) -> bool:
    """Return whether a target's model names a GGUF file."""
    return model.endswith(SUFFIX)


def gguf_folder(model: str) -> Path | None:
    """Return the folder that a GGUF file was turned into, None if that has not happened yet."""
    file = Path(model).expanduser()
    folder = _folder(file) if file.is_file() else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def convert_gguf(model: str) -> Path:
    """Return the folder of a GGUF file's model, de-quantising the file if that has not been done yet.

    Raises SteerbackError in one line for a missing or damaged file, an unknown architecture, or a full disk.
    """
    file = Path(model).expanduser()
    if not file.is_file():
        raise SteerbackError(f"model {model}: no such file")
    folder = _folder(file)
    if (folder / "config.json").is_file():
        return folder
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


def has_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return "chat_template" in read_json_table(folder / "tokenizer_config.json", "tokenizer config")
    except SteerbackError:
        return False


def stored_dtype(folder: Path) -> str:
    """Return the type in which the weights of a converted file were kept."""
    return str(read_json_table(folder / "config.json", "model config").get("dtype", "bfloat16"))


def _folder(file: Path) -> Path:
    """Return the folder of a file by its hash, which is remembered as long as size and time of the file stay."""
    stat = file.stat()
    key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
    place = user_folder("gguf", "hashes.json")
    known: dict[str, str] = {}
    with contextlib.suppress(SteerbackError):  # none yet, or damaged: the hash is computed again
        known = {entry: str(value) for entry, value in read_json_table(place, "hashes of models").items()}
    name = json.dumps(key)
    if name not in known:
        known[name] = hash_file(file)
        make_folder(place.parent)
        write_json(place, known)
    return user_folder("gguf", known[name])


def _check(file: Path) -> bool:
    """Return whether a file is not quantised; SteerbackError unless it is whole and of a known architecture."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SteerbackError(f"model {file}: GGUF files need the extra 'gguf': pip install 'steerback[gguf]'") from None
    with _errors(file):
        reader = GGUFReader(file)
        architecture = str(reader.get_field("general.architecture").contents())
        end = max((t.data_offset + t.n_bytes for t in reader.tensors), default=0)
        kind = reader.get_field("general.file_type")
        floats = kind is not None and kind.contents() in FLOAT_FILES
    if architecture not in ARCHITECTURES:
        raise unknown(f"architecture (in {file})", architecture, ARCHITECTURES)
    if not end or end > file.stat().st_size:
        raise SteerbackError(f"model {file}: not a whole GGUF file of a model; get it again")
    return floats


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except SteerbackError:
        raise
    except Exception as error:  # these libraries let anything through that a damaged file provokes
        reason = one_line(error)[:300] or type(error).__name__
        raise SteerbackError(f"model {file}: not a readable GGUF file ({reason})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's bars and notes about the conversion off the terminal."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)


def _convert(file: Path, folder: Path, dtype: str) -> None:
    """Write model and tokenizer of a file as transformers' own folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model, report = AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype), output_loading_info=True)
    if report["missing_keys"]:
        raise SteerbackError(f"model {file}: lacks {len(report['missing_keys'])} weights of its architecture")
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):  # else save_pretrained refuses
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
