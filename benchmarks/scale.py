"""Seconds and peak memory of the verbs that read ledgers, for runs of 20,000, 100,000 and 200,000 judged trials.

    python benchmarks/scale.py [--sizes 20000,100000,200000] [--folder /tmp/steerback-scale]

Writes benchmarks/results/scale.json and deletes the ledgers (--keep leaves them). Wall time counts other jobs of the
machine, processor time (`cpu_s`) does not. Runs are made through the package's own pipeline: scripted
engine and judge, 200 latents, 5 conditions, responses of about 400 tokens with ids, verdicts with raw replies, scored
windows. Each verb runs in a separate process. Goal at 200,000 trials: at most 15 s and 1 GB each.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from steerback.config import build_config
from steerback.engines.scripted import RESTART, PlantedModel, ScriptedEngine
from steerback.errors import VERSION
from steerback.jobs import check, execute
from steerback.judging.base import JudgeItem
from steerback.judging.scripted import ScriptedJudge
from steerback.records import BoostPrior, Completion, Judgement, Receipt, Request, expected_positions
from steerback.store.ledger import Ledger
from steerback.targets import Target

OUT = Path(__file__).parent / "results" / "scale.json"
SIZES, LATENTS, CONDITIONS, NAME = (20_000, 100_000, 200_000), 200, 5, "planted"
CHOSEN = 237  # about 200 of them have a usable threshold and are measured
VERBS = {
    "show": ("show",),
    "figures": ("figures",),
    "export csv": ("export", "--format", "csv"),
    "export parquet": ("export", "--format", "parquet"),
    "export authors": ("export", "--format", "authors"),
    "view": ("view",),
    "resume": (),
}
WORDS = [
    a + b for a in ("sto", "re", "ma", "li", "pen", "fol", "ti", "gra") for b in ("ne", "ping", "ding", "lets", "s")
]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(10, 20))).capitalize() + "."


SENTENCES = [sentence(random.Random(n)) for n in range(2000)]


@dataclass(frozen=True)
class Talkative(PlantedModel):
    """Planted model with about 20 further sentences in each response."""

    def __call__(self, request: Request) -> Completion:  # type: ignore[override]
        rng = random.Random(request.seed)
        first, mark, second = super().__call__(request).partition(RESTART)
        more = [" ".join(rng.choices(SENTENCES, k=rng.randint(6, 14))) for _ in range(2)]
        text = f"{first} {more[0]} {mark}{second} {more[1]}"
        tokens = tuple(rng.choices(range(128_000), k=len(text) // 5))
        touched = expected_positions(request.interventions, 40, len(tokens))
        return Completion(text, tokens, 40, "stop", Receipt(*touched, 10.0 if sum(touched) else 0.0))


class Raw(ScriptedJudge):
    """Scripted judge with a reply in the format of a language model."""

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        async for key, verdict in super().judge(items):
            raw = [
                {"score": a.score, "first_words": "of the attempt " * 5, "reasoning": "because " * 25}
                for a in verdict.attempts
            ]
            yield key, replace(verdict, raw=json.dumps({"attempts": raw}))


class Engine(ScriptedEngine):
    """Scripted engine that computes its fingerprint only once."""

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return super().fingerprint


class Labelled(Target):
    """A target without files."""

    def labels(self) -> dict[int, str]:
        return {k: f"concrete thing {k}" for k in range(self.n_latents)}


def makers() -> check.Makers:
    script = Talkative(thresholds={k: 10 + (k * 37 % 64) / 16 for k in range(1024)})
    return check.Makers(
        judge=lambda name: Raw(),
        engine=lambda target, options: Engine(script, target=target.name),
        target=lambda name, own: Labelled(name, "nowhere", 1, 1, BoostPrior(10, 5, 0, 40), n_latents=1024),
    )


def work(folder: Path, trials: int) -> None:
    """Create or resume the run with the given number of measured trials."""
    settings = (
        f"n_latents={CHOSEN}",
        f"trials_per_latent={trials // LATENTS // CONDITIONS}",
        "options.variants=stay-on-topic,dont-get-distracted,being-distracted,self-monitor",
        "calibration.max_iterations=4",
        "calibration.trials_per_iteration=3",
        "calibration.verify_trials=2",
    )
    chosen = {"engine": "scripted", "judge": "scripted"}
    config = build_config("meta-prompts", (NAME,), "specification", overrides=chosen, assignments=settings)
    execute.run(check.check(config, makers()), folder)


def timed(command: Sequence[str]) -> dict[str, float]:
    """Return wall and processor seconds and the peak memory of a command's process."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"})
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {status}")
    peak = used.ru_maxrss / 2**20
    return {"s": round(seconds, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_gib": round(peak, 2)}


def measured(root: Path, trials: int) -> dict[str, object]:
    """Create a run and return time and memory of each verb."""
    folder = root / f"scale-{trials}"
    again = [sys.executable, __file__, "--work", str(folder), "--sizes", str(trials)]
    result: dict[str, object] = {}
    if not folder.exists():
        result["made"] = timed(again)
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        result["trials by stage"] = ledger.stage_sizes()  # latents without a usable threshold are not measured
    result["ledger_gb"] = round((folder / "ledger.sqlite").stat().st_size / 1e9, 3)
    for verb, words in VERBS.items():
        command = [sys.executable, "-m", "steerback", *words[:1], folder.name, "--runs", str(root), *words[1:]]
        result[verb] = timed(command if words else again)
        print(f"{trials:,} {verb}: {result[verb]}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=SIZES)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/steerback-scale"))
    parser.add_argument("--keep", action="store_true", help="leave the ledgers, for another measurement")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work is not None:
        work(chosen.work, chosen.sizes[0])
        return
    results: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name}",
        "versions": {"python": platform.python_version(), "steerback": VERSION}
        | {name: version(name) for name in ("numpy", "pandas", "pyarrow")},
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "load average at the start": [round(x, 1) for x in os.getloadavg()],
    }
    for trials in chosen.sizes:
        results[f"{trials} trials"] = measured(chosen.folder, trials)
        if not chosen.keep:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(chosen.folder / f"scale-{trials}")
        OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(OUT.read_text())


if __name__ == "__main__":
    main()
