"""Settings of an adapter's training, with the specification's values as defaults, and the training job."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from steerback.config import Settings, parse
from steerback.errors import SteerbackError


class TrainingSettings(Settings):
    """Settings of one training; defaults from the specification, section "Experiment 4"."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(16, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    epochs: float = Field(4, gt=0)
    batch_size: int = Field(8, ge=1)
    """Effective batch size: examples per optimizer step over all devices."""
    warmup_steps: int = Field(10, ge=0)
    sequence_length: int = Field(4096, ge=1)
    """Maximum number of tokens; longer examples are cut at the end and counted."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows per device in memory at a time. None: as many as fit, starting with the effective batch size."""
    checkpointing: bool | None = None
    """Recompute activations instead of storing them. None: on a GPU, for models with a billion parameters or more."""
    seed: int = 42
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps (for tests and timings); the schedule uses this length."""
    evaluations: int = Field(8, ge=1)
    """Number of measurements of the validation losses after the start."""

    def changed(self, **values: object) -> TrainingSettings:
        """Return the settings with changed values. Raises SteerbackError that names the first invalid value."""
        return parse(TrainingSettings, {**self.model_dump(), **values}, "training settings")

    def accumulation(self, micro: int, devices: int) -> int:
        """Return the number of micro-batches per optimizer step that gives the effective batch size."""
        return self.batch_size // (micro * devices)

    def micro_sizes(self, devices: int = 1) -> list[int]:
        """Return the possible micro-batches on `devices`, largest first, each about half of the one before.

        Raises SteerbackError if the effective batch cannot be divided evenly.
        """
        share, rest = divmod(self.batch_size, devices)
        if rest:
            raise SteerbackError(
                f"batch_size {self.batch_size} cannot be divided evenly over {devices} devices; choose another "
                "--processes or batch_size"
            )
        size = self.micro_batch or share
        if share % size:
            raise SteerbackError(f"micro_batch {size} does not divide the {share} examples per device and step evenly")
        sizes = [size]
        while sizes[-1] > 1:
            sizes.append(next(n for n in range(sizes[-1] // 2, 0, -1) if share % n == 0))
        return sizes


class TrainingJob(Settings):
    """One adapter to train: base, data (a folder with train.jsonl, or a file), folder of the adapter, settings."""

    target: str
    data: Path
    out: Path
    settings: TrainingSettings = TrainingSettings()

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.out.name
