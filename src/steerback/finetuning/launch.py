"""Train an adapter in several processes with one device each; every process runs this module.

torch's launcher starts the processes. accelerate's launcher would read the user's accelerate configuration, which may
have another precision or number of processes than the job. Its notebook launcher forks, so it fails after CUDA was
initialised, and it wraps the one-line error of a worker in a traceback.
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
"""Exit status of a process that ran out of memory, so that all processes need a smaller micro-batch."""
MARK = ".out-of-memory"


def train_together(job: TrainingJob, processes: int, say: Callable[[str], None] = print) -> AdapterCard:
    """Train an adapter in several processes and return its card.

    If one process runs out of memory, all stop and start again from the newest checkpoint with a smaller micro-batch.
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
            raise SteerbackError(f"training of {job.name} failed in {processes} processes; see their messages above")
        (job.out / MARK).unlink()
        say(f"{job.name}: out of memory at a micro-batch of {micro}")
    raise SteerbackError(f"{job.name}: out of memory with a single row per device; lower sequence_length")


def worker(task: Path) -> int:
    """Run the training as one of several processes and return the exit status."""
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
