"""How an adapter is trained: plain numbers, with the specification's as defaults. Loads nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from steerback.errors import SteerbackError, unknown

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one training; defaults from the specification, section "Experiment 4"."""

    rank: int = 32
    alpha: float = 16
    dropout: float = 0.05
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    epochs: float = 4
    batch_size: int = 8
    """Effective: what one optimizer step sees, over all devices."""
    warmup_steps: int = 10
    sequence_length: int = 4096
    """In tokens; longer examples are cut at the end, and counted."""
    micro_batch: int | None = None
    """Rows in memory at once, per device. None: as many as possible, from the effective batch down."""
    checkpointing: bool | None = None
    """Recompute activations instead of keeping them. None: on a GPU, for models of a billion parameters and more."""
    seed: int = 42
    max_steps: int | None = None
    """Stop early (for tests and timings); the schedule is laid out for so many steps."""
    evaluations: int = 8
    """How often the losses on the validation examples are taken, beside the start."""

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "sequence_length", "evaluations"):
            if getattr(self, name) < 1:
                raise SteerbackError(f"training setting {name} {getattr(self, name)!r} is not at least 1")
        for name in ("alpha", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise SteerbackError(f"training setting {name} {getattr(self, name)!r} is not above 0")
        for name in ("micro_batch", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SteerbackError(f"training setting {name} {getattr(self, name)!r} is not at least 1")
        if not 0 <= self.dropout < 1 or self.warmup_steps < 0:
            raise SteerbackError("training settings: dropout lies in [0, 1), warmup_steps is not negative")
        if self.schedule not in SCHEDULES:
            raise unknown("training setting schedule", self.schedule, SCHEDULES)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def accumulation(self, micro: int, devices: int) -> int:
        """Batches gathered for one optimizer step, so that the effective batch stays what it is."""
        return self.batch_size // (micro * devices)

    def micro_sizes(self, devices: int = 1) -> list[int]:
        """Micro-batches that divide the effective batch over `devices`, largest first, each at most the one before.

        Raises SteerbackError where the effective batch cannot be divided.
        """
        if self.batch_size % devices:
            raise SteerbackError(
                f"an effective batch of {self.batch_size} cannot be divided over {devices} devices; choose another "
                "--processes or batch_size"
            )
        share = self.batch_size // devices
        if self.micro_batch is not None and share % self.micro_batch:
            raise SteerbackError(
                f"micro_batch {self.micro_batch} does not divide the effective batch of {share} per device"
            )
        size = self.micro_batch or share
        sizes = [size]
        while size > 1:
            size = next(n for n in range(size // 2, 0, -1) if share % n == 0)
            sizes.append(size)
        return sizes


def from_mapping(values: dict[str, Any], base: Settings | None = None) -> Settings:
    """`base` (default: the specification's) with some values changed; an unknown name is refused with the choices."""
    known = {f.name: f for f in fields(Settings)}
    for name, value in values.items():
        if name not in known:
            raise unknown("training setting", name, known)
        wanted = str(known[name].type)
        good = (
            (isinstance(value, bool) if "bool" in wanted else isinstance(value, (int, float)) and value is not True)
            or (value is None and "None" in wanted)
            or (wanted == "str" and isinstance(value, str))
        )
        if not good or ("float" not in wanted and isinstance(value, float)):
            raise SteerbackError(f"training setting {name} should be {wanted}, not {value!r}")
    return replace(base or Settings(), **values)
