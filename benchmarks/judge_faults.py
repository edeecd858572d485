"""Robustness of LLM judges: 10,000 responses over HTTP with 5 % of each fault. Each must end in exactly one state.

    python benchmarks/judge_faults.py [n] [protocol ...]

A local server replaces the provider; the client library is the real one. Writes benchmarks/results/judge_faults.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from fake_judges import FAULTS, RESTART, FakeJudge  # noqa: E402
from steerback.judging import JudgeItem, Limits, make_judge  # noqa: E402
from steerback.records import Judgement  # noqa: E402

PROTOCOLS = {
    "openrouter": ("openrouter/qwen/qwen3-32b", "/v1"),
    "anthropic": ("anthropic/claude-sonnet-4-5-20250929", ""),
    "google": ("google/gemini-2.5-flash", ""),
}
KEYS = ("OPENROUTER_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY")


def mixed(response: str, before: int) -> str:
    """Return the faults: 5 % of each kind. Half of the transport faults succeed on a retry, the other half never do."""
    place = zlib.crc32(response.encode()) % 200
    if place >= 10 * len(FAULTS):
        return ""
    fault = FAULTS[place // 10]
    passing = fault in ("429", "500", "timeout", "truncated") and place % 10 >= 5
    return "" if passing and before else fault


def measure(protocol: str, n: int) -> dict[str, Any]:
    model, suffix = PROTOCOLS[protocol]
    items = [
        JudgeItem(f"k{i}", "How do you fry an egg?", f"Item {i} flows. {RESTART} Put oil {i} in the pan.", "lava")
        for i in range(n)
    ]
    with FakeJudge(mixed, stall=8.0) as server:
        server.keep_requests = False
        judge = make_judge(
            model, Limits(first_wait=0.05, attempt_timeout=5, max_retries=1), base_url=server.url + suffix
        )

        async def collect() -> list[tuple[str, Judgement]]:
            return [pair async for pair in judge.judge(items)]

        start = time.perf_counter()
        verdicts = asyncio.run(collect())
        spent = time.perf_counter() - start
        twice = sum(count > 1 for response, count in server.asked.items() if not mixed(response, 0))
    states = Counter(v.status for _, v in verdicts)
    reasons = Counter(v.reason.split(":")[0] for _, v in verdicts if v.reason)
    wrong = [v.reason for k, v in verdicts if not mixed(items[int(k[1:])].response, 0) and v.status != "scored"]
    return {
        "trials": n,
        "returned once": len({k for k, _ in verdicts}) == len(verdicts) == n,
        "states": dict(states),
        "reasons": dict(reasons),
        "sound ones not scored": len(wrong),
        "why": dict(Counter(w[:80] for w in wrong)),
        "sound ones asked twice": twice,
        "requests": sum(server.asked.values()),
        "trials/s": round(n / spent, 1),
        "seconds": round(spent, 1),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main(n: int, protocols: list[str]) -> None:
    for name in KEYS:
        os.environ.setdefault(name, "sk-local-test-key")
    target = ROOT / "benchmarks" / "results" / "judge_faults.json"
    result = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for protocol in protocols:
        made = {
            "command": f"python benchmarks/judge_faults.py {n} {protocol}",
            "date": datetime.now(UTC).date().isoformat(),
            "inspect_ai": version("inspect_ai"),
            "load average before": round(os.getloadavg()[0], 1),
        }
        result[protocol] = measure(protocol, n) | made
        print(protocol, json.dumps(result[protocol], indent=1), flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    count = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 10_000
    main(count, arguments or ["openrouter"])
