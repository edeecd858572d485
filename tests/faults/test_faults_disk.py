"""A disk that fills up: one line, exit code 2, no half-written file, the earlier ones as they were, and nothing lost.

The disk is the size limit of files (RLIMIT_FSIZE), which fails a write as a full disk does.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import SCALE, command
from small_runs import SMALL, ledger_of

from steerback.store.files import clear_leftovers, write_atomic

DRAW = random.Random(7)


def limits(first: int, lowest: int, highest: int) -> list[int]:
    """Sizes in bytes beyond which no file grows: one in the short form, further ones in the long form."""
    return [first, *(DRAW.randint(lowest, highest) for _ in range(SCALE - 1))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the run `whole`, and its cache in the environment."""
    folder = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STEERBACK_CACHE", str(folder / "cache"))
        assert command(run("whole"), folder / "said", full=(2,)) == 0  # a run goes on without its progress
        yield folder


def run(name: str) -> list[str]:
    sizes = [word for size in SMALL for word in ("--set", size)]
    small = ["run", "esr", "--target", "organism", "--preset", "quick", "--engine", "scripted", "--judge", "scripted"]
    return [*small, *sizes, "--name", name]


def test_a_message_that_cannot_be_written_changes_no_exit_code() -> None:
    words = "import sys; from steerback.cli import main; sys.stderr.write('no line end'); main(['--version'])"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", words], stdout=subprocess.DEVNULL, stderr=full, env=buffered)
    assert ended.returncode == 0


def one_line(said: Path) -> str:
    """Return the error line; there is one, without a traceback."""
    lines = [line for line in said.read_text().splitlines() if line.startswith("steerback: error:")]
    assert len(lines) == 1
    assert "unforeseen" not in lines[0]
    assert "Traceback" not in said.read_text()
    return lines[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def without_ledger(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if "sqlite" not in name}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if p.name != ".lock"]


@pytest.mark.parametrize("room", limits(40_000, 1, 60_000))
def test_figures_and_tables_on_a_full_disk(place: Path, tmp_path: Path, room: int) -> None:
    shutil.copytree("runs/whole", tmp_path / "runs" / "whole")
    folder = tmp_path / "runs" / "whole"
    before = without_ledger(folder)
    code = command(["figures", "whole", "--runs", str(folder.parent)], tmp_path / "said", room)
    assert code == 2
    assert "cannot be written" in one_line(tmp_path / "said") or "disk is full" in one_line(tmp_path / "said")
    after = contents(folder)
    assert {n: c for n, c in after.items() if "sqlite" not in n} == {
        n: c for n, c in before.items() if "sqlite" not in n
    }
    assert hidden(folder) == []


@pytest.mark.parametrize("room", limits(120_000, 5_000, 200_000))
def test_a_run_on_a_full_disk_loses_nothing(place: Path, tmp_path: Path, room: int) -> None:
    words = [*run("full"), "--runs", str(tmp_path)]
    code = command(words, tmp_path / "said", room)
    assert code == 2
    assert one_line(tmp_path / "said")
    assert hidden(tmp_path) == []
    assert command(words, tmp_path / "said") == 0
    assert ledger_of(tmp_path / "full") == ledger_of(Path("runs/whole"))


@pytest.mark.parametrize("room", limits(45_000, 100, 60_000))
def test_import_and_export_on_a_full_disk_leave_nothing_half_written(place: Path, tmp_path: Path, room: int) -> None:
    if not (place / "out").exists():
        assert command(["export", "whole", "--format", "authors", "--out", "out"], tmp_path / "said") == 0
    files = sorted(str(path) for path in Path("out").glob("*.json"))
    words = ["import", *files, "--name", "in", "--runs", str(tmp_path)]
    assert command(words, tmp_path / "said", room) == 2
    assert one_line(tmp_path / "said")
    assert not (tmp_path / "in").exists()
    export = ["export", "whole", "--out", str(tmp_path / "e")]
    assert command(export, tmp_path / "said", 33_000) == 2  # the table has 34 kB, and SQLite needs 32 kB to read
    assert one_line(tmp_path / "said")
    assert contents(tmp_path / "e") == {}


def test_output_on_a_full_disk(place: Path, tmp_path: Path) -> None:
    assert command(["show", "whole", "-n", "5"], tmp_path / "said", full=(1,)) == 2
    assert "cannot be written" in one_line(tmp_path / "said")


def test_leftovers_of_killed_processes_are_removed_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = [f".figure2.{gone.pid}.pdf", f".figure2.{gone.pid}.png", f".summary.json.{gone.pid}-ab_d1234.tmp"]
    alive = [f".figure2.{os.getpid()}.pdf", f".x.json.{os.getpid()}-abcd1234.tmp", ".lock", ".hidden.pdf", ".5606.pdf"]
    for name in (*dead, *alive):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(alive)
    other = f".y.csv.{gone.pid}-abcd1234.tmp"
    for name in (f".x.csv.{gone.pid}-abcd1234.tmp", other):  # in a folder of the user, only of the file written anew
        (tmp_path / name).touch()
    write_atomic(tmp_path / "x.csv", b"1")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*alive, other, "x.csv"])
