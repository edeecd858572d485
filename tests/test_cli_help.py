"""Help pages and listings: complete, at most 80 columns wide, and enough to find experiments, settings and runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from planted import Runs
from steerback.cli import app, main
from steerback.cli.help import TASKS
from steerback.config import PRESETS, RunConfig
from steerback.experiments import REGISTRY
from steerback.experiments.settings import experiment_rows, setting_rows

SMALL = ("n_latents=3", "trials_per_latent=4", "draws=100", "floor_responses=20")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def verbs(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*words, name)
        if hasattr(command, "commands"):
            yield from verbs(command, (*words, name))


@pytest.mark.parametrize("words", [(), *verbs(get_command(app))], ids=" ".join)
def test_every_help_page_fits_80_columns_and_explains_every_option(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    page = shown(capsys, *words, "-h")
    assert max(map(len, page.splitlines())) <= 80
    assert page == shown(capsys, *words, "--help")
    command = get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    for parameter in command.params:
        assert parameter.help, parameter.name  # type: ignore[attr-defined]
        assert "str" not in str(parameter.metavar)


def test_the_main_page_lists_every_verb_once_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [name for names in TASKS.values() for name in names]
    assert sorted(listed) == sorted(get_command(app).commands)  # type: ignore[attr-defined]
    page = shown(capsys, "--help")
    assert all(f"\n  {name} " in page for name in listed)


def test_run_lists_the_experiments_and_describes_one_with_all_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "run", "--help")
    assert all(f"\n  {name} " in page for name in REGISTRY)
    assert "sampling.temperature" in page
    page = shown(capsys, "run", "boost-sweep", "--help")
    for row in experiment_rows("boost-sweep"):
        assert f"  {row.key} = " in page
        assert row.meaning
    assert "  sampling.temperature = 0.6\n" in page
    assert max(map(len, page.splitlines())) <= 80
    assert page == shown(capsys, "settings", "boost-sweep")


def test_settings_show_what_a_preset_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  calibration.target_score = 50.0\n" in shown(capsys, "settings", "esr")
    assert "  calibration.target_score = 30.0\n" in shown(capsys, "settings", "esr", "--preset", "authors")
    page = shown(capsys, "settings")
    assert all(f"Settings of experiment {name}:" in page for name in REGISTRY)
    for preset in PRESETS:
        assert shown(capsys, "settings", "--preset", preset)


def test_every_setting_of_a_run_has_a_meaning() -> None:
    assert [row.key for row in setting_rows(RunConfig) if not row.meaning] == []


@pytest.mark.parametrize(
    ("words", "similar"),
    [
        (("shw", "x"), "Did you mean 'show'?"),
        (("run", "bost-sweep", "--target", "organism"), "did you mean boost-sweep?"),
        (("run", "esr", "--target", "organsim"), "did you mean organism?"),
        (("run", "esr", "--target", "organism", "--preset", "quik"), "did you mean quick?"),
        (("run", "esr", "--target", "organism", "--engine", "transformer"), "did you mean transformers?"),
        (("run", "esr", "--target", "organism", "--set", "temperature=1"), "did you mean sampling.temperature?"),
        (
            ("run", "esr", "--target", "organism", "--set", "calibration.trget_score=1"),
            "did you mean calibration.targ",
        ),
        (("run", "boost-sweep", "--target", "organism", "--set", "options.levelss=3"), "did you mean levels?"),
        (("settings", "esrr"), "did you mean esr?"),
        (("export", "x", "--format", "parqet"), "did you mean parquet?"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], similar: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    assert similar in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        made = Runs(tmp_path_factory.mktemp("runs"), patch)
        made.run("esr", *SMALL, name="first")
        made.run("meta-prompts", base="first", name="prompted")
        yield made


def test_runs_are_listed_with_state_and_rate(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    page = shown(capsys, "runs", "--runs", str(runs.root))
    assert max(map(len, page.splitlines())) <= 80
    (first,) = [line for line in page.splitlines() if line.startswith("first ")]
    assert "esr" in first
    assert "finished" in first
    assert "[" in first
    summary = runs.root / "prompted" / "summary.json"
    kept = summary.read_text()
    try:
        summary.unlink()
        assert "stopped, " in shown(capsys, "runs", "--runs", str(runs.root))
        summary.write_text("{")
        assert "unreadable" in shown(capsys, "runs", "--runs", str(runs.root))
    finally:
        summary.write_text(kept)


def test_a_misspelt_run_gets_a_suggestion(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "firstt", "--runs", str(runs.root)])
    assert "did you mean first?" in capsys.readouterr().err


def test_export_writes_the_file_that_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--runs", str(runs.root))
    shown(capsys, "export", "first", "--out", str(tmp_path / "demo.csv"), *where)
    assert (tmp_path / "demo.csv").read_text("utf-8").startswith("key,")
    shown(capsys, "export", "first", "--out", str(tmp_path / "demo.parquet"), *where)
    assert (tmp_path / "demo.parquet").read_bytes()[:4] == b"PAR1"
    assert sorted(os.listdir(tmp_path)) == ["demo.csv", "demo.parquet"]
    with pytest.raises(SystemExit):
        main(["export", "first", "--out", str(tmp_path / "demo.csv"), "--format", "parquet", *where])
    assert "is not a file of format parquet" in capsys.readouterr().err


def test_the_shell_completes_experiments_targets_and_runs(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    from steerback.cli import options

    assert options.experiment_names("detector-") == ["detector-ablation", "detector-statistics"]
    assert options.target_names("organism-c") == ["organism-control"]
    monkeypatch.chdir(runs.root.parent)
    monkeypatch.setattr(options, "RUNS", runs.root)
    assert options.run_names("f") == ["first"]
    command = get_command(app).commands["run"]  # type: ignore[attr-defined]
    context = command.make_context("run", ["esr"], resilient_parsing=True)
    (argument,) = [p for p in command.params if p.name == "experiments"]
    assert "boost-sweep" in [item.value for item in argument.shell_complete(context, "bo")]
