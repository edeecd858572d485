"""Fit a LoRA adapter to rows of tokens, with peft's adapters and trl's trainer; adds masks, checkpoints, memory limits.

The loss is the mean over the trained tokens of an optimizer step, for any micro-batch and any number of devices.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict

from steerback.config import Settings
from steerback.errors import SteerbackError
from steerback.finetuning.segments import IGNORED, Tokens
from steerback.finetuning.settings import TrainingSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_callback import TrainerControl, TrainerState
    from trl import SFTConfig

NEEDED = ("accelerate", "datasets", "peft", "trl")
CHECKPOINTS = "checkpoints"
LARGE = 1_000_000_000
"""Models with at least this many parameters recompute activations on a GPU, unless the settings say otherwise."""
SAY_SECONDS = 10.0


class CardRecord(Settings):
    """Base of the records of a training. Unknown fields are ignored, because a newer steerback may write more."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


class TrainingLoss(CardRecord):
    """Mean loss per trained token since the previous entry, at an optimizer step."""

    step: int
    loss: float


class ValidationLoss(CardRecord):
    """Losses per token on the validation examples after a number of optimizer steps.

    `masked` is the loss on tokens that are never trained (prompt and off-topic passage), for comparison.
    """

    step: int
    trained: float
    masked: float | None


class LossCurves(CardRecord):
    """The contents of an adapter's losses.json."""

    training: list[TrainingLoss]
    validation: list[ValidationLoss]


class TrainingFacts(CardRecord):
    """Steps, time, batches and final loss of a training, for the adapter's card."""

    steps: int
    seconds: float
    micro_batch: int
    accumulation: int
    devices: int
    dtype: str
    out_of_memory: list[str]
    """Each reduction of the micro-batch after running out of memory, such as `8 -> 4`."""
    resumed_from: int | None
    final_loss: float
    """Mean loss per trained token over the last logged steps."""


class TrainingReport(TrainingFacts):
    """Facts about a training with its loss curves."""

    curves: LossCurves


class OutOfMemory(Exception):
    """A process of several ran out of memory; all of them must restart with a smaller micro-batch."""


def require_extra() -> None:
    """Raise SteerbackError if the extra for fine-tuning is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise SteerbackError(
            f"fine-tuning needs {', '.join(missing)} from the extra 'finetune': pip install 'steerback[finetune]'"
        )


def fit(
    make_model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: TrainingSettings,
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    callbacks: Sequence[TrainerCallback] = (),
    name: str = "",
) -> TrainingReport:
    """Train an adapter into `folder`; resume from the newest checkpoint in it, if any.

    `make_model` loads the base model; it is called again for each smaller micro-batch after running out of memory.
    Raises SteerbackError for errors that the user can fix, and OutOfMemory if several processes train together.
    """
    require_extra()
    from accelerate.utils import find_executable_batch_size
    from accelerate.utils.memory import release_memory, should_reduce_batch_size

    if not training:
        raise SteerbackError(f"{name or folder}: there is no training example; give data with at least one")
    sizes, changes = settings.micro_sizes(_devices()), list[str]()

    def smaller() -> int:
        micro = sizes[len(changes)]
        if micro == sizes[-1]:
            raise SteerbackError(
                f"{name or folder}: out of memory with a single row; lower sequence_length or turn checkpointing on"
            )
        following = sizes[len(changes) + 1]
        changes.append(f"{micro} -> {following}")
        say(f"{name}: out of memory at a micro-batch of {micro}; continuing with {following}, same effective batch")
        return following

    def attempt(micro: int) -> TrainingReport:
        release_memory()  # accelerate's own collection runs before the previous attempt's memory is free
        try:
            return _train(
                make_model(),
                tokenizer,
                training,
                validation,
                settings,
                folder,
                micro,
                [_progress(say), *callbacks],
                changes,
            )
        except RuntimeError as error:
            if _devices() > 1 and should_reduce_batch_size(error):
                raise OutOfMemory(str(error)) from None
            raise

    with _quiet(), _attention():
        search = find_executable_batch_size(attempt, starting_batch_size=sizes[0], reduce_batch_size_fn=smaller)
        report: TrainingReport = search()
    return report


def _devices() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[Tokens],
    validation: Sequence[Tokens],
    settings: TrainingSettings,
    folder: Path,
    micro: int,
    callbacks: Sequence[TrainerCallback],
    changes: list[str],
) -> TrainingReport:
    """Train to the end with micro-batches of one size, save the adapter, and return the report."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTTrainer

    held = {"trained": dataset(validation), "masked": dataset(validation, complement)} if validation else None
    trainer = SFTTrainer(
        model=model,
        args=_arguments(model, settings, folder, micro, len(training), bool(validation)),
        train_dataset=dataset(training),
        eval_dataset=held,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        ),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # `_progress` prints instead
    checkpoint = get_last_checkpoint(trainer.args.output_dir) if (folder / CHECKPOINTS).is_dir() else None
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    curves = _curves(trainer.state.log_history)
    report = TrainingReport(
        steps=trainer.state.global_step,
        seconds=time.monotonic() - started,
        micro_batch=trainer.args.per_device_train_batch_size,
        accumulation=trainer.args.gradient_accumulation_steps,
        devices=trainer.args.world_size,
        dtype=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        out_of_memory=changes,
        resumed_from=None if checkpoint is None else int(checkpoint.rsplit("-", 1)[1]),
        final_loss=curves.training[-1].loss,
        curves=curves,
    )
    if trainer.is_world_process_zero():
        save(trainer.model, folder)
    return report


