"""Train an adapter from a target and a mix, write its card, list adapters and read their cards.

`train` has the training loop; `launch` starts several processes.
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
from steerback.errors import VERSION, SteerbackError
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
from steerback.targets.target import ADAPTER_FILES, adapter_config, is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "card.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")


class TrainingData(CardRecord):
    """The training data of an adapter: source, content hash, percent of self-corrections, counts."""

    source: str
    hash: str
    percent: float
    training: int
    validation: int
    cut_at_sequence_length: int
    tokens: int
    trained_tokens: int


class AdapterCard(CardRecord):
    """The contents of an adapter's card.json: base, data, settings, training, versions."""

    name: str
    base: str
    model: str
    """Hub id of the base, or the target's name if the base is a folder on this machine."""
    revision: str | None
    base_files: dict[str, str]
    data: TrainingData
    settings: TrainingSettings
    training: TrainingFacts
    validation_loss: list[ValidationLoss]
    """The last validation loss; empty without validation examples."""
    versions: dict[str, str]
    machine: dict[str, object]
    commit: dict[str, object] | None
    written: str


def train_adapter(job: TrainingJob, say: Callable[[str], None] = print) -> AdapterCard:
    """Train an adapter, or resume its training; write and return its card. A finished training is not repeated."""
    from steerback.engines.loading import load_tokenizer

    require_extra()
    target = resolve(job.target)
    training, validation = read_data(job.data)
    data_hash = hash_rows(training, validation)
    if (job.out / CARD).is_file() and (job.out / "training.json").is_file():
        _mark(job.out, target, data_hash, job.settings)
        return read_card(job.out)
    tokenizer = load_tokenizer(target)
    tokens, cut = encode_rows(training, tokenizer, job.settings.sequence_length, f"{job.data} (training)")
    held, _ = encode_rows(validation, tokenizer, job.settings.sequence_length, f"{job.data} (validation)")
    _mark(job.out, target, data_hash, job.settings)
    # a self-correction has two masked segments, the prompt and the passage, before the trained one
    corrects = [not any(segment.train for segment in row[:2]) for row in training + validation]
    report = fit(lambda: load_base(target), tokenizer, tokens, held, job.settings, job.out, say=say, name=job.name)
    card = AdapterCard(
        name=job.name,
        base=target.name,
        model=target.name if Path(target.model).is_dir() else target.model,
        revision=target.revision,
        base_files=_base_files(target),
        data=TrainingData(
            source=job.data.name,
            hash=data_hash,
            percent=100 * sum(corrects) / len(corrects),
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
    if int(os.environ.get("RANK", "0")) == 0:  # only the first of several processes writes
        config = job.out / ADAPTER_FILES[0]  # peft writes the local path of the base, which the card must not show
        write_json(config, adapter_config(job.out) | {"base_model_name_or_path": card.model})
        write_json(job.out / "losses.json", report.curves.model_dump())
        write_atomic(job.out / "README.md", _readme(card).encode("utf-8"))
        write_json(job.out / CARD, card.model_dump(mode="json"))  # last, because the card marks a finished training
    return card


def read_card(folder: Path) -> AdapterCard:
    """Read an adapter's card. Raises SteerbackError if it is damaged."""
    return parse(AdapterCard, readers.read_json_table(folder / CARD, "adapter card"), f"adapter card {folder / CARD}")


def read_losses(folder: Path) -> LossCurves:
    """Read the losses of an adapter's training. Raises SteerbackError if the file is missing or damaged."""
    path = folder / "losses.json"
    return parse(LossCurves, readers.read_json_table(path, "losses"), f"losses {path}")


def load_base(target: Target) -> PreTrainedModel:
    """Load the base model for training: bfloat16 on a GPU that supports it, else float32."""
    import torch

    from steerback.engines.loading import load_weights

    place = "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda":
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    dtype = torch.bfloat16 if has_bf16(place.partition(":")[0]) else torch.float32
    check_weights(target)
    return load_weights(target, dtype).to(place)


def read_data(path: Path) -> tuple[list[Row], list[Row]]:
    """Return (training, validation) rows of a mix's folder, or of a single file, which has no validation rows."""
    if path.is_dir():
        file = path / "validation.jsonl"
        return read_rows(path / "train.jsonl"), (read_rows(file) if file.is_file() and file.stat().st_size else [])
    return read_rows(path), []


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int, where: str
) -> tuple[list[Tokens], int]:
    """Tokenise all rows and cut them at `length`; return the tokens and the number of cut rows.

    Raises SteerbackError for a row whose trained tokens are all cut off; `where` names the data in the message.
    """
    encoded, cut = [], 0
    for number, row in enumerate(rows, 1):
        tokens = encode(row, tokenizer, f"{where} row {number}")
        if len(tokens.input_ids) > length:
            cut += 1
            tokens = tokens.cut(length)
            if not tokens.trained:
                raise SteerbackError(
                    f"{where} row {number}: no trained token is left within sequence_length {length}; raise it"
                )
        encoded.append(tokens)
    return encoded, cut


def _base_files(target: Target) -> dict[str, str]:
    from steerback.engines.loading import hash_files

    with contextlib.suppress(OSError):
        return hash_files(target)
    return {}


def _mark(folder: Path, target: Target, data_hash: str, settings: TrainingSettings) -> None:
    """Record what is trained in `folder`. Raises SteerbackError if it contains checkpoints of another training."""
    make_folder(folder, "choose another --out")
    now = {
        "base_files": _base_files(target),
        "data": data_hash,
        "settings": settings.model_dump() | {"micro_batch": None},
    }
    path = folder / "training.json"
    if path.is_file() and readers.read_json_table(path, "training notes") != now:
        raise SteerbackError(
            f"{folder} contains a training with another base, data or settings; choose another --out or remove it"
        )
    if not path.is_file():
        write_json(path, now)


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """A trained adapter: its folder, and the percent of self-corrections in its training data (None: unknown)."""

    folder: Path
    percent: float | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name


def find_adapters(place: str | Sequence[str]) -> list[TrainedAdapter]:
    """Return the adapters in a folder, or the listed ones, by percent, then name. Raises SteerbackError if none."""
    listed = [place] if isinstance(place, str) else list(place)
    folders: list[Path] = []
    for text in (part.strip() for item in listed for part in item.split(",")):
        path = Path(text).expanduser()
        inside = [path] if is_adapter(path) else sorted(p for p in path.glob("*") if is_adapter(p))
        if not inside:
            raise SteerbackError(f"no adapter in {text!r}; train one with: steerback finetune train")
        folders += inside
    names = [folder.name for folder in folders]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise SteerbackError(f"two adapters are named {repeated[0]!r}; rename one of the folders")
    adapters = [TrainedAdapter(folder, percent_of(folder)) for folder in folders]
    return sorted(adapters, key=lambda a: (a.percent is None, a.percent or 0.0, a.name))


def percent_of(folder: Path) -> float | None:
    """Return the percent of self-corrections in an adapter's training data, from its card; None if unknown."""
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
