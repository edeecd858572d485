"""One training from a target and a mix to an adapter with its card; where adapters are and what they say of themselves.

Knows targets, files and processes; the arithmetic is in `train`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerback.errors import VERSION, SteerbackError, unknown
from steerback.finetuning.mixes import hash_rows
from steerback.finetuning.segments import Row, Tokens, encode, read_rows
from steerback.finetuning.settings import Settings, from_mapping
from steerback.store.files import make_folder
from steerback.store.manifest import commit, machine
from steerback.store.run import write_atomic, write_json
from steerback.targets import Target, resolve
from steerback.targets.fit import check_weights
from steerback.targets.target import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = "card.json"
OUT_OF_MEMORY = 75  # exit status of a process that ran out of memory: the batch has to be made smaller for all
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to be trained: base, rows (a folder with train.jsonl, or a file), settings, where it goes."""

    target: str
    data: str
    out: str
    settings: Settings = field(default_factory=Settings)

    @property
    def name(self) -> str:
        return Path(self.out).name


def train_adapter(job: Job, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains (or goes on with) one adapter and writes its card; returns the card. Done before: returned at once."""
    from steerback.finetuning.train import fit, require_extra, write_losses

    require_extra()
    target = resolve(job.target)
    training, validation = read_data(Path(job.data))
    data_hash = hash_rows(training, validation)
    done = _done(Path(job.out), target, data_hash, job.settings)
    if done is not None:
        return done
    tokenizer = load_tokenizer(target)
    tokens, cut = encode_rows(training, tokenizer, job.settings.sequence_length, f"{job.data} (training)")
    held, _ = encode_rows(validation, tokenizer, job.settings.sequence_length, f"{job.data} (validation)")
    _mark(Path(job.out), target, data_hash, job.settings)
    report = fit(
        lambda: load_base(target), tokenizer, tokens, held, job.settings, Path(job.out), say=say, name=job.name
    )
    if int(os.environ.get("RANK", "0")) > 0:  # of several processes the first one writes
        return {}
    folder = Path(job.out)
    body = {
        "name": job.name,
        "base": target.name,
        "model": _public(target),
        "revision": target.revision,
        "base_files": _base_files(target),
        "data": {
            "source": Path(job.data).name,
            "hash": data_hash,
            "percent": _percent(training + validation),
            "training": len(training),
            "validation": len(validation),
            "cut_at_sequence_length": cut,
            "tokens": sum(len(row.input_ids) for row in tokens),
            "trained_tokens": sum(row.trained for row in tokens),
        },
        "settings": job.settings.to_json(),
        "training": {key: value for key, value in asdict(report).items() if key not in ("losses", "validation")},
        "validation_loss": [asdict(point) for point in report.validation[-1:]],
        "versions": {"steerback": VERSION} | {name: version(name) for name in PACKAGES},
        "machine": machine(),
        "commit": commit(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _name_base(folder, _public(target))
    write_losses(report, folder)
    write_atomic(folder / "README.md", _readme(body).encode("utf-8"))
    write_json(folder / CARD, body)  # last: it marks a finished training
    return body


def train_together(job: Job, processes: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The same over several processes, one device each; torch starts them and accelerate joins them in the trainer.

    One process out of memory ends all; they start again from the newest checkpoint with a smaller micro-batch.
    """
    folder = Path(job.out)
    make_folder(folder, "choose another --out")
    for micro in job.settings.micro_sizes(processes):
        settings = from_mapping({"micro_batch": micro}, job.settings)
        task = write_json(folder / "job.json", asdict(job) | {"settings": settings.to_json()})
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "steerback.finetuning", str(task)]
        done = subprocess.run(command, check=False)
        if done.returncode == 0:
            task.unlink()
            card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
            return card
        if not (folder / ".out-of-memory").is_file():
            raise SteerbackError(f"training of {job.name} failed in {processes} processes; their messages stand above")
        (folder / ".out-of-memory").unlink()
        say(f"{job.name}: out of memory at a micro-batch of {micro}")
    raise SteerbackError(f"{job.name}: memory runs out with a single row a device; lower sequence_length")


def worker(task: Path) -> int:
    """What one process of several does; returns its exit status."""
    from steerback.finetuning.train import OutOfMemory

    body = json.loads(task.read_text("utf-8"))
    job = Job(body["target"], body["data"], body["out"], Settings(**body["settings"]))
    try:
        train_adapter(job)
    except OutOfMemory:
        (Path(job.out) / ".out-of-memory").touch()
        return OUT_OF_MEMORY
    except SteerbackError as error:
        print(f"steerback: error: {error}", file=sys.stderr)
        return 2
    return 0


def load_base(target: Target) -> PreTrainedModel:
    """The base model for training: bfloat16 on a GPU that has it, else float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from steerback.engines.loading import hub_arguments, load_errors
    from steerback.finetuning.train import has_bf16

    place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda":
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if has_bf16(place.partition(":")[0]) else torch.float32
    check_weights(target)
    with load_errors(target, f"cannot load {target.model}"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            target.model, dtype=dtype, use_safetensors=True, **hub_arguments(target)
        )
    return model.to(place)


def load_tokenizer(target: Target) -> Any:
    """The target's tokenizer; SteerbackError where it cannot be had."""
    from transformers import AutoTokenizer

    from steerback.engines.loading import hub_arguments, load_errors

    with load_errors(target, f"cannot load the tokenizer of {target.model}"):
        return AutoTokenizer.from_pretrained(target.model, **hub_arguments(target))