def _arguments(
    model: PreTrainedModel, settings: TrainingSettings, folder: Path, micro: int, examples: int, validates: bool
) -> SFTConfig:
    """Convert the settings to trl's arguments."""
    from trl import SFTConfig

    device = next(model.parameters()).device
    steps = total_steps(examples, settings)
    every = max(1, math.ceil(steps / settings.evaluations))
    checkpointing = settings.checkpointing
    if checkpointing is None:
        checkpointing = device.type == "cuda" and sum(p.numel() for p in model.parameters()) >= LARGE
    return SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=settings.accumulation(micro, _devices()),
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
        max_length=None,  # rows are already cut and tokenised
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
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter's weights (safetensors) and configuration, each file atomically."""
    temporary = folder / ".adapter"
    temporary.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(temporary))
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # configuration last: it marks a complete adapter
        (temporary / name).replace(folder / name)
    for rest in temporary.iterdir():
        rest.unlink()
    temporary.rmdir()


def dataset(rows: Sequence[Tokens], labels: Callable[[Tokens], Sequence[int]] = lambda row: row.labels) -> Dataset:
    """Convert rows to trl's dataset; trl uses the `labels` column unchanged."""
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": list(row.input_ids), "labels": list(labels(row))} for row in rows])


def complement(row: Tokens) -> list[int]:
    """Return labels for the tokens that are not trained."""
    return [token if label == IGNORED else IGNORED for token, label in zip(row.input_ids, row.labels, strict=True)]


def total_steps(rows: int, settings: TrainingSettings) -> int:
    """Return the number of optimizer steps of a training on `rows` rows."""
    return settings.max_steps or math.ceil(settings.epochs * math.ceil(rows / settings.batch_size))


def has_bf16(kind: str) -> bool:
    """Return whether to train in bfloat16 on this kind of device: on GPUs that support it."""
    import torch

    return kind == "cuda" and torch.cuda.is_bf16_supported()


def _curves(history: Sequence[dict[str, float]]) -> LossCurves:
    """Extract the losses from a trainer's log."""
    by_step: dict[int, dict[str, float]] = {}
    for entry in history:
        losses = {part: entry[f"eval_{part}_loss"] for part in ("trained", "masked") if f"eval_{part}_loss" in entry}
        if losses:
            by_step.setdefault(int(entry["step"]), {}).update(losses)
    return LossCurves(
        training=[TrainingLoss(step=int(entry["step"]), loss=entry["loss"]) for entry in history if "loss" in entry],
        validation=[
            ValidationLoss(step=step, trained=losses["trained"], masked=losses.get("masked"))
            for step, losses in sorted(by_step.items())
            if "trained" in losses
        ],
    )


def _progress(say: Callable[[str], None]) -> TrainerCallback:
    """Return a callback that reports step, loss and remaining time every SAY_SECONDS, and stops at a loss of NaN."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.began = self.said = time.monotonic()
            self.first, self.loss = 0, ""

        def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
            self.began, self.first = time.monotonic(), state.global_step

        def on_log(
            self,
            args: SFTConfig,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, float] | None = None,
            **_: object,
        ) -> None:
            for name, value in (logs or {}).items():
                if name.endswith("loss") and not math.isfinite(value):
                    raise SteerbackError(f"the loss is {value} at step {state.global_step}; lower learning_rate")
            if logs and "loss" in logs:
                self.loss = f", loss {logs['loss']:.3f}"

        def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
            now = time.monotonic()
            ended = state.global_step >= state.max_steps
            if not state.is_world_process_zero or not (ended or now - self.said >= SAY_SECONDS):
                return
            self.said = now
            per_step = (now - self.began) / (state.global_step - self.first)
            left = per_step * (state.max_steps - state.global_step)
            rest = f"in {now - self.began:.0f} s" if ended else f"{left:.0f} s left"
            say(f"step {state.global_step}/{state.max_steps}{self.loss}, {rest}")

    return Progress()


def _attention() -> contextlib.AbstractContextManager[None]:
    """Return a context in which PyTorch does not use cuDNN's attention.

    With a mask and a length of 64 more than a multiple of 128, its backward pass gives NaN if all scores of a row are
    low (pytorch issue 196678; torch 2.11 on an H200).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars and their warnings about settings that are chosen on purpose."""
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
