"""Each row of the specification has a command in docs/experiments.md that the command line accepts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer.main

from steerback import cli
from steerback.config import specification
from steerback.experiments import REGISTRY
from steerback.store.facts import CONFIG
from steerback.store.ledger import Ledger

PAGE = Path(__file__).parents[1] / "docs" / "experiments.md"
ROWS = (
    *(f"experiment 1: {model}" for model in ("ESR, Llama-3.3-70B", "Llama-3.1-8B")),
    *(f"experiment 1: Gemma-2-{size}" for size in ("2B", "9B", "27B")),
    "experiment 2",
    *("experiment 3, phase 1", "experiment 3, phase 2"),
    *("experiment 4, step 1", "experiment 4, step 2", "experiment 4, step 3"),
    *(f"experiment {number}" for number in (5, 6, 7, 8)),
    *(
        "appendix: detector statistics",
        "appendix: episodes",
        "appendix: episode statistics",
        "appendix: random ablation",
    ),
    *("all plots", "verify the installation", "steering engine", "judge: rate limits", "relevance", "concreteness"),
    *("threshold finder: wider range", "seeds", "versions of model and SAE", "labels", "prompts, detectors"),
    *("result files, also compressed", "result files too large", "merge experiment runs"),
)
"""Beginnings of the rows: the specification's experiments, appendix, core infrastructure, remedies and data."""


def rows() -> dict[str, str]:
    """Step of the specification: command."""
    text = PAGE.read_text("utf-8").partition("## The specification, row by row")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][1:]
    return {step.strip(): command.strip().strip("`") for step, command in cells}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_specification_has_a_command(row: str) -> None:
    assert any(step.startswith(row) for step in rows()), f"{PAGE.name} has no command for: {row}"


def test_every_experiment_of_the_specification_is_run_by_one_of_them() -> None:
    of_the_paper = {"held-out", "prefill-control", "matched-prefix"}  # the paper's second version has them
    wanted = {name for name in REGISTRY if name not in of_the_paper | {"imported"}}
    used = {word for command in rows().values() for word in shlex.split(command)}
    assert wanted <= used


@pytest.mark.parametrize("step", rows())
def test_the_command_line_takes_each_command(step: str) -> None:
    """Names of verbs, options, choices and the number of arguments are right; nothing is done."""
    program, *words = shlex.split(rows()[step])
    assert program == "steerback"
    name, command = program, typer.main.get_command(cli.app)
    while verbs := getattr(command, "commands", None):
        name, *words = words
        command = verbs[name]
    command.make_context(name, words)


NOT_PLANNED = ("--engine vllm", "run finetuning")  # need vLLM, and adapters
PLANNED = [s for s, c in rows().items() if " run " in c and not any(part in c for part in NOT_PLANNED)]


@pytest.mark.parametrize("step", PLANNED)
def test_each_run_can_be_planned(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "runs" / "70b"
    base.mkdir(parents=True)
    config = specification("esr", ("llama-3.3-70b",)).model_copy(
        update={"judge": "sonnet-4.5", "engine": "transformers"}
    )
    with Ledger(base / "ledger.sqlite") as ledger:
        ledger.put("", CONFIG, config.model_dump(mode="json"))
    cli.app(args=[*shlex.split(rows()[step])[1:], "--dry-run"], standalone_mode=False)
    assert "at most" in capsys.readouterr().out
