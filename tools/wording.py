"""Measure the English of the package, and show how docstrings, messages and paragraphs changed since a commit.

    python tools/wording.py                                 # counts of src/steerback
    python tools/wording.py --before COMMIT [--seed 21]     # 20 docstrings, 10 messages, 5 paragraphs, drawn at random

A docstring is paired by the qualified name of its module, class or function, a message by the function that raises it,
a paragraph of docs by its page and position among the changed ones.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import random
import re
import subprocess
import tokenize
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

SOURCE = "src/steerback"
DRAWN = {"docstrings": 20, "messages": 10, "paragraphs": 5}
Texts = dict[str, str]


def sources(revision: str | None, folder: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the files below a folder, of a commit or (None) of the working tree."""
    if revision is None:
        for path in sorted(Path(folder).rglob(f"*{suffix}")):
            yield str(path), path.read_text("utf-8")
        return
    for path in _git("ls-tree", "-r", "--name-only", revision, folder).splitlines():
        if path.endswith(suffix):
            yield path, _git("show", f"{revision}:{path}")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout


def docstrings(path: str, text: str) -> Texts:
    """Return the first paragraph of each docstring by qualified name."""
    return {
        f"{path}:{name}": " ".join(doc.split("\n\n")[0].split())
        for name, node in _named(ast.parse(text))
        if (doc := ast.get_docstring(node)) is not None
    }


def messages(path: str, text: str) -> Texts:
    """Return the text of each `SteerbackError(...)` by the function that raises it and its position there."""
    found: Texts = {}
    for name, node in _named(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func) == "SteerbackError"]
            found |= {f"{path}:{name}:{i}": ast.unparse(call.args[0]) for i, call in enumerate(calls) if call.args}
    return found


def _named(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    yield "", tree
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
                waiting.append((f"{prefix}{child.name}.", child))


def changed(before: str, kind: str) -> list[tuple[str, str, str]]:
    """Return (place, old text, new text) of every text that changed since the commit."""
    if kind == "paragraphs":
        return list(_changed_paragraphs(before))
    read = docstrings if kind == "docstrings" else messages
    old, new = ({k: v for file in sources(r, SOURCE, ".py") for k, v in read(*file).items()} for r in (before, None))
    return [(key, old[key], new[key]) for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]


def _changed_paragraphs(before: str) -> Iterator[tuple[str, str, str]]:
    old = dict(sources(before, "docs", ".md"))
    for page, text in sources(None, "docs", ".md"):
        a, b = (re.split(r"\n\s*\n", t) for t in (old.get(page, ""), text))
        for kind, i, j, k, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
            if kind == "replace" and j - i == n - k:
                yield from ((f"{page}, paragraph {k + d + 1}", a[i + d], b[k + d]) for d in range(j - i))


def counts() -> dict[str, float]:
    """Return lines, the word "found" per 1,000 lines, docstrings that open with "What", and the share of comments."""
    texts = [text for _, text in sources(None, SOURCE, ".py")]
    lines = sum(text.count("\n") for text in texts)
    comments = sum(
        token.type == tokenize.COMMENT for text in texts for token in tokenize.generate_tokens(StringIO(text).readline)
    )
    openings = [doc for file in sources(None, SOURCE, ".py") for doc in docstrings(*file).values()]
    return {
        "lines": lines,
        "'found' per 1,000 lines": 1000 * sum(len(re.findall(r"\bfound\b", t, re.I)) for t in texts) / lines,
        "docstrings that open with 'What'": sum(doc.startswith("What") for doc in openings),
        "lines with a comment, per cent": 100 * comments / lines,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="COMMIT", help="show texts that changed since this commit")
    parser.add_argument("--seed", type=int, default=21)
    chosen = parser.parse_args()
    for name, value in counts().items():
        print(f"{name}: {value:.4g}" if value < 1000 else f"{name}: {value:,.0f}")
    for kind, most in DRAWN.items() if chosen.before else ():
        pairs = changed(chosen.before, kind)
        drawn = random.Random(chosen.seed).sample(pairs, min(most, len(pairs)))
        print(f"\n{len(drawn)} of {len(pairs)} changed {kind}:")
        for place, old, new in drawn:
            print(f"\n{place}\n  - {' '.join(old.split())}\n  + {' '.join(new.split())}")


if __name__ == "__main__":
    main()
