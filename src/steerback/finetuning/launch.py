"""Train one adapter in several processes, one device each; each of them runs this module.

torch's launcher is used as it is. accelerate's would read the user's accelerate configuration, which may hold another
precision or another number of processes than the job; its notebook launcher forks, so it cannot follow a command that
has touched CUDA, and it wraps a worker's one line in the traceback of the parent.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.finetuning.adapters import AdapterCard, read_card, train_adapter
from steerback.finetuning.settings import TrainingJob
from steerback.finetuning.train import OutOfMemory
from steerback.store.files import make_folder, write_json

OUT_OF_MEMORY = 75
"""Exit status of a process that ran out of memory: the batch has to be made smaller for all."""
MARK = ".out-of-memory"


def train_together(job: TrainingJob, processes: int, say: Callable[[str], None] = print) -> AdapterCard:
    """Train an adapter in several processes; torch starts them and accelerate joins them in the trainer.

    One process out of memory ends all; they start again from the newest checkpoint with a smaller micro-batch.
    """
    make_folder(job.out, "choose another --out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    for micro in job.settings.micro_sizes(processes):
        part = job.model_copy(update={"settings": job.settings.changed(micro_batch=micro)})
        task = write_json(job.out / "job.json", part.model_dump(mode="json"))
        done = subprocess.run([*command, "-m", "steerback.finetuning.launch", str(task)], check=False)
        if done.returncode == 0:
            task.unlink()
            return read_card(job.out)
        if not (job.out / MARK).is_file():
            raise SteerbackError(f"training of {job.name} failed in {processes} processes; their messages stand above")
        (job.out / MARK).unlink()
        say(f"{job.name}: out of memory at a micro-batch of {micro}")
    raise SteerbackError(f"{job.name}: memory runs out with a single row a device; lower sequence_length")


def worker(task: Path) -> int:
    """Train as one of several processes and return the exit status."""
    job = TrainingJob.model_validate_json(task.read_bytes())
    try:
        train_adapter(job)
    except OutOfMemory:
        (job.out / MARK).touch()
        return OUT_OF_MEMORY
    except SteerbackError as error:
        print(f"steerback: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1])))
