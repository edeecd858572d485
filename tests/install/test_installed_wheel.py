"""The wheel alone, in an environment of its own, from an empty folder with an empty HOME, runs an experiment."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_and_sdist_hold_what_is_needed(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    needed = [
        "steerback/py.typed",
        "steerback/targets/registry.toml",
        "steerback/data/prompts/evaluation.txt",
        *(f"steerback/organism/weights/{name}/model.safetensors" for name in ("organism", "organism-control")),
    ]
    assert not [name for name in needed if name not in inside]
    assert {name.partition("/")[0] for name in inside if ".dist-info" not in name} == {"steerback"}
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/test_cli.py", "tools/organism/build.py"} <= names
    readme = (ROOT / "README.md").read_text("utf-8")
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", readme) if "://" not in target}
    assert linked
    assert {name for name in linked if name not in names} == set()
    assert "](https://" in re.findall(r"!\[[^]]*\]\([^)]*", readme)[0]  # an index shows only images of absolute address


def test_the_installed_wheel_runs_from_an_empty_folder(built: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies come from the environment of these tests; its editable install does not, as .pth files are
    # read in site-packages folders only, not in folders that a .pth file names.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    python = environment / "bin" / "python"
    command = (
        f"{python} -m steerback run esr --target organism --preset quick --name a "
        "--set n_latents=2 --set trials_per_latent=2 --set reference_responses=1 --set sampling.max_new_tokens=40 "
        "--set floor_responses=2 "
        "--set calibration.max_iterations=2 --set calibration.trials_per_iteration=4 --set draws=100 "
        "--set calibration.verify_trials=0 --set calibration.tolerance=40"
    )
    done = subprocess.run(
        command.split(), cwd=work, env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode in (0, 2), done.stderr
    assert (work / "runs/a/ledger.sqlite").is_file()
    where = [str(python), "-c", "import steerback; print(steerback.__file__)"]
    said = subprocess.run(where, cwd=work, env={"HOME": str(home)}, capture_output=True, text=True, check=True).stdout
    assert said.startswith(str(site))
    if done.returncode == 2:  # so few trials may calibrate no latent; anything else is a fault
        assert "no latent reached target score" in done.stderr
