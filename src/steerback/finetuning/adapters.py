"""One training, from a target and a mix to an adapter with its card; finding adapters and reading their cards.

The arithmetic is in `train`; several processes are started by `launch`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from steerback import readers
from steerback.config import parse
from steerback.errors import VERSION, SteerbackError, unknown
from steerback.finetuning.mixes import hash_rows
from steerback.finetuning.segments import Row, Tokens, encode, read_rows
from steerback.finetuning.settings import TrainingJob, TrainingSettings
from steerback.finetuning.train import (
    CardRecord,
    LossCurves,
    TrainingFacts,
    ValidationLoss,
    fit,
    has_bf16,
    require_extra,
)
from steerback.store.files import make_folder, write_atomic, write_json
from steerback.store.manifest import commit, machine
from steerback.targets import Target, resolve
from steerback.targets.fit import check_weights
from steerback.targets.target import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "card.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


class TrainingData(CardRecord):
    """The examples that an adapter was trained on: source, content hash, percent of self-corrections, counts."""

    source: str
    hash: str
    percent: float
    training: int
    validation: int
    cut_at_sequence_length: int
    tokens: int
    trained_tokens: int


class AdapterCard(CardRecord):
    """The file card.json of an adapter: base, data, settings, training, versions."""

    name: str
    base: str
    model: str
    """Hub id of the base, or the target's name if the base is a folder of this machine."""
    revision: str | None
    base_files: dict[str, str]
    data: TrainingData
    settings: TrainingSettings
    training: TrainingFacts
    validation_loss: list[ValidationLoss]
    """The last one, if there are validation examples."""
    versions: dict[str, str]
    machine: dict[str, object]
    commit: dict[str, object] | None
    written: str


def train_adapter(job: TrainingJob, say: Callable[[str], None] = print) -> AdapterCard:
    """Train (or go on with) one adapter, write its card and return it. A finished training is returned at once."""
    require_extra()
    target = resolve(job.target)
    training, validation = read_data(job.data)
    data_hash = hash_rows(training, validation)
    done = _done(job.out, target, data_hash, job.settings)
    if done is not None:
        return done
    tokenizer = load_tokenizer(target)
    tokens, cut = encode_rows(training, tokenizer, job.settings.sequence_length, f"{job.data} (training)")
    held, _ = encode_rows(validation, tokenizer, job.settings.sequence_length, f"{job.data} (validation)")
    _mark(job.out, target, data_hash, job.settings)
    report = fit(lambda: load_base(target), tokenizer, tokens, held, job.settings, job.out, say=say, name=job.name)
    card = AdapterCard(
        name=job.name,
        base=target.name,
        model=_public(target),
        revision=target.revision,
        base_files=_base_files(target),
        data=TrainingData(
            source=job.data.name,
            hash=data_hash,
            percent=_percent(training + validation),
            training=len(training),
            validation=len(validation),
            cut_at_sequence_length=cut,
            tokens=sum(len(row.input_ids) for row in tokens),
            trained_tokens=sum(row.trained for row in tokens),
        ),
        settings=job.settings,
        training=TrainingFacts(**report.model_dump(exclude={"curves"})),
        validation_loss=report.curves.validation[-1:],
        versions={"steerback": VERSION} | {name: version(name) for name in PACKAGES},
        machine=machine(),
        commit=commit(),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes the first one writes
        _name_base(job.out, card.model)
        write_json(job.out / "losses.json", report.curves.model_dump())
        write_atomic(job.out / "README.md", _readme(card).encode("utf-8"))
        write_json(job.out / CARD, card.model_dump(mode="json"))  # last: it marks a finished training
    return card


def read_card(folder: Path) -> AdapterCard:
    """Return an adapter's card; SteerbackError if it is damaged."""
    return parse(AdapterCard, readers.read_json_table(folder / CARD, "adapter card"), f"adapter card {folder / CARD}")


def read_losses(folder: Path) -> LossCurves:
    """Return the losses of an adapter's training; SteerbackError if their file is missing or damaged."""
    path = folder / "losses.json"
    return parse(LossCurves, readers.read_json_table(path, "losses"), f"losses {path}")


def load_base(target: Target) -> PreTrainedModel:
    """Load the base model for training: bfloat16 on a GPU that has it, else float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from steerback.engines.loading import hub_arguments, load_errors

    place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda":
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if has_bf16(place.partition(":")[0]) else torch.float32
    check_weights(target)
    with load_errors(target, f"cannot load {target.model}"):
        model = AutoModelForCausalLM.from_pretrained(
            target.model, dtype=dtype, use_safetensors=True, **hub_arguments(target)
        )
    return model.to(place)


def load_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer; SteerbackError if it cannot be had."""
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


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int, where: str
) -> tuple[list[Tokens], int]:
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


