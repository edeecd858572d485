"""The plan of the whole paper, campaigns of several runs, and the verbs about results."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planted import SIZES, Runs, thresholds
from planted_detectors import MODEL
from steerback import cli
from steerback.config import RunConfig, build_config, quick
from steerback.engines import EngineOptions
from steerback.engines.base import Engine, EngineStopped
from steerback.engines.options import VllmOptions
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.experiments import conditions, paper
from steerback.jobs import campaign, side_by_side
from steerback.jobs.check import Makers
from steerback.store.run import Run
from steerback.targets import Target

SMALL = ("n_latents=4", "trials_per_latent=5")


def test_the_plan_is_in_dependency_order() -> None:
    steps = paper.plan(quick("esr", ("organism",)), Path("runs"), "p")
    folders = [step.folder for step in steps]
    assert folders[0].name == "p-esr"
    for step in steps:
        assert step.after is None or folders.index(step.after) < folders.index(step.folder)
        assert step.config.from_run == (None if step.after is None else str(step.after))
        assert step.config.n_latents == 12
    assert {s.config.experiment for s in steps} == {name for name, _ in paper.STEPS}


def test_steps_have_options_of_their_own() -> None:
    common, options = paper.own_options(["n_latents=3", "boost-sweep.high=6", "sampling.top_p=0.9"])
    assert common == ["n_latents=3", "sampling.top_p=0.9"]
    steps = {s.config.experiment: s.config for s in paper.plan(quick("esr", ("o",)), Path("r"), "p", options=options)}
    assert steps["boost-sweep"].options == {"high": 6}
    assert steps["meta-prompts"].options == {}


def test_only_and_skip_follow_dependencies() -> None:
    def names(**choice: Any) -> list[str]:
        return [s.config.experiment for s in paper.plan(quick("esr", ("organism",)), Path("r"), "p", **choice)]

    assert names(only=["detector-ablation"]) == ["esr", "detectors", "detector-ablation"]
    left = names(skip=["detectors"])
    assert "detectors" not in left
    assert "random-ablation" not in left
    assert "boost-sweep" in left
    with pytest.raises(SteerbackError, match="unknown experiment of the paper 'nonsense'"):
        names(only=["nonsense"])
    with pytest.raises(SteerbackError, match="starts with esr"):
        names(skip=["esr"])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    model = PlantedModel(thresholds=thresholds(), restart_rate=0.3)
    return Runs(tmp_path / "runs", monkeypatch, model)


def verb(*arguments: str) -> None:
    cli.app(args=list(arguments), standalone_mode=False)


def steps_of(runs: Runs, *only: str) -> list[paper.Step]:
    return paper.plan(campaign.resolved(first_of("planted"), runs.makers), runs.root, "p", only)


def test_a_paper_is_run_resumed_compared_and_drawn(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    steps = steps_of(runs, "no-steering", "boost-sweep")
    lines = campaign.plan_lines(steps, runs.makers)
    assert len(lines) == len(steps) + 1
    assert "at most" in lines[-1]
    (searched,) = [
        x for x in campaign.plan_lines(steps_of(runs, "detectors"), runs.makers) if x.startswith("p-detectors")
    ]
    assert "at most 500 responses" in searched  # the references are in the cache by then, the discovery is not
    said: list[str] = []
    assert campaign.run(steps, cached=False, say=said.append, makers=runs.makers) == {}
    assert all(campaign.is_done(step) for step in steps)
    again: list[str] = []
    campaign.run(steps, cached=False, say=again.append, makers=runs.makers)
    assert again == [f"[{n}/3] {s.folder.name}: done before" for n, s in enumerate(steps, 1)]
    runs.draw = True
    drawn = campaign.draw_all([s.folder for s in steps], runs.root / "all")
    names = {p.name for p in drawn}
    assert {"figure2.png", "figure3.pdf", "figureA7.png", "figureA8.png"} <= names
    verb("compare", "--runs", str(runs.root), "--out", str(runs.root / "cmp"))
    shown = capsys.readouterr().out
    assert "not measured" in shown
    assert (runs.root / "cmp" / "compare.md").read_text().startswith("| quantity |")


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_that_fails_stops_only_what_needs_it(runs: Runs, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(side_by_side, "possible", lambda _: shared)
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 2)
    steps = steps_of(runs, "no-steering", "detector-ablation")
    from steerback.experiments.detectors import DetectorExperiment

    async def refuse(self: Any, study: Any) -> None:
        raise SteerbackError("no discovery prompts")

    monkeypatch.setattr(DetectorExperiment, "run", refuse)
    said: list[str] = []
    failed = campaign.run(steps, cached=False, say=said.append, makers=runs.makers)
    assert "[4/4] p-detector-ablation: not done: needs p-detectors" in said or not shared
    assert {folder.name: why for folder, why in failed.items()} == {
        "p-detectors": "no discovery prompts",
        "p-detector-ablation": "needs p-detectors",
    }
    assert campaign.is_done(steps[1])


def first_of(*targets: str) -> RunConfig:
    """The config of a small campaign's first run on the scripted engine."""
    return build_config(
        "esr",
        targets,
        "quick",
        overrides={"engine": "scripted", "judge": "scripted"},
        assignments=(*SIZES, *SMALL, "draws=100"),
    )


