"""One of several processes that train an adapter together; started by `adapters.train_together` through accelerate."""

import sys
from pathlib import Path

from steerback.finetuning.adapters import worker

if __name__ == "__main__":
    sys.exit(worker(Path(sys.argv[1])))
