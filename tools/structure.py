"""Measure the structure of the package: size, loose modules, import circles, `Any`, class names, functions.

    python tools/structure.py [src/steerback] [--by-folder] [--json]

Reads the source as text and syntax trees and imports nothing. An import circle is a set of modules that reach each
other through imports anywhere in the file (imports under TYPE_CHECKING are left out).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

Functions = dict[str, int]


def modules(root: Path) -> dict[str, Path]:
    """Return the dotted name of each module below `root`, the package itself first."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a module imports, except under TYPE_CHECKING."""
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    reached: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            reached |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{a.name}" for a in node.names} & set(known)
            reached |= submodules
            if len(submodules) < len(node.names):
                reached.add(node.module)
    return reached & set(known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    reached: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1:
                reached.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return reached


def function_lengths(name: str, tree: ast.Module) -> Functions:
    """Return the number of lines of each function and method of a module."""
    return {
        f"{name}:{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def measure(root: Path) -> dict[str, object]:
    """Return all measurements of the package in folder `root`."""
    known = modules(root)
    texts = {name: path.read_text("utf-8") for name, path in known.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = sum(text.count("\n") for text in texts.values())
    classes: dict[str, list[str]] = defaultdict(list)
    lengths: Functions = {}
    for name, tree in trees.items():
        lengths |= function_lengths(name, tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(name)
    anys = sum(len(re.findall(r"\bAny\b", text)) for text in texts.values())
    longest = max(lengths, key=lambda name: lengths[name])
    return {
        "lines": lines,
        "files": len(known),
        "loose modules": sorted(path.name for path in root.glob("*.py")),
        "files over 400 lines": sorted(n for n, text in texts.items() if text.count("\n") > 400),
        "import circles": circles({name: imports(tree, known) - {name} for name, tree in trees.items()}),
        "Any": anys,
        "Any per 1,000 lines": round(1000 * anys / lines, 1),
        "class names that stand for several classes": {n: w for n, w in sorted(classes.items()) if len(w) > 1},
        "functions": len(lengths),
        "median function": median(lengths.values()),
        "largest function": f"{lengths[longest]} lines: {longest}",
    }


def by_folder(root: Path) -> str:
    """Return lines and uses of `Any`, one row per folder."""
    lines: Counter[str] = Counter()
    anys: Counter[str] = Counter()
    for path in root.rglob("*.py"):
        folder, text = path.relative_to(root).parts[0], path.read_text("utf-8")
        lines[folder] += text.count("\n")
        anys[folder] += len(re.findall(r"\bAny\b", text))
    return "\n".join(f"{n:>7,} lines {anys[f]:>5} Any  {f}" for f, n in lines.most_common())


def main() -> None:
    """Print the measurements of one source tree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "src" / "steerback"
    parser.add_argument("root", nargs="?", type=Path, default=default, help="folder of the package")
    parser.add_argument("--by-folder", action="store_true", help="lines and Any of each folder as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures = measure(options.root)
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    for name, value in figures.items():
        if isinstance(value, list | dict):
            print(f"{name}: {len(value)}")
            for entry in value.items() if isinstance(value, dict) else value:
                print(f"    {entry}")
        else:
            print(f"{name}: {value}")
    if options.by_folder:
        print(by_folder(options.root))


if __name__ == "__main__":
    main()