def counted(runs: Runs, log: list[str]) -> Makers:
    """The makers of `runs`, with a line in `log` for each engine that starts or is closed."""
    make = runs.makers.engine

    def started(target: Target, options: EngineOptions) -> Engine:
        engine = make(target, options)
        log.append(f"start {target.name}")
        engine.close = lambda: log.append(f"close {target.name}")  # type: ignore[method-assign]
        return engine

    return replace(runs.makers, engine=started)


def test_a_campaign_of_all_experiments_starts_one_engine(runs: Runs) -> None:
    runs.scripts["planted"] = MODEL
    log: list[str] = []
    makers = counted(runs, log)
    few = {"detectors": ["responses=60"], "random-ablation": ["sets=2"], "boost-sweep": ["levels=3"]}
    steps = paper.plan(campaign.resolved(first_of("planted"), makers), runs.root, "p", options=few)
    assert campaign.run(steps, cached=False, say=lambda _: None, makers=makers) == {}
    assert len(steps) == len(paper.STEPS)
    assert all(campaign.is_done(step) for step in steps)
    assert log == ["start planted", "close planted"]
    campaign.run(paper.stored_steps([s.folder for s in steps]), cached=False, say=lambda _: None, makers=makers)
    assert len(log) == 2  # nothing is left to do


@pytest.mark.parametrize(("error", "starts"), [(SteerbackError, 1), (EngineStopped, 2)])
def test_a_refused_step_keeps_the_engine_and_a_stopped_one_is_started_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, error: type[SteerbackError], starts: int
) -> None:
    async def refuse(self: Any, study: Any) -> None:
        raise error("no further")

    monkeypatch.setattr(conditions.NoSteering, "run", refuse)
    log: list[str] = []
    steps = steps_of(runs, "no-steering", "boost-sweep")
    failed = campaign.run(steps, cached=False, say=lambda _: None, makers=counted(runs, log))
    assert [folder.name for folder in failed] == ["p-no-steering"]
    assert log == ["start planted", "close planted"] * starts


def test_steps_overlap_only_on_one_engine_of_vllm(runs: Runs, tmp_path: Path) -> None:
    jobs = [campaign._valid(step, runs.makers) for step in steps_of(runs, "no-steering", "boost-sweep")]
    assert not campaign.can_overlap(jobs)  # the scripted engine
    one, two, three = (replace(job, engine=VllmOptions()) for job in jobs if job is not None)
    assert campaign.can_overlap([one, two, three])
    assert not campaign.can_overlap([one])
    assert not campaign.can_overlap([one, None])
    assert not campaign.can_overlap([one, two, replace(three, engine=VllmOptions(replicas=2))])
    adapted = replace(three, targets=(*three.targets, three.targets[0].with_adapter(tmp_path)))
    assert not campaign.can_overlap([one, two, adapted])


