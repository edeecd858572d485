"""The same training as configuration files of axolotl, the trainer the specification used.

Knows axolotl's names for our settings; runs nothing. Data files are ours as they are (`input_output`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from steerback.finetuning.adapters import Job
from steerback.finetuning.settings import Settings
from steerback.store.files import make_folder
from steerback.store.run import write_atomic
from steerback.targets import Target


def configuration(job: Job, target: Target) -> dict[str, Any]:
    """axolotl's configuration of a job. Relative paths are relative to where axolotl is started."""
    s: Settings = job.settings
    data = Path(job.data)
    sets = [(data / "train.jsonl", data / "validation.jsonl")] if data.is_dir() else [(data, None)]
    training, validation = sets[0]
    micro = s.micro_sizes()[0]
    body: dict[str, Any] = {
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
        "output_dir": job.out,
    }
    if validation is not None and validation.is_file() and validation.stat().st_size:
        body |= {"test_datasets": [_dataset(validation)], "evals_per_epoch": max(1, round(s.evaluations / s.epochs))}
    else:
        body |= {"val_set_size": 0}
    return body


def _dataset(path: Path) -> dict[str, Any]:
    return {"path": str(path), "ds_type": "json", "type": "input_output"} | (
        {"split": "train"}  # what a file's rows are called, validation files too
    )


def export(job: Job, target: Target, folder: Path) -> Path:
    """Writes `folder/NAME.yml`."""
    head = f"# {job.name}: the training of `steerback finetune train`, for: axolotl train {job.name}.yml\n"
    text = head + yaml.safe_dump(configuration(job, target), sort_keys=False)
    make_folder(folder, "choose another --out")
    return write_atomic(folder / f"{job.name}.yml", text.encode("utf-8"))
