"""Draw the figures of docs/study.md from finished runs.

    python figures.py OUT IMAGES

OUT is the folder of run.sh. IMAGES gets study-time-course.png, study-scale.png and study-finetuning.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steerback.api import StudyRun, open_run
from steerback.figures import esr
from steerback.metrics import Outcomes, Summary


def main(out: Path, images: Path) -> None:
    """Draw them."""
    first, small, tuned = (open_run(out / "runs" / name) for name in ("paper-esr", "small", "finetuning"))
    figures = {
        "time-course": first.figure("time_course"),
        "scale": esr.draw({"Qwen2.5-Coder-0.5B": rates(small), "Qwen2.5-Coder-1.5B": rates(first)}, first.judge),
        "finetuning": tuned.figure("figure6"),
    }
    for name, figure in figures.items():
        figure.savefig(images / f"study-{name}.png", dpi=200)


def rates(run: StudyRun) -> tuple[Outcomes, Summary]:
    """Return the steered outcomes of a run of one target, and their summary."""
    conditions = run.analysis.results.measured
    ((key, summary),) = ((k, s) for k, s in conditions.summaries.items() if k[1] == "steered")
    return conditions.outcomes[key], summary


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
