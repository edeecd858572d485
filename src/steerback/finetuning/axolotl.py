"""Export a training as configuration for axolotl, the trainer of the specification.

axolotl reads the data files unchanged (its format `input_output`).
"""

from __future__ import annotations

from pathlib import Path

import yaml

from steerback.finetuning.settings import TrainingJob
from steerback.store.files import make_folder, write_atomic
from steerback.targets import Target


def configuration(job: TrainingJob, target: Target) -> dict[str, object]:
    """Return axolotl's configuration of a job. Relative paths are relative to axolotl's working folder."""
    s, data = job.settings, job.data
    training = data / "train.jsonl" if data.is_dir() else data
    validation = data / "validation.jsonl"
    micro = s.micro_sizes()[0]
    body: dict[str, object] = {
        "base_model": target.model,
        **({"revision_of_model": target.revision} if target.revision else {}),
        "datasets": [_dataset(training)],
        "train_on_inputs": False,
        "sequence_len": s.sequence_length,
        "sample_packing": False,
        "adapter": "lora",
        "lora_r": s.rank,
        "lora_alpha": int(s.alpha) if float(s.alpha).is_integer() else s.alpha,
        "lora_dropout": s.dropout,
        "lora_target_linear": True,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": s.accumulation(micro, 1),
        "num_epochs": int(s.epochs) if float(s.epochs).is_integer() else s.epochs,
        **({"max_steps": s.max_steps} if s.max_steps else {}),
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "learning_rate": s.learning_rate,
        "lr_scheduler": s.schedule,
        "warmup_steps": s.warmup_steps,
        "bf16": "auto",
        "gradient_checkpointing": s.checkpointing is not False,
        "seed": s.seed,
        "output_dir": str(job.out),
    }
    if validation.is_file() and validation.stat().st_size:
        body |= {"test_datasets": [_dataset(validation)], "evals_per_epoch": max(1, round(s.evaluations / s.epochs))}
    else:
        body |= {"val_set_size": 0}
    return body


def _dataset(path: Path) -> dict[str, str]:
    # axolotl calls the split of every file `train`, even of a validation file
    return {"path": str(path), "ds_type": "json", "type": "input_output", "split": "train"}


def export(job: TrainingJob, target: Target, folder: Path) -> Path:
    """Write `folder/NAME.yml` and return its path."""
    head = f"# {job.name}: the training of `steerback finetune train`, for: axolotl train {job.name}.yml\n"
    text = head + yaml.safe_dump(configuration(job, target), sort_keys=False)
    make_folder(folder, "choose another --out")
    return write_atomic(folder / f"{job.name}.yml", text.encode("utf-8"))
