"""Import of a 1 GB result file in the authors' format: seconds and peak memory.

    python benchmarks/import_memory.py [--gb 1] [--folder /tmp]

Writes benchmarks/results/import_memory.json and deletes the file and the run. The file has 500 latents and responses of
about 400 words, one in eight with a second attempt; it is also read packed by gzip.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scale import SENTENCES, timed

from steerback.errors import VERSION

OUT = Path(__file__).parent / "results" / "import_memory.json"
LATENTS, PROMPTS = 500, 38
CONFIG = {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "judge_model_name": "claude-haiku-4-5-20251001"}


def trial(rng: random.Random, latent: int) -> dict[str, object]:
    """Return one response with its verdict."""
    parts = [" ".join(rng.choices(SENTENCES, k=rng.randint(10, 15))) for _ in range(2 if rng.random() < 1 / 8 else 1)]
    return {
        "prompt": f"Explain how to do thing {rng.randrange(PROMPTS)}.",
        "feature_index_in_sae": latent,
        "feature_label": f"concrete thing {latent}",
        "threshold": 8.5,
        "seed": rng.randrange(2**31),
        "response": " Wait, that's not right. ".join(parts),
        "score": {"attempts": [{"attempt_text": part, "score": rng.randint(0, 100)} for part in parts]},
        "error": None,
    }


def features(size: int) -> Iterator[str]:
    """Yield the JSON of each latent, `size` bytes in total."""
    for latent in range(LATENTS):
        rng, trials, length = random.Random(latent), list[str](), 0
        while length < size / LATENTS:
            trials.append(json.dumps(trial(rng, latent)))
            length += len(trials[-1])
        named = {"feature_index_in_sae": latent, "feature_label": f"concrete thing {latent}", "threshold": 8.5}
        yield f'{json.dumps(named)[:-1]}, "error": null, "trials": [{", ".join(trials)}]}}'


def write(path: Path, size: int) -> None:
    with path.open("w") as file:
        file.write(f'{{"experiment_config": {json.dumps(CONFIG)}, "results_by_feature": [')
        for number, text in enumerate(features(size)):
            file.write((", " if number else "") + text)
        file.write("]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        plain = Path(folder) / "experiment_results.json"
        write(plain, int(chosen.gb * 1e9))
        packed = plain.with_name(plain.name + ".gz")
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
            shutil.copyfileobj(source, target, 2**20)
        results: dict[str, object] = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python benchmarks/{Path(sys.argv[0]).name} --gb {chosen.gb:g}",
            "versions": {"python": platform.python_version(), "steerback": VERSION}
            | {name: version(name) for name in ("ijson", "numpy", "pandas")},
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        }
        for path in (plain, packed):
            command = [sys.executable, "-m", "steerback", "import", str(path), "--name", "it", "--runs", folder]
            size = round(path.stat().st_size / 1e9, 3)
            results[path.suffix.removeprefix(".")] = {"file_gb": size, **timed(command)}
            print(path.name, results[path.suffix.removeprefix(".")], flush=True)
            shutil.rmtree(Path(folder) / "it")
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
