"""Fits a LoRA adapter to rows of tokens: peft's adapters, trl's trainer, our masks, checkpoints and memory limits.

Knows tokens and models; nothing of examples or mixes. The loss is the mean over trained tokens of an optimizer step,
whatever the micro-batch and however many devices share it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerback.errors import SteerbackError
from steerback.finetuning.segments import IGNORED, Tokens
from steerback.finetuning.settings import Settings
from steerback.store.run import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback

NEEDED = ("accelerate", "datasets", "peft", "trl")
CHECKPOINTS = "checkpoints"
LARGE = 1_000_000_000
"""Models with as many parameters recompute activations on a GPU unless told otherwise."""
SAY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Point:
    """Losses on the validation examples after a number of optimizer steps, per token.

    `masked` is over the tokens that are never trained (prompt and off-topic passage), for comparison.
    """

    step: int
    trained: float
    masked: float | None


@dataclass(slots=True)
class Report:
    """What a training did. `losses` holds (step, mean loss per trained token since the entry before)."""

    steps: int
    seconds: float
    micro_batch: int
    accumulation: int
    devices: int
    dtype: str
    out_of_memory: list[str]
    resumed_from: int | None
    final_loss: float
    """Mean loss per trained token over the last logged steps."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)


class OutOfMemory(Exception):
    """Memory ran out at a micro-batch that others share, so this process cannot make it smaller alone."""


def require_extra() -> None:
    """Raises SteerbackError where the extra is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SteerbackError(
            f"fine-tuning needs {', '.join(missing)}, of the extra 'finetune': pip install 'steerback[finetune]'"
        )


def fit(
    make_model: Callable[[], PreTrainedModel],
    tokenizer: Any,
    training: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: Settings,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
    name: str = "",
) -> Report:
    """Trains an adapter into `folder`, going on from the newest checkpoint there if there is one.

    `make_model` gives the base model anew; it is called again with a smaller micro-batch when memory runs out.
    Raises SteerbackError for what the user must mend, OutOfMemory where several processes train together.
    """
    require_extra()
    if not training:
        raise SteerbackError(f"{name or folder}: no training example is left, so there is nothing to train on")
    with _quiet():
        devices = int(os.environ.get("WORLD_SIZE", "1"))
        halved: list[str] = []
        sizes = settings.micro_sizes(devices)
        for position, micro in enumerate(sizes):
            try:
                return _fit(
                    make_model, tokenizer, training, validation, settings, folder, micro, halved, say, callbacks
                )
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if devices > 1:
                    raise OutOfMemory(str(error)) from None
            _free()
            smaller = sizes[position + 1 : position + 2]
            if not smaller:
                raise SteerbackError(
                    f"{name or folder}: memory runs out with a single row; lower sequence_length or turn "
                    "checkpointing on"
                )
            halved.append(f"{micro} -> {smaller[0]}")
            say(f"{name}: out of memory at a micro-batch of {micro}; going on with {smaller[0]}, same effective batch")
    raise AssertionError("unreachable: every size returned, raised or was followed by a smaller one")


def _fit(
    make_model: Callable[[], PreTrainedModel],
    tokenizer: Any,
    training: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: Settings,
    folder: Path,
    micro: int,
    halved: list[str],
    say: Callable[[str], None],
    callbacks: Sequence[TrainerCallback],
) -> Report:
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTTrainer

    model = make_model()
    arguments = _arguments(model, settings, folder, micro, len(training), bool(validation))
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset(training),
        eval_dataset=_validation(validation),
        processing_class=tokenizer,
        peft_config=_lora(settings),
        callbacks=[_spoken(say), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # ours speaks
    checkpoint = get_last_checkpoint(arguments.output_dir) if (folder / CHECKPOINTS).is_dir() else None
    resumed = None if checkpoint is None else int(checkpoint.rsplit("-", 1)[1])
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.monotonic() - started
    report = _report(trainer, micro, settings, seconds, resumed, halved)
    if trainer.is_world_process_zero():
        save(trainer.model, folder)
    return report


def _arguments(
    model: PreTrainedModel, settings: Settings, folder: Path, micro: int, examples: int, validates: bool
) -> Any:
    """The settings in the words of trl (an SFTConfig)."""
    from trl import SFTConfig

    device = next(model.parameters()).device
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    steps = total_steps(examples, settings)
    every = max(1, math.ceil(steps / settings.evaluations))
    checkpointing = settings.checkpointing
    if checkpointing is None:
        checkpointing = device.type == "cuda" and sum(p.numel() for p in model.parameters()) >= LARGE
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.accumulation(micro, devices),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=has_bf16(device.type),
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        seed=settings.seed,
        data_seed=settings.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=max(1, steps // 100),
        logging_first_step=True,
        eval_strategy="steps" if validates else "no",
        eval_on_start=validates,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        save_only_model=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
    )


def _lora(settings: Settings) -> Any:
    """The adapter's shape in the words of peft (a LoraConfig)."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )


