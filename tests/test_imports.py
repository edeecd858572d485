"""Import order of the modules, and a command line that starts without heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tools.structure import measure

SOURCE = Path(__file__).parents[1] / "src" / "steerback"
# From the bottom up: a module may import what stands before it, and within its own package.
ORDER = [
    *(
        "errors",
        "readers",
        "records",
        "config",
        "organism",
        "store",
        "data",
        "targets",
        "engines",
        "calibration",
        "judging",
    ),
    *("latents", "study", "metrics", "finetuning", "experiments", "analysis", "figures", "report", "published"),
    *("jobs", "api", "cli", "__main__"),
]
# Plans know nothing of results, and results nothing of plans or of what generates them.
APART = {"analysis": {"experiments", "engines", "study"}, "figures": {"experiments", "engines", "study"}}


def place(name: str) -> int:
    assert name in ORDER, f"module {name} has no place: give it one in {__file__}"
    return ORDER.index(name)


def imports_of(path: Path) -> set[str]:
    """Second parts of `steerback.x...` imported anywhere in a file, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text("utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and any(getattr(x, "id", "") == "TYPE_CHECKING" for x in ast.walk(node.test))
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("steerback"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("steerback.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_downwards(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    imported = imports_of(path) - {own}
    upwards = {name for name in imported if place(name) > place(own)}
    assert not upwards, f"{own} imports {sorted(upwards)}, which lie above it"
    assert not imported & APART.get(own, set()), f"{own} imports {sorted(imported & APART[own])}"


def test_no_two_modules_import_each_other_and_no_class_name_stands_for_two_classes() -> None:
    figures = measure(SOURCE)
    assert figures["import circles"] == []
    assert figures["class names that stand for several classes"] == {}
    assert len(figures["loose modules"]) <= 6


def test_help_loads_nothing_heavy_and_a_list_no_dataframes() -> None:
    code = (
        "import sys\nfrom steerback.cli import main\n"
        "heavy = {'torch', 'transformers', 'scipy', 'sklearn', 'matplotlib', 'pandas'}\n"
        "for words, more in (['--help'], {'numpy', 'pydantic'}), (['judges'], set()):\n"
        "    try: main(words)\n    except SystemExit: pass\n"
        "    loaded = (heavy | more) & set(sys.modules)\n"
        "    assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
