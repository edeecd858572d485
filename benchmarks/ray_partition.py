"""Network partition: a run on a Ray cluster of two hosts loses nothing if they are disconnected for 20 seconds.

    sudo python benchmarks/ray_partition.py

Creates two network namespaces, starts Ray's head in one and a worker node in the other, runs
`esr` with a slowed scripted engine from the head, takes the link down in the middle of it, and compares the ledger with
that of a run on one machine. Needs root and iproute2. Writes benchmarks/results/ray_partition.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "ray_partition.json"
SPACES = {"steerback-a": "10.77.0.1", "steerback-b": "10.77.0.2"}
LINKS = {"steerback-a": "sbk-a", "steerback-b": "sbk-b"}
SECONDS = 20
SIZES = ("n_latents=6", "trials_per_latent=60", "reference_responses=1", "floor_responses=20", "draws=100",
         "calibration.max_iterations=4", "calibration.trials_per_iteration=10", "calibration.tolerance=45",
         "calibration.verify_trials=5", "selection.concreteness=off")  # fmt: skip


def sh(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, stdout=subprocess.DEVNULL)


def inside(space: str, command: str, **options: Any) -> subprocess.Popen[str]:
    # Each host has its own folder, as on real machines; tokens would have to be copied between them.
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        ["ip", "netns", "exec", space, *command.split()], env={**os.environ, **settings}, text=True, **options
    )


def connect() -> None:
    for space in SPACES:
        sh(f"ip netns add {space}")
    a, b = LINKS.values()
    sh(f"ip link add {a} type veth peer name {b}")
    for space, address in SPACES.items():
        sh(f"ip link set {LINKS[space]} netns {space}")
        sh(f"ip -n {space} addr add {address}/24 dev {LINKS[space]}")
        sh(f"ip -n {space} link set lo up")
        sh(f"ip -n {space} link set {LINKS[space]} up")


def ledger_of(folder: Path) -> dict[str, Any]:
    from steerback.store.ledger import Ledger

    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        tables = ledger.dump()
    return tables | {"facts": [row for row in tables["facts"] if row[1] != "config"]}


def drive(folder: str, engine: str) -> None:
    """Execute the run in this process, with Ray on the cluster or with the scripted engine alone."""
    from benchmarks.ray_engine import Paced
    from steerback.config import build_config
    from steerback.engines import make_engine
    from steerback.engines.options import RayOptions, ScriptedOptions
    from steerback.engines.scripted import PlantedModel
    from steerback.jobs import execute
    from steerback.jobs.check import Makers, check

    def maker(target: Any, options: Any) -> Any:
        if engine == "scripted":
            return make_engine(target, ScriptedOptions(script=Paced(0.0, PlantedModel(threshold=34.0))))
        slow = {
            "engine": "scripted",
            "workers": 2,
            "options": {"script": Paced(0.1, PlantedModel(threshold=34.0))},
            "address": "10.77.0.1:6379",
        }
        return make_engine(target, RayOptions.model_validate(slow))

    overrides = {"engine": "scripted", "judge": "scripted"}
    config = build_config("esr", ("organism",), "quick", overrides=overrides, assignments=SIZES)
    execute.run(check(config, Makers(engine=maker)), Path(folder))


def main() -> None:
    work = Path(tempfile.mkdtemp())
    here = f"{sys.executable} {__file__}"
    subprocess.run([*here.split(), "drive", str(work / "alone"), "scripted"], check=True)
    connect()
    try:
        ray = Path(sys.executable).with_name("ray")
        head, node = SPACES.values()
        start = f"{ray} start --disable-usage-stats --node-ip-address"
        inside("steerback-a", f"{start}={head} --head --port=6379 --num-cpus=0 --include-dashboard=false "
               f"--temp-dir={work / 's'}").wait()  # fmt: skip
        inside("steerback-b", f"{start}={node} --address={head}:6379 --num-cpus=2").wait()
        run = inside("steerback-a", f"{here} drive {work / 'ray'} ray", stderr=subprocess.PIPE)
        ledger = work / "ray" / "ledger.sqlite"
        while run.poll() is None and not (ledger.is_file() and len(ledger_of(work / "ray")["completions"]) > 60):
            time.sleep(1)
        done = len(ledger_of(work / "ray")["completions"])
        sh(f"ip -n steerback-a link set {LINKS['steerback-a']} down")
        time.sleep(SECONDS)
        sh(f"ip -n steerback-a link set {LINKS['steerback-a']} up")
        during = len(ledger_of(work / "ray")["completions"]) - done
        _, said = run.communicate(timeout=600)
    finally:
        for space in SPACES:
            sh(f"ip netns pids {space}", check=False)
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            sh(" ".join(["kill", "-9", *pids]), check=False) if pids else None
            sh(f"ip netns del {space}", check=False)
    equal = ledger_of(work / "ray") == ledger_of(work / "alone")
    measured = {
        "partition_seconds": SECONDS,
        "completions_before": done,
        "completions_during": during,
        "completions": len(ledger_of(work / "ray")["completions"]),
        "exit_code": run.returncode,
        "ledger_equal_to_one_machine": equal,
        "lines": list(dict.fromkeys(line for line in said.splitlines() if "worker" in line)),
        "command": "python benchmarks/ray_partition.py",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ray": version("ray")},
    }
    OUT.write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured, indent=1))
    if not equal:
        print(said[-3000:])


if __name__ == "__main__":
    drive(*sys.argv[2:]) if sys.argv[1:2] == ["drive"] else main()
