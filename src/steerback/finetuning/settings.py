"""How an adapter is trained: the settings, with the specification's values as defaults, and one training job."""

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
    """Effective batch: examples per optimizer step, over all devices."""
    warmup_steps: int = Field(10, ge=0)
    sequence_length: int = Field(4096, ge=1)
    """In tokens; longer examples are cut at the end, and counted."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows in memory at once, per device. None: as many as possible, from the effective batch down."""
    checkpointing: bool | None = None
    """Recompute activations instead of keeping them. None: on a GPU, for models of a billion parameters and more."""
    seed: int = 42
    max_steps: int | None = Field(None, ge=1)
    """Stop early (for tests and timings); the schedule is laid out for so many steps."""
    evaluations: int = Field(8, ge=1)
    """How often the losses on the validation examples are measured after the start."""

    def changed(self, **values: object) -> TrainingSettings:
        """Return the settings with other values, checked; SteerbackError names the first that is wrong."""
        return parse(TrainingSettings, {**self.model_dump(), **values}, "training settings")

    def accumulation(self, micro: int, devices: int) -> int:
        """Return the number of micro-batches per optimizer step that keeps the effective batch."""
        return self.batch_size // (micro * devices)

    def micro_sizes(self, devices: int = 1) -> list[int]:
        """Return the micro-batches that divide the effective batch over `devices`, largest first, about halving.

        Raises SteerbackError if the effective batch cannot be divided.
        """
        share, rest = divmod(self.batch_size, devices)
        if rest:
            raise SteerbackError(
                f"an effective batch of {self.batch_size} cannot be divided over {devices} devices; choose another "
                "--processes or batch_size"
            )
        size = self.micro_batch or share
        if share % size:
            raise SteerbackError(f"micro_batch {size} does not divide the effective batch of {share} per device")
        sizes = [size]
        while sizes[-1] > 1:
            sizes.append(next(n for n in range(sizes[-1] // 2, 0, -1) if share % n == 0))
        return sizes


class TrainingJob(Settings):
    """One adapter to be trained: base, rows (a folder with train.jsonl, or a file), folder of the adapter, settings."""

    target: str
    data: Path
    out: Path
    settings: TrainingSettings = TrainingSettings()

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.out.name
