"""SAE training for a real model on a GPU: the user's command, a sweep of its settings, labels for human review.

    python benchmarks/sae_train_gpu.py MODEL.gguf --out OUT [--budget SECONDS] [--stages train,sweep] [-- OPTIONS]

OPTIONS go to `steerback sae train`. Needs no network. Each stage writes its JSON into OUT as soon as it has numbers, so
that its results remain if a later stage fails or the time limit is reached. Stages:

    train   `steerback sae train MODEL` as a user would, timed from start to end; 100 labels drawn at random, each
            with the passages in which its latent peaks, for a reader to judge (labels.json, without judgement)
    sweep   the same texts and activations: kinds, numbers of latents, k, passes
    layers  explained variance by layer
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SWEEP: list[dict[str, Any]] = [
    {"k": 96},
    {"k": 64, "learning_rate": 8e-4},
    {"k": 64, "kind": "topk"},
    {"k": 128},
    {"k": 64, "latents": 8_192},
    {"k": 64, "passes": 4},
    {"k": 64, "passes": 16},
    {"k": 48},
    {"k": 96, "latents": 32_768},
]
LAYERS = (0.35, 0.45, 0.55, 0.6, 0.7, 0.8, 0.9)
NAME = "measured"


def main() -> None:
    """Run the stages."""
    own = sys.argv[1:]
    given = own[own.index("--") + 1 :] if "--" in own else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing new is begun")
    parser.add_argument("--stages", default="train,sweep,layers")
    parser.add_argument("--first", type=int, default=0, help="number of the first setting of the sweep")
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for stage in options.stages.split(","):
        print(f"== {stage} at {time.monotonic() - began:.0f} s", flush=True)
        try:
            if stage == "train":
                train(options.model, options.out, given)
            else:
                more(stage, options.model, options.out, options.first, began + options.budget)
        except Exception as error:  # noqa: BLE001 (the other stages are still to be run)
            print(f"{stage} failed: {type(error).__name__}: {error}", flush=True)
    print(f"== done at {time.monotonic() - began:.0f} s", flush=True)


def about() -> dict[str, Any]:
    """Return machine, versions, date and command."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def folder() -> Path:
    """Return the folder of the training."""
    from steerback.targets.registry import trained_folder

    return trained_folder(NAME)


def train(model: Path, out: Path, given: list[str]) -> None:
    """Run the user's command and copy its output files."""
    command = [sys.executable, "-m", "steerback", "sae", "train", str(model), "--name", NAME, *given]
    began = time.monotonic()
    with (out / "train.log").open("w", encoding="utf-8") as log:
        running = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )
        assert running.stdout is not None
        for line in running.stdout:
            stamped = f"{time.monotonic() - began:6.1f}  {line}"
            print(stamped, end="", flush=True)
            log.write(stamped)
            log.flush()
        code = running.wait()
    seconds = time.monotonic() - began
    where = folder()
    facts: dict[str, Any] = {}
    if (where / "training.json").is_file():
        facts = json.loads((where / "training.json").read_text(encoding="utf-8"))
        shutil.copy(where / "report.html", out / "report.html")
        labels(where, out)
    body = {**about(), "exit code": code, "seconds in all": round(seconds, 1), "training": facts}
    (out / "sae_train.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def labels(where: Path, out: Path, n: int = 100) -> None:
    """Draw labels at random, with the passages in which their latents peak."""
    with (where / "labels.csv").open(encoding="utf-8", newline="") as file:
        known = {int(row["index"]): row["label"] for row in csv.DictReader(file)}
    contexts = json.loads((where / "contexts.json").read_text(encoding="utf-8"))
    drawn = sorted(random.Random(44).sample(sorted(known), min(n, len(known))))
    rows = [{"latent": k, "label": known[k], "contexts": contexts.get(str(k), [])[:4]} for k in drawn]
    body = {"seed": 44, "labels": len(known), "drawn": rows}
    (out / "labels.json").write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copy(where / "labels.csv", out / "all_labels.csv")


def more(stage: str, model: Path, out: Path, first: int, until: float) -> None:
    """Train further SAEs on the texts of the stage `train`, until the time limit."""
    from steerback.jobs.doctor import without_directions
    from steerback.jobs.sae_training import Learner, SaeJob, load_model, write_corpus
    from steerback.readers import read_json_table
    from steerback.targets import resolve

    job = SaeJob.model_validate(read_json_table(folder() / "job.json", "training"), strict=False)
    base = without_directions(resolve(str(model)))
    loaded = load_model(base, "transformers", None, None)
    texts = write_corpus(job, base, folder() / "corpus.jsonl", loaded)
    path = out / f"sae_{stage}.json"
    rows: list[dict[str, Any]] = []
    try:
        n = len(loaded.engine.runner.decoder.layers)  # type: ignore[attr-defined]
        depths = sorted({round(share * n) for share in LAYERS}) if stage == "layers" else ()
        if stage == "layers":
            job = job.model_copy(update={"layers": tuple(depths), "passes": 3})
        learner = Learner(loaded.engine, job, texts, None, lambda line: print(line, flush=True))
        for changes in [{}] if stage == "layers" else SWEEP[first:]:
            if time.monotonic() > until:
                print("no time left", flush=True)
                break
            passes = changes.get("passes", job.passes)
            training = {k: v for k, v in changes.items() if k != "passes"}
            learner.job = job.model_copy(
                update={"passes": passes, "training": job.training.model_copy(update=training)}
            )
            learner.steps = learner.stream.steps(learner.batch, passes)
            began = time.monotonic()
            trainers = learner.train(None)
            seconds = round(time.monotonic() - began, 1)
            for trainer in trainers.values():
                row = {**changes, **learner.measure(trainer).to_json(), "seconds": seconds}
                rows.append(row)
                print(json.dumps(row), flush=True)
            body = {**about(), "texts": len(texts), "positions": learner.stream.positions, "rows": rows}
            path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    finally:
        loaded.close()


if __name__ == "__main__":
    main()
