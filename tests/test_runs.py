"""Run folders: one process at a time, a fixed config, and one clear line for each error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steerback.config import build_config
from steerback.errors import SteerbackError
from steerback.jobs import side_by_side
from steerback.jobs.check import check
from steerback.store.run import Run, find_run, new_run, plain, write_json

CONFIG = build_config("esr", ("organism",), "quick")


def test_the_same_config_resumes_and_another_is_refused_with_the_difference(tmp_path: Path) -> None:
    Run.start(tmp_path / "a", CONFIG).close()
    Run.start(tmp_path / "a", CONFIG).close()
    other = CONFIG.model_copy(update={"n_latents": 3})
    with Run.start(tmp_path / "a", CONFIG) as run:
        run.ledger.put_json("organism", "latents", {"chosen": []})
    with pytest.raises(SteerbackError, match=r"n_latents: 12 -> 3.*another --name.*steerback resume a"):
        Run.start(tmp_path / "a", other)
    with Run.reopen(tmp_path / "a") as again:
        assert again.config == CONFIG


def test_a_run_that_came_to_nothing_takes_another_config(tmp_path: Path) -> None:
    """A mistake that showed only once it was to begin does not keep the name."""
    Run.start(tmp_path / "a", CONFIG).close()
    other = CONFIG.model_copy(update={"n_latents": 3})
    with Run.start(tmp_path / "a", other) as again:
        assert again.config == other
    with Run.read(tmp_path / "a") as read:
        assert read.config == other


def test_an_emptied_ledger_beside_a_manifest_is_not_called_unbegun(tmp_path: Path) -> None:
    with Run.start(tmp_path / "a", CONFIG) as run:
        run.write_manifest({})
    (tmp_path / "a" / "ledger.sqlite").write_bytes(b"")
    with pytest.raises(SteerbackError, match=r"has a manifest, but its ledger.sqlite is empty"):
        Run.read(tmp_path / "a")


def test_two_processes_on_one_run_are_one_too_many(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom steerback.store.run import Run\nfrom steerback.errors import *\n"
        "try: Run.reopen(Path(sys.argv[1]))\nexcept SteerbackError as e: print(e)"
    )
    with Run.start(tmp_path / "a", CONFIG):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
        assert done.stdout == (f"run 'a' is in use by process {os.getpid()}; wait for it or choose another --name\n")
        with Run.read(tmp_path / "a") as reader:  # looking at a run that goes on is fine
            assert reader.config == CONFIG
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(("link", "kind"), [(Path.symlink_to, "symbolic"), (Path.hardlink_to, "hard")])
def test_a_lock_that_is_a_link_leaves_the_other_file_alone(
    tmp_path: Path, link: Callable[[Path, Path], None], kind: str
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("years of work")
    (tmp_path / "a").mkdir()
    link(tmp_path / "a" / ".lock", mine)
    with pytest.raises(SteerbackError, match=rf"\.lock is a {kind} link; remove it"):
        Run.start(tmp_path / "a", CONFIG)
    assert mine.read_text() == "years of work"


@pytest.mark.parametrize(
    "name", ["../x", "/tmp/x", "a/b", ".", "..", ".hidden", "", "a b", "a\0b", "n" * 201, "a\x1b[31m"]
)
def test_a_name_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(SteerbackError, match="letters, digits"):
        new_run(name, tmp_path)
    assert plain(name) == "" or new_run(plain(name)[:200], tmp_path).parent == tmp_path


def test_unknown_run_lists_those_there(tmp_path: Path) -> None:
    Run.start(tmp_path / "mine", CONFIG).close()
    with pytest.raises(SteerbackError, match=r"no run 'yours'.*existing runs: mine"):
        Run.read(find_run("yours", tmp_path))
    assert find_run(str(tmp_path / "mine"), Path("elsewhere")) == tmp_path / "mine"
    with pytest.raises(SteerbackError, match="letters, digits"):
        Run.start(tmp_path / "bad name", CONFIG)


def test_manifest_says_what_a_number_depends_on(tmp_path: Path) -> None:
    with Run.start(tmp_path / "a", CONFIG) as run:
        found = json.loads(run.write_manifest({"prompts": {"count": 38}}).read_text())
    assert found["config"] == CONFIG.model_dump(mode="json")
    assert {"python", "torch", "transformers", "numpy", "steerback"} <= set(found["versions"])
    assert found["machine"]["cores"] == os.cpu_count()
    assert {"commit", "written", "prompts"} <= set(found)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(SteerbackError, match="cannot be written"):
        write_json(tmp_path / "no" / "x.json", {})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root for a small tmpfs")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        with Run.start(disk / "a", CONFIG) as run:
            kept = 0
            with pytest.raises(SteerbackError, match=r"disk is full.*resume") as caught:
                while kept < 1000:
                    run.ledger.put_json("t", f"fact {kept}", "x" * 5000)
                    kept += 1
            assert "\n" not in str(caught.value)
            assert kept > 3
            facts = {name: value for _, name, value in run.ledger.facts()}
            assert all(facts[f"fact {i}"] == "x" * 5000 for i in range(kept))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerbackError, match="cannot be created"):
        Run.start(tmp_path / "file" / "a", CONFIG)


def test_work_side_by_side_is_done_by_a_process_per_core_whose_errors_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 2)

    def work(task: str) -> int:
        if task == "b":
            raise SteerbackError("b has no latents")
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    done = dict(side_by_side.each(["a", "b", "killed", "c", "d"], work))
    assert str(done.pop("b")) == "b has no latents"
    assert str(done.pop("killed")) == "the process of a target ended with exit code -9"
    assert {"a", "c", "d"} == set(done)
    assert os.getpid() not in done.values()
    assert len(set(done.values())) <= 3  # one of two processes was killed and replaced
    assert [task for task, _ in side_by_side.each(["alone"], work)] == ["alone"]


def test_work_side_by_side_waits_until_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 3)
    needs, done = {"last": {"first", "second"}, "second": {"first"}, "first": set(), "free": set()}, list[str]()
    for task, result in side_by_side.each([*needs], lambda task: task.upper(), lambda t: needs[t] <= set(done)):
        assert result == task.upper()
        done.append(task)
    assert sorted(done) == sorted(needs)
    assert done.index("first") < done.index("second") < done.index("last")


def test_only_small_models_with_a_free_judge_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("organism", "organism-control")
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(side_by_side, "gpus", lambda: ())

    def possible(targets: tuple[str, ...], **settings: object) -> bool:
        config = build_config("esr", targets, "quick", overrides={"engine": "transformers", **settings})
        return side_by_side.possible(check(config))

    loaded = {name: module for name, module in sys.modules.items() if name != "torch"}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "modules", loaded)
        assert possible(both) == (sys.platform == "linux")
        assert not possible(both, engine_options={"workers": 2})
        patch.setattr(side_by_side, "gpus", lambda: (("a GPU", 80),))
        assert not possible(both)
        assert possible(both, engine_options={"device": "cpu"}) == (sys.platform == "linux")