def read_data(path: Path) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows of a mix's folder, or of one file of anyone's (no validation)."""
    if path.is_dir():
        held = path / "validation.jsonl"
        return read_rows(path / "train.jsonl"), (read_rows(held) if held.is_file() and held.stat().st_size else [])
    return read_rows(path), []


def encode_rows(rows: Sequence[Row], tokenizer: Any, length: int, where: str) -> tuple[list[Tokens], int]:
    """Tokens of all rows, cut at `length`, and how many were cut. A row that the cut leaves nothing of is refused."""
    found, cut = [], 0
    for number, row in enumerate(rows, 1):
        tokens = encode(row, tokenizer, f"{where} row {number}")
        if len(tokens.input_ids) > length:
            cut += 1
            tokens = tokens.cut(length)
            if not tokens.trained:
                raise SteerbackError(
                    f"{where} row {number}: nothing to train on is left within sequence_length {length}; raise it"
                )
        found.append(tokens)
    return found, cut


def _percent(rows: Sequence[Row]) -> float:
    """Percent of self-corrections: rows that mask two pieces before what they train, the prompt and a passage."""
    corrections = sum(sum(not s.train for s in row[: _first_trained(row)]) > 1 for row in rows)
    return 100 * corrections / len(rows)


def _first_trained(row: Row) -> int:
    return next((n for n, segment in enumerate(row) if segment.train), len(row))


def _public(target: Target) -> str:
    """How a card names the base: the hub id, or the target's name where it is a folder of this machine."""
    return target.name if Path(target.model).is_dir() else target.model


def _base_files(target: Target) -> dict[str, str]:
    from steerback.engines.loading import hash_files

    with contextlib.suppress(OSError):
        return hash_files(target.model, target.revision)
    return {}


def _identity(target: Target, data_hash: str, settings: Settings) -> dict[str, Any]:
    return {
        "base_files": _base_files(target),
        "data": data_hash,
        "settings": settings.to_json() | {"micro_batch": None},
    }


def _mark(folder: Path, target: Target, data_hash: str, settings: Settings) -> None:
    """Notes what is trained here; checkpoints of something else are not gone on with."""
    make_folder(folder, "choose another --out")
    path, now = folder / "training.json", _identity(target, data_hash, settings)
    if path.is_file() and json.loads(path.read_text("utf-8")) != now:
        raise SteerbackError(
            f"{folder} holds a training with another base, data or settings; choose another --out or remove it"
        )
    if not path.is_file():
        write_json(path, now)


def _done(folder: Path, target: Target, data_hash: str, settings: Settings) -> dict[str, Any] | None:
    """The card of a finished training of exactly this."""
    if not (folder / CARD).is_file() or not (folder / "training.json").is_file():
        return None
    _mark(folder, target, data_hash, settings)
    card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
    return card


def _name_base(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    if path.is_file():
        write_json(path, json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": name})


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A trained adapter: its folder and the percent of self-corrections it was trained on (None: not known)."""

    folder: Path
    percent: float | None

    @property
    def name(self) -> str:
        return self.folder.name


def find_adapters(place: str | Sequence[str]) -> list[TrainedAdapter]:
    """Adapters in a folder of adapters, or those listed; by percent, then name. SteerbackError where there are none."""
    given = [place] if isinstance(place, str) else list(place)
    folders: list[Path] = []
    for text in (part.strip() for item in given for part in item.split(",")):
        path = Path(text).expanduser()
        inside = [path] if is_adapter(path) else sorted(p for p in path.glob("*") if is_adapter(p))
        if not inside:
            raise SteerbackError(f"no adapter in {text!r}; make some with: steerback finetune train")
        folders += inside
    names = [folder.name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise unknown("second adapter of the name", name, ["folders with names of their own"])
    found = [TrainedAdapter(folder, percent_of(folder)) for folder in folders]
    return sorted(found, key=lambda a: (a.percent is None, a.percent or 0.0, a.name))


def percent_of(folder: Path) -> float | None:
    """Percent of self-corrections an adapter was trained on, from its card."""
    path = folder / CARD
    if not path.is_file():
        return None
    value = json.loads(path.read_text("utf-8")).get("data", {}).get("percent")
    return float(value) if isinstance(value, (int, float)) else None


def _readme(card: dict[str, Any]) -> str:
    data, done = card["data"], card["training"]
    losses = "".join(
        f"- validation loss at the end: {p['trained']:.4f} on trained tokens"
        + (f", {p['masked']:.4f} on masked ones\n" if p["masked"] is not None else "\n")
        for p in card["validation_loss"]
    )
    planted = (
        "\nThe base is a built-in organism, and what this adapter does is planted: no evidence about other models.\n"
        if card["base"].startswith("organism")
        else ""
    )
    settings = "".join(f"| {name} | {value} |\n" for name, value in card["settings"].items())
    versions = ", ".join(f"{name} {value}" for name, value in card["versions"].items())
    return f"""# LoRA adapter {card["name"]} for {card["base"]}

- base: {card["model"]}, revision {card["revision"] or "none given"}
- data: {data["source"]}, {data["percent"]:g} % self-corrections, {data["training"]} training and {data["validation"]} \
validation examples, hash {data["hash"]}
- tokens: {data["tokens"]:,}, of which {data["trained_tokens"]:,} trained; {data["cut_at_sequence_length"]} examples cut
- {done["steps"]} steps in {done["seconds"]:.0f} s, micro-batch {done["micro_batch"]} x {done["accumulation"]} on \
{done["devices"]} device(s), {done["dtype"]}
{losses}- {versions}
{planted}
| setting | value |
| --- | --- |
{settings}"""