def save(model: Any, folder: Path) -> None:
    """Writes the adapter alone (safetensors and its configuration), each file whole or not at all."""
    temporary = folder / ".adapter"
    temporary.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(temporary))
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # the configuration last: it marks a whole one
        (temporary / name).replace(folder / name)
    for rest in temporary.iterdir():
        rest.unlink()
    temporary.rmdir()


def dataset(rows: Sequence[Tokens], labels: Callable[[Tokens], Sequence[int]] = lambda row: row.labels) -> Any:
    """The rows as trl takes them; a `labels` column is used as it is."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": list(row.input_ids), "labels": list(labels(row))} for row in rows])


def complement(row: Tokens) -> list[int]:
    """Labels of the tokens that are not trained."""
    return [token if label == IGNORED else IGNORED for token, label in zip(row.input_ids, row.labels, strict=True)]


def _validation(rows: Sequence[Tokens]) -> Any:
    return {"trained": dataset(rows), "masked": dataset(rows, complement)} if rows else None


def total_steps(rows: int, settings: Settings) -> int:
    """Optimizer steps of a training of so many rows."""
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(rows / settings.batch_size))


def has_bf16(kind: str) -> bool:
    """Whether to train in bfloat16 on this kind of device: wherever the GPU has it."""
    import torch

    return kind == "cuda" and torch.cuda.is_bf16_supported()


def _report(
    trainer: Any, micro: int, settings: Settings, seconds: float, resumed: int | None, halved: list[str]
) -> Report:
    history: list[dict[str, Any]] = trainer.state.log_history
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry]
    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        for part in ("trained", "masked"):
            if f"eval_{part}_loss" in entry:
                by_step.setdefault(int(entry["step"]), {})[part] = float(entry[f"eval_{part}_loss"])
    devices = trainer.args.world_size
    return Report(
        steps=trainer.state.global_step,
        seconds=seconds,
        micro_batch=micro,
        accumulation=settings.accumulation(micro, devices),
        devices=devices,
        dtype=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        out_of_memory=list(halved),
        resumed_from=resumed,
        final_loss=losses[-1][1],
        losses=losses,
        validation=[
            Point(step, found["trained"], found.get("masked"))
            for step, found in sorted(by_step.items())
            if "trained" in found
        ],
    )


def _spoken(say: Callable[[str], None]) -> TrainerCallback:
    """Tells how far the training is, its loss and the time left, now and then."""
    from transformers import TrainerCallback

    class Spoken(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = self.spoke = time.monotonic()
            self.first, self.loss = 0, ""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f", loss {logs['loss']:.3f}"

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.monotonic()
            ended = state.global_step >= state.max_steps
            if not state.is_world_process_zero or not (ended or now - self.spoke >= SAY_SECONDS):
                return
            self.spoke = now
            per_step = (now - self.began) / (state.global_step - self.first)
            left = per_step * (state.max_steps - state.global_step)
            rest = f"in {now - self.began:.0f} s" if ended else f"{left:.0f} s left"
            say(f"step {state.global_step}/{state.max_steps}{self.loss}, {rest}")

    return Spoken()


def _out_of_memory(error: BaseException) -> bool:
    from steerback.engines.loading import out_of_memory

    return out_of_memory(error)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and their notes on what we chose knowingly."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)


def write_losses(report: Report, folder: Path) -> None:
    """losses.json: training loss by step, validation losses on trained and masked tokens."""
    body = {
        "training": [{"step": step, "loss": loss} for step, loss in report.losses],
        "validation": [{"step": p.step, "trained": p.trained, "masked": p.masked} for p in report.validation],
    }
    write_json(folder / "losses.json", json.loads(json.dumps(body)))
