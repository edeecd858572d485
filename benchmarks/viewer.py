"""Viewer of a run with 5,000 judged trials: file size, seconds to write it, and display times in Chromium.

    python benchmarks/viewer.py

Writes benchmarks/results/viewer.json. The run is made through the package's own ledger: 20 latents, 50 trials each,
5 conditions, responses of about 250 words, two judges with raw replies, activations of 30 latents along 600 of the
responses. Goals: at most 25 MB, first paint within 1 s.
"""

from __future__ import annotations

import json
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from steerback.config import RunConfig
from steerback.data.prompts import load_prompts
from steerback.errors import VERSION
from steerback.jobs.view import write_view
from steerback.records import Attempt, Completion, Intervention, Judgement, Receipt, Recording, Trial
from steerback.store.facts import TOKEN_ENDS
from steerback.store.run import Run

OUT = Path(__file__).parent / "results" / "viewer.json"
CHROMIUM = "/usr/bin/chromium"
CONDITIONS = ("baseline", "ablated", "random 1", "random 2", "unsteered")
LATENTS, PER_LATENT, RECORDED, WIDTH = 20, 50, 600, 30
VOCABULARY = [
    f"{a}{b}"
    for a in ("sto", "re", "ma", "li", "pen", "fol", "ti", "gra")
    for b in ("ne", "ping", "ding", "lets", "ra", "s")
]
PHRASE = "Wait, that is not what was asked."
PROMPTS = load_prompts("evaluation")
TARGET = "model"


def response(rng: random.Random) -> tuple[str, int | None]:
    """Return a text of about 250 words and the character at which its restart begins, if it has one."""
    words = [rng.choice(VOCABULARY) + str(rng.randrange(40)) for _ in range(rng.randint(200, 300))]
    if rng.random() > 0.3:
        return " ".join(words), None
    first = " ".join(words[:90]) + ". "
    return first + PHRASE + " " + " ".join(words[90:]), len(first)


def judgement(judge: str, text: str, restart: int | None, rng: random.Random) -> Judgement:
    attempts = (Attempt(0, len(text), rng.uniform(0, 100)),)
    if restart is not None:
        first = Attempt(0, restart, rng.uniform(0, 60))
        attempts = (first, Attempt(restart, len(text), rng.uniform(30, 100), PHRASE))
    raw = json.dumps({"attempts": [{"score": a.score, "first words": text[a.start : a.start + 60]} for a in attempts]})
    return Judgement(judge, "attempts-1", "scored", attempts, "", raw)


def planned() -> Iterator[Trial]:
    for condition in CONDITIONS:
        for i in range(LATENTS * PER_LATENT):
            latent = i // PER_LATENT
            edits = () if condition == "unsteered" else (Intervention("add", latent, 30.0 + latent),)
            yield Trial(
                f"{TARGET}/measure/{condition}/{i}",
                TARGET,
                "measure",
                condition,
                i,
                PROMPTS[i % len(PROMPTS)],
                44 + i,
                latent,
                f"topic {latent}",
                interventions=edits,
                record=Recording(tuple(range(WIDTH))) if i < RECORDED // len(CONDITIONS) else None,
            )


def fill(run: Run) -> None:
    """Write all trials, responses and verdicts into the run."""
    rng, generator = random.Random(0), np.random.default_rng(0)
    ends: dict[str, list[int]] = {}
    for trial in planned():
        text, restart = response(rng)
        ids = tuple(range(len(text) // 4))
        steps = [min(4 * (n + 1), len(text)) for n in range(len(ids))]
        fed = len(ids) - 1
        values = None
        if trial.record is not None:
            values = generator.exponential(4.0, (20 + fed, WIDTH)) * (generator.random((20 + fed, WIDTH)) < 0.15)
            ends[trial.key] = steps
        receipt = Receipt(20, fed, 30.0) if trial.interventions else Receipt()
        done = Completion(text, ids, 20, "stop", receipt, None if values is None else values.astype(np.float32))
        run.ledger.add_trials([trial])
        run.ledger.add_completions([(trial.key, done, "engine")])
        run.ledger.add_judgements((trial.key, judgement(name, text, restart, rng)) for name in ("machine", "critic"))
    run.ledger.put(TARGET, TOKEN_ENDS, ends)


PAINT = """async () => {
    for (;;) {
        const [entry] = performance.getEntriesByName("first-contentful-paint");
        if (entry) return entry.startTime;
        await new Promise(requestAnimationFrame);
    }
}"""
TIMED = """async () => {
    const begin = performance.now();
    ACTION;
    while (!(DONE)) await new Promise(requestAnimationFrame);
    return performance.now() - begin;
}"""


def measured(address: str, loads: int = 7) -> dict[str, object]:
    """Return milliseconds to first paint, to a filtered table, to an open trial and to a search of all responses."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(loads):
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(address)
            note("first contentful paint", page.evaluate(PAINT))
            note("page loaded", page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
            for name, action, done in (
                ("table of trials", "location.hash = '#trials'", "document.querySelectorAll('#body tr').length > 5"),
                (
                    "search of all responses",
                    "document.getElementById('search').value = 'stone7 ';"
                    "document.getElementById('search').dispatchEvent(new Event('input'))",
                    "/^[\\d,]+ of/.test(document.getElementById('shown').textContent)",
                ),
                (
                    "open a recorded trial",
                    f"location.hash = '#trial={TARGET}/measure/baseline/3'",
                    "document.querySelectorAll('#beside .card').length === 5",
                ),
            ):
                note(name, page.evaluate(TIMED.replace("ACTION", action).replace("DONE", done)))
            page.close()
        browser_version = browser.version
        browser.close()
    return {
        "chromium": browser_version,
        "loads": loads,
        "milliseconds": {
            name: {"median": round(statistics.median(values)), "most": round(max(values))}
            for name, values in times.items()
        },
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        config = RunConfig(experiment="imported", targets=(TARGET,), judge="machine", engine="scripted", draws=500)
        with Run.start(place, config) as run:
            fill(run)
        begin = time.perf_counter()
        page = write_view([place], Path(folder) / "view.html")
        seconds = time.perf_counter() - begin
        results = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"python benchmarks/{Path(sys.argv[0]).name}",
            "versions": {
                "python": platform.python_version(),
                "steerback": VERSION,
                "playwright": version("playwright"),
            },
            "machine": platform.platform(),
            "trials": LATENTS * PER_LATENT * len(CONDITIONS),
            "recorded": RECORDED,
            "ledger_mb": round((place / "ledger.sqlite").stat().st_size / 1e6, 1),
            "file_mb": round(page.stat().st_size / 1e6, 1),
            "write_s": round(seconds, 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            **measured(page.as_uri()),
        }
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
