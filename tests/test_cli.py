"""Command line: each mistake gives one clear line and exit code 2, and leaves no partial files."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from steerback import engines
from steerback.cli import main
from steerback.config import build_config, specification
from steerback.errors import SteerbackError
from steerback.jobs import execute
from steerback.jobs.check import check
from steerback.store.ledger import Ledger
from steerback.store.run import Run, stored_config

SMALL = [
    *("--preset", "quick", "--engine", "scripted", "--judge", "scripted"),
    *("--set", "n_latents=3", "--set", "trials_per_latent=4", "--set", "draws=100", "--set", "floor_responses=20"),
    *("--set", "calibration.max_iterations=5", "--set", "calibration.verify_trials=2"),
]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert steerback(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("steerback: error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.rendered("png")
def test_a_run_from_nothing_to_figures_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "esr", "--target", "organism", "--name", "a", *SMALL]
    assert steerback(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "at most" in said
    assert "engine scripted, judge scripted" in said
    assert not Path("runs").exists()
    assert steerback(*arguments) == 0
    folder = Path("runs/a")
    there = {p.name for p in folder.iterdir()}
    assert {"ledger.sqlite", "manifest.json", "summary.json", "table.txt", "table.csv", "table.tex"} <= there
    assert {"figure2.png", "figure2.pdf"} <= there
    assert "organism" in capsys.readouterr().out
    with Ledger(folder / "ledger.sqlite") as ledger:
        before = ledger.dump()
    assert steerback("resume", "a") == 0
    assert steerback(*arguments) == 0
    with Ledger(folder / "ledger.sqlite") as ledger:
        assert ledger.dump() == before
    summary = (folder / "summary.json").read_bytes()
    beside = (folder / "figure2.png").read_bytes()
    assert "Judge: scripted" in (folder / "figure2.caption.txt").read_text()
    assert steerback("figures", "a", "--captions-inside") == 0
    assert (folder / "figure2.png").read_bytes() != beside
    assert (folder / "summary.json").read_bytes() == summary
    capsys.readouterr()
    assert steerback("show", "a", "--count", "2") == 0
    said = capsys.readouterr().out
    assert "attempt 1: " in said
    assert "positions steered" in said
    assert steerback("show", "a", "organism/measure/steered/0") == 0
    refused(capsys, "show", "a", "organism/measure/steered/999")
    assert "n_latents: 3 -> 2" in refused(capsys, *arguments, "--set", "n_latents=2")
    exported = folder / "export" / "trials.csv"
    assert steerback("export", "a") == 0
    rows = exported.read_bytes()
    for verb in ("show", "export", "figures"):
        assert "judge 'nobody' has judged nothing" in refused(capsys, verb, "a", "--judge", "nobody")
    assert exported.read_bytes() == rows
    assert "--all" in refused(capsys, "figures", "a", "--out", "elsewhere")
    assert "analysis of one run" in refused(capsys, "figures", "--all", "--draws", "0")
    again = ["run", "boost-sweep", "--from", "a", "--dry-run"]
    assert steerback(*again, "--set", "n_latents=3") == 0
    for other in ("n_latents=2", "latents=[1, 2]"):
        assert "uses the latents of run a" in refused(capsys, *again, "--set", other)


def test_without_a_verb_the_help_has_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("labels",)):
        assert steerback(*words) == 2
        said = capsys.readouterr().err
        assert said.startswith("Usage: steerback")
        assert said.count("\n") > 5


def test_an_engine_that_is_not_there_is_missed_before_anything_begins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise SteerbackError("engine 'vllm' needs vLLM")

    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    monkeypatch.setattr("steerback.engines.vllm.loading.require_vllm", missing)
    said = refused(capsys, "run", "esr", "--target", "organism", "--engine", "vllm", "--dry-run")
    assert "needs vLLM" in said


def test_concreteness_threshold_is_the_authors_rule(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "esr", "--target", "organism", "--name", "a", *SMALL, "--concreteness-threshold", "65"]
    assert steerback(*arguments) == 0
    chosen = stored_config(Path("runs/a")).selection
    assert (chosen.concreteness, chosen.concreteness_threshold) == ("threshold", 65)
    assert "concreteness" in refused(capsys, *arguments[:-1], "101")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run", "esrr", "--target", "organism"], "unknown experiment 'esrr'; did you mean esr? choose one of: "),
        (["run", "esr"], "--target"),
        (["run", "esr", "--target", "gpt-9"], "unknown target 'gpt-9'; choose one of: organism-s, organism"),
        (["run", "esr", "--target", "organism", "--judge", "nobody"], "unknown judge 'nobody'; choose one of: "),
        (["run", "esr", "--target", "organism", "--engine", "warp"], "unknown engine 'warp'; choose one of: "),
        (["run", "esr", "--target", "organism", "--latents", "5,99999"], "99999"),
        (["run", "esr", "--target", "organism", "--latents", "no such thing"], "no such thing"),
        (["run", "esr", "--target", "organism", "--set", "n_latents=0"], "n_latents"),
        (
            ["run", "esr", "--target", "organism", "--set", "options.x=1"],
            "esr options: unknown setting 'x'; there are none",
        ),
        (["run", "esr", "--target", "organism", "--config", "none.yaml"], "none.yaml does not exist"),
        (["run", "esr", "--target", "organism", "--prompts", "none.txt"], "none.txt"),
        (["run", "esr", "--target", "organism", "--limit", "many"], "--limit"),
        (["run", "esr", "--target", "organism", "--name", "a b"], "letters, digits"),
        (
            ["run", "esr", "--target", "organism", "--set", "experiment=traces"],
            "experiment 'traces' contradicts the command",
        ),
        (["run", "esr", "--target", "organism", "--set", "from_run=/nope"], "use --from RUN"),
        (["run", "esr", "--target", "organism", "--set", "engine_options.foo=1"], "unknown setting 'foo'"),
        (["resume", "nothing"], "no run 'nothing'"),
        (["show", "nothing"], "no run 'nothing'"),
        (["figures", "nothing"], "no run 'nothing'"),
        (["try", "organism", "Hello", "--latent", "99999", "--boost", "1"], "99999"),
        (["try", "organism", "Hello", "--latent", "1", "--boost", "nan"], "not finite"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refused(capsys, *arguments)
    assert not Path("runs").exists() or not list(Path("runs").glob("*/ledger.sqlite"))


@pytest.mark.parametrize(
    ("experiment", "option", "words"),
    [
        ("boost-sweep", "levels=1", "levels: Input should be greater than or equal to 2"),
        ("boost-sweep", "low=3", "values: low must be smaller than high"),
        ("boost-sweep", "high=.inf", "high: Input should be a finite number"),
        ("matched-prefix", "characters=19", "characters: Input should be greater than or equal to 20"),
        ("matched-prefix", "repeats=0", "repeats: Input should be greater than or equal to 1"),
        ("matched-prefix", "episodes=few", "episodes: Input should be a valid integer"),
        ("prefill-control", "characters=0", "characters: Input should be greater than or equal to 1"),
        ("prefill-control", "multiples=[1, 0]", "multiples.1: Input should be greater than or equal to 1"),
        ("prefill-control", "multiples=[]", "multiples: List should have at least 1 item"),
        ("meta-prompts", "variants=5", "variants: expected the name of a set, names, NAME=TEXT or {name: text}, not 5"),
        ("held-out", "prompts=5", "prompts: Input should be a valid string"),
        ("detectors", "responses=0", "responses: Input should be greater than or equal to 1"),
        ("detectors", "rule=best", "rule: Input should be 'perfect', 'authors', 'auc' or 'top'"),
        ("detectors", "auc=2", "auc: Input should be less than or equal to 1"),
        ("detector-statistics", "limit=-1", "limit: Input should be greater than or equal to 1"),
        ("detector-ablation", "doses=[0.5, 1]", "doses.1: Input should be less than 1"),
        ("detector-ablation", "levels=[-1]", "levels.0: Input should be greater than 0"),
        ("random-ablation", "sets=0", "sets: Input should be greater than or equal to 1"),
        ("random-ablation", "draw=lots", "draw: Input should be 'matched' or 'uniform'"),
        ("traces", "window=0", "window: Input should be greater than or equal to 1"),
        ("traces", "quantile=1.5", "quantile: Input should be less than or equal to 1"),
        ("traces", "show=-1", "show: Input should be greater than or equal to 1"),
        ("traces", "max_episodes=-2", "max_episodes: Input should be greater than or equal to 1"),
        ("episode-statistics", "reach=0", "reach: Input should be greater than or equal to 1"),
        ("episode-statistics", "backtracking=[-1]", "backtracking.0: Input should be greater than or equal to 0"),
    ],
)
def test_options_are_checked_before_anything_is_generated(
    capsys: pytest.CaptureFixture[str], experiment: str, option: str, words: str
) -> None:
    arguments = ["run", experiment, "--target", "organism", *SMALL, "--set", f"options.{option}", "--dry-run"]
    assert f"{experiment} options: {words}" in refused(capsys, *arguments)


@pytest.mark.parametrize("draws", ["-5", "0", "1"])
def test_figures_take_as_many_draws_as_a_run(capsys: pytest.CaptureFixture[str], draws: str) -> None:
    with Run.start(Path("runs/a"), specification("imported", ("t",))):
        pass
    assert "greater than or equal to 100" in refused(capsys, "figures", "a", "--draws", draws)
    assert not Path("runs/a/summary.json").exists()


def test_a_place_that_cannot_be_made_is_one_line_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Run.start(Path("runs/a"), specification("imported", ("t",))):
        pass
    Path("taken").write_text("a file")
    for place in ("taken", "taken/below", "/proc/x"):
        for arguments in (
            ["run", "esr", "--target", "organism", *SMALL, "--runs", place],
            ["figures", "--all", "a", "--out", place],
            ["compare", "a", "--out", place],
            ["export", "a", "--out", place],
            ["finetune", "data", "--target", "organism-control", "--examples", "2", "--data", place],
        ):
            assert "cannot be created" in refused(capsys, *arguments)
            assert capsys.readouterr().out == ""
    assert Path("taken").read_text() == "a file"


def test_a_corrupt_or_foreign_ledger_is_one_line_and_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "ledger.sqlite").write_bytes(b"not a database at all" * 50)
    for verb in (["resume", "a"], ["show", "a"], ["run", "esr", "--target", "organism", "--name", "a", *SMALL]):
        assert "not a readable steerback database" in refused(capsys, *verb)
    assert (folder / "ledger.sqlite").read_bytes() == b"not a database at all" * 50


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root for a read-only tmpfs")
def test_a_read_only_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        said = refused(capsys, "run", "esr", "--target", "organism", "--runs", str(disk), *SMALL)
        assert "Read-only file system" in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    code = (
        # a shell's background jobs are born deaf to SIGINT
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from steerback.study import pipeline\nfrom steerback.cli import main\n"
        "flushed = pipeline._judge_batch\n"
        "async def once(*a):\n    await flushed(*a); os.kill(os.getpid(), signal.SIGINT)\n"
        "pipeline._judge_batch = once\nmain(sys.argv[1:])"
    )
    arguments = ["run", "esr", "--target", "organism", "--name", "a", *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert "stopped; resume with: steerback resume a" in done.stderr
    assert "Traceback" not in done.stderr
    with Ledger(tmp_path / "runs/a/ledger.sqlite", read_only=True) as ledger:
        assert any(r.completion is not None for r in ledger.rows(stage="floor"))
    assert steerback("resume", "a") == 0


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".", "..", "a/b", "n" * 300, ""])
def test_names_of_new_runs_stay_in_their_folder(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with Run.start(Path("runs/a"), specification("imported", ("t",))):
        pass
    Path("result.json").write_text("{}")
    for verb in (
        ["run", "esr", "--target", "organism", *SMALL],
        ["cross-judge", "a", "--judges", "offline,offline-bayes"],
        ["paper", "--target", "organism", *SMALL],
        ["import", "result.json"],
        ["merge", "a", "a"],
    ):
        assert "letters, digits" in refused(capsys, *verb, "--name", name)
    assert [path.name for path in Path("runs").iterdir()] == ["a"]
    assert sorted(path.name for path in Path().iterdir()) == ["result.json", "runs"]


def test_names_that_no_file_can_have_are_unknown_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("show", "figures", "resume", "export"):
        for name in ("n" * 300, "a\0b"):
            assert "no run" in refused(capsys, verb, name)


def test_an_unforeseen_error_is_one_line_with_the_path_of_its_traceback(tmp_path: Path) -> None:
    key = "sk-planted-0123456789"
    code = (
        "import sys\nfrom steerback import targets\nfrom steerback.cli import main\n"
        f"def broken(name): raise RuntimeError('x\\n\\x1b[31m {key}' + 'long ' * 50_000)\n"
        "targets.resolve = broken\nmain(['labels', 'show', 'organism'])"
    )
    environment = {**os.environ, "OPENAI_API_KEY": key}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("steerback: error: unforeseen RuntimeError: x [31m [OPENAI_API_KEY]long")
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 1000
    (path,) = (tmp_path / "cache" / "errors").iterdir()
    assert str(path) in done.stderr
    saved = path.read_text("utf-8")
    assert "in broken" in saved
    assert key not in saved + done.stderr
    environment["STEERBACK_CACHE"] = "/proc/nowhere"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "its traceback could not be saved" in done.stderr


def test_a_direction_goes_into_a_folder_that_can_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    Path("topic.txt").write_text("Lava flows down.\nThe crater smokes.\nAsh falls on the town.\n")
    make = ["directions", "make", "organism", "lava", "--topic", "topic.txt", "--out"]
    assert "folder nope does not exist" in refused(capsys, *make, "nope/x")
    assert not Path("nope").exists()
    for name in ("../lava", "7", " ", ".", ".lava", "a\x1b[31m", "n" * 300):
        assert "must have a letter" in refused(capsys, *make[:3], name, *make[4:], "there")
    assert "is no folder" in refused(capsys, *make, "topic.txt")
    assert "is no folder" in refused(capsys, *make, "topic.txt/x")


def test_an_unknown_provider_is_refused_before_labels_are_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("inspect_ai")
    assert "a/b" in refused(capsys, "labels", "auto", "organism", "--judge", "a/b", "--dry-run")
    assert capsys.readouterr().out == ""


def test_a_run_goes_on_inside_a_running_event_loop() -> None:
    """As in a notebook."""
    sizes = ("n_latents=3", "trials_per_latent=4", "draws=100", "calibration.max_iterations=5")
    overrides = {"engine": "scripted", "judge": "scripted"}
    job = check(build_config("esr", ("organism",), "quick", overrides=overrides, assignments=sizes))

    async def cell() -> None:
        execute.run(job, Path("runs/a"))

    asyncio.run(cell())
    with Run.read(Path("runs/a")) as run:
        assert all(row.judgement is not None for row in run.ledger.rows(stage="measure", judge="scripted"))


def test_a_reader_that_leaves_is_no_error() -> None:
    assert signal.SIGPIPE  # on this system at least
    command = f"{sys.executable} -m steerback --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("file", "content", "option", "message"),
    [
        ("few.txt", b"one text\nanother text\n", "--topic", "2 positive texts; give at least 3"),
        ("bad.npy", b"no array", "--file", "bad.npy"),
        ("bad.safetensors", b"{}", "--file", "bad.safetensors"),
        ("bad.onnx", b"", "--file", "unknown suffix"),
    ],
)
def test_a_bad_file_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
    content: bytes,
    option: str,
    message: str,
) -> None:
    monkeypatch.setattr("steerback.api.load_target", None)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SystemExit) as left:
        main(["directions", "make", "organism", "lava", option, str(tmp_path / file)])
    said = capsys.readouterr()
    assert left.value.code == 2
    assert message in said.err
    assert "loading" not in said.out + said.err