def test_steps_that_overlap_give_the_results_of_steps_in_order(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on vLLM: three steps work at the same time, also one that only judges, and another process analyses them."""
    together = most = 0
    measure = campaign.execute.measure

    async def watched(job: Any, *rest: Any) -> None:
        nonlocal together, most
        together += 1
        most = max(most, together)
        await measure(job, *rest)
        together -= 1

    monkeypatch.setattr(campaign.execute, "measure", watched)
    summaries, trials = [], []
    for place, overlap in (("one", False), ("two", True)):
        monkeypatch.setattr(campaign, "can_overlap", lambda _, overlap=overlap: overlap)
        steps = paper.plan(
            campaign.resolved(first_of("planted"), runs.makers),
            runs.root / place,
            "p",
            ["no-steering", "prefill-control", "cross-judge"],
        )
        said: list[str] = []
        most = 0
        assert campaign.run(steps, cached=False, say=said.append, makers=runs.makers) == {}
        assert most == (3 if overlap else 1)
        heads = [f"[{n}/4] {s.folder.name}" for n, s in enumerate(steps, 1)]
        assert sorted(line for line in said if line.startswith("[")) == heads
        summaries.append([json.loads((s.folder / "summary.json").read_text()) for s in steps])
        for step in steps:
            with Run.read(step.folder) as run:
                trials.append(
                    sorted((r.trial.key, str(r.completion), str(r.attempts)) for r in run.ledger.rows(judge="scripted"))
                )
    assert summaries[0] == summaries[1]
    assert trials[:4] == trials[4:]


def test_built_in_models_are_measured_side_by_side() -> None:
    """A check that imports torch would prevent it, because a process with torch cannot fork."""
    code = (
        "from steerback.config import build_config\nfrom steerback.jobs import campaign, check, side_by_side\n"
        "job = check.check(build_config('esr', ('organism', 'organism-control'), 'quick'))\n"
        "side_by_side.os.cpu_count = lambda: 2\nassert side_by_side.possible(job)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_side_by_side_the_longest_chain_of_steps_starts_first(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def each(steps: Sequence[paper.Step], *_: object) -> Iterator[Any]:
        started.extend(step.config.experiment for step in steps)
        return iter(())

    monkeypatch.setattr(side_by_side, "possible", lambda _: True)
    monkeypatch.setattr(side_by_side, "each", each)
    first = campaign.resolved(first_of("planted"), runs.makers)
    steps = paper.plan(first, runs.root, "p", options={"random-ablation": ["sets=19"], "boost-sweep": ["levels=9"]})
    campaign.run(steps, cached=False, say=lambda _: None, makers=runs.makers)
    assert sorted(started) == sorted(step.config.experiment for step in steps)
    assert started[:2] == ["esr", "detectors"]
    for earlier, later in (("boost-sweep", "meta-prompts"), ("random-ablation", "detector-ablation")):
        assert started.index(earlier) < started.index(later)


def test_a_campaign_on_two_targets_holds_one_engine_at_a_time(runs: Runs) -> None:
    runs.scripts["other"] = runs.scripts["planted"]
    log: list[str] = []
    makers = counted(runs, log)
    steps = paper.plan(campaign.resolved(first_of("planted", "other"), makers), runs.root, "p", only=["no-steering"])
    assert campaign.run(steps, cached=False, say=lambda _: None, makers=makers) == {}
    assert log == ["start planted", "close planted", "start other", "close other"]
    for step in steps:
        summary = json.loads((step.folder / "summary.json").read_text())
        assert {*summary["targets"]} == {"planted", "other"}
        manifest = json.loads((step.folder / "manifest.json").read_text())
        assert {*manifest["targets"]} == {"planted", "other"}


def test_several_experiments_start_from_one_another(runs: Runs) -> None:
    """The nearest one that is named, else the first: all share its latents and thresholds."""
    names = ["meta-prompts", "detector-ablation", "esr", "held-out"]

    def config_of(name: str, base: paper.Base | None) -> RunConfig:
        return build_config(name, ("planted",), None if base else "quick", base=base)

    def order(*names: str, base: paper.Base | None = None) -> dict[str, str | None]:
        steps = paper.in_order(names, config_of, lambda config: runs.root / config.experiment, base)
        return {s.config.experiment: s.config.from_run and Path(s.config.from_run).name for s in steps}

    after_esr = dict.fromkeys(("meta-prompts", "held-out", "detector-ablation"), "esr")
    assert list(order(*names).items()) == [("esr", None), *after_esr.items()]
    assert order("held-out", "boost-sweep") == {"boost-sweep": None, "held-out": "boost-sweep"}
    base = ("runs/mine", first_of("planted"))
    assert order("boost-sweep", "held-out", base=base) == {"boost-sweep": "mine", "held-out": "mine"}


def test_run_and_resume_take_several(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--runs", str(runs.root)]
    settings = ["--set", "n_latents=2", "--set", "boost-sweep.levels=4"]
    verb("run", "boost-sweep", "esr", "--target", "organism", "--preset", "quick", *settings, "--dry-run", *root)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["esr-organism", "boost-sweep-organism", "to do"]
    with pytest.raises(SteerbackError, match="unknown experiment 'no-such'"):
        verb("run", "esr", "no-such", "--target", "organism", *root)
    steps = paper.plan(campaign.resolved(first_of("planted"), runs.makers), runs.root, "p", ["no-steering"])
    for step in reversed(steps):
        Run.start(step.folder, step.config).close()
    assert paper.stored_steps([s.folder for s in reversed(steps)]) == steps


def test_verbs_import_export_merge_and_figures(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run("esr", *SMALL)
    root = ["--runs", str(runs.root)]
    verb("export", "esr", "--format", "authors", *root)
    (exported,) = (runs.root / "esr" / "export").glob("experiment_results_*.json")
    verb("import", str(exported), "--name", "back", *root)
    verb("export", "back", "--format", "csv", *root)
    assert (runs.root / "back" / "export" / "trials.csv").is_file()
    verb("figures", "back", *root)
    runs.run("esr", *SMALL, "limit=8", name="half")
    verb("merge", "half", "esr", "--name", "joined", *root)
    assert "2 runs joined" in capsys.readouterr().out
    before = json.loads((runs.root / "esr" / "summary.json").read_text())
    after = json.loads((runs.root / "joined" / "summary.json").read_text())
    assert after["targets"]["planted"]["conditions"] == before["targets"]["planted"]["conditions"]


def test_two_runs_are_compared_on_the_command_line(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run("esr", *SMALL, name="first")
    runs.run("meta-prompts", base="first", name="prompted")
    runs.run("esr", *SMALL, "seeds.latents=7", "seeds.generation=9000", name="others")
    runs.run("esr", *SMALL, "sampling.temperature=0.9", name="warm")
    root = ["--runs", str(runs.root)]
    verb("compare", "first", "warm", *root, "--out", str(runs.root / "cmp"))
    shown = capsys.readouterr().out
    files = runs.root / "cmp"
    assert (files / "compare.txt").read_text() in shown + "\n"
    assert "   sampling.temperature: 0.6 -> 0.9" in shown
    assert "20 pairs" in shown
    assert max(len(line) for line in (files / "compare.txt").read_text().splitlines()[2:]) <= 80
    rows = list(csv.DictReader(io.StringIO((files / "compare.csv").read_text())))
    assert json.loads((files / "compare.json").read_text())[0]["metric"] == rows[0]["metric"] == "multi_attempt_rate"
    own = json.loads((runs.root / "warm" / "summary.json").read_text())["targets"]["planted"]["conditions"]["steered"]
    for row in rows:
        estimate = own["headline"][row["metric"]]
        assert [row["run_b"], row["run_b_n"]] == [
            "" if estimate["value"] is None else str(estimate["value"]),
            str(estimate["n"]),
        ]
        assert row["paired"] == "True"
    verb("compare", "first", "others", *root, "--format", "json")
    (found, *_) = json.loads(capsys.readouterr().out)
    assert found["paired"] is False
    assert found["difference"] == pytest.approx(found["run_b"] - found["run_a"])
    verb("compare", "first", "warm", "--published", *root)
    assert "not measured" in capsys.readouterr().out
    with pytest.raises(SteerbackError, match="in common: first has planted: steered; prompted has planted: baseline"):
        verb("compare", "first", "prompted", *root)


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "--format", "xml"],
        ["compare"],
        ["compare", "one", "two"],
        ["export", "nothing"],
        ["figures"],
        ["import", "missing.json"],
        ["merge", "one", "--name", "x"],
        ["paper", "--target", "organism", "--only", "nonsense"],
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("steerback: error: ")
    assert said.count("\n") == 1