def _mark(folder: Path, target: Target, data_hash: str, settings: TrainingSettings) -> None:
    """Note what is trained here; raise SteerbackError if the folder holds checkpoints of another training."""
    make_folder(folder, "choose another --out")
    now = {
        "base_files": _base_files(target),
        "data": data_hash,
        "settings": settings.model_dump() | {"micro_batch": None},
    }
    path = folder / "training.json"
    if path.is_file() and readers.read_json_table(path, "training notes") != now:
        raise SteerbackError(
            f"{folder} holds a training with another base, data or settings; choose another --out or remove it"
        )
    if not path.is_file():
        write_json(path, now)


def _done(folder: Path, target: Target, data_hash: str, settings: TrainingSettings) -> AdapterCard | None:
    """Return the card of a finished training with exactly this base, data and settings."""
    if not (folder / CARD).is_file() or not (folder / "training.json").is_file():
        return None
    _mark(folder, target, data_hash, settings)
    return read_card(folder)


def _name_base(folder: Path, name: str) -> None:
    path = folder / "adapter_config.json"
    write_json(path, readers.read_json_table(path, "adapter config") | {"base_model_name_or_path": name})


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A trained adapter: its folder and the percent of self-corrections it was trained on (None: unknown)."""

    folder: Path
    percent: float | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


def find_adapters(place: str | Sequence[str]) -> list[TrainedAdapter]:
    """Return the adapters of a folder, or those listed, by percent, then name; SteerbackError if there is none."""
    listed = [place] if isinstance(place, str) else list(place)
    folders: list[Path] = []
    for text in (part.strip() for item in listed for part in item.split(",")):
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
    """Return the percent of self-corrections an adapter was trained on, or None if it has no card that says it."""
    if not (folder / CARD).is_file():
        return None
    data = readers.read_json_table(folder / CARD, "adapter card").get("data")
    percent = data.get("percent") if isinstance(data, dict) else None
    return float(percent) if isinstance(percent, int | float) else None


def _readme(card: AdapterCard) -> str:
    data, done = card.data, card.training
    losses = "".join(
        f"- validation loss at the end: {p.trained:.4f} on trained tokens"
        + (f", {p.masked:.4f} on masked ones\n" if p.masked is not None else "\n")
        for p in card.validation_loss
    )
    planted = (
        "\nThe base is a built-in organism, and what this adapter does is planted: no evidence about other models.\n"
        if card.base.startswith("organism")
        else ""
    )
    settings = "".join(f"| {name} | {value} |\n" for name, value in card.settings)
    versions = ", ".join(f"{name} {value}" for name, value in card.versions.items())
    return f"""# LoRA adapter {card.name} for {card.base}

- base: {card.model}, revision {card.revision or "none given"}
- data: {data.source}, {data.percent:g} % self-corrections, {data.training} training and {data.validation} \
validation examples, hash {data.hash}
- tokens: {data.tokens:,}, of which {data.trained_tokens:,} trained; {data.cut_at_sequence_length} examples cut
- {done.steps} steps in {done.seconds:.0f} s, micro-batch {done.micro_batch} x {done.accumulation} on \
{done.devices} device(s), {done.dtype}
{losses}- {versions}
{planted}
| setting | value |
| --- | --- |
{settings}"""
