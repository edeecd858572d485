"""Generated pages of the documentation site: notebooks, settings, commands, Python API, figures.

A hook of MkDocs (`hooks` in mkdocs.yml); each function returns Markdown and needs no MkDocs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GALLERY = DOCS / "images" / "gallery"
WIDTH = 670
"""Pixels of a figure in the gallery."""
CHECKS = {
    "ten_minutes": "assert steered.steered_as_planned and steered.text != ablated.text\n"
    "assert len(trials) == len(colder.trials()) > 0",
    "your_own_model": "assert steered.steered_as_planned and steered.text != plain.text\n"
    "assert examine(sb.load_target('mine', engine='transformers')).verdict == 'ok'",
}
"""Assertions for the end of each notebook. They are executed with the notebook but not shown."""
TITLES = {
    "figure2": "Figure 2: rates, and what later attempts gain",
    "figure3": "Figure 3: by boost",
    "figure4": "Figure 4: meta-prompts",
    "figure5": "Figure 5: detectors clamped to zero",
    "dose_curve": "Dose curve of the ablation",
    "figure7": "Figure 7: activations, token by token",
    "lead_times": "Lead times of the detectors",
    "detectors": "Detectors",
    "tableA1": "Distributions behind Table A1",
    "figureA2": "Figure A2: ESR rate by judge",
    "figureA3": "Figure A3: multi-attempt rate by judge",
    "figureA4": "Figure A4: agreement of judges",
    "figureA5": "Figure A5: aligned at the correction",
    "figureA6": "Figure A6: activity by region",
    "figureA7": "Figure A7: first scores without steering",
    "figureA8": "Figure A8: what steering takes from them",
    "figureA9": "Figure A9: random sets clamped to zero",
    "held_out": "Held-out prompts",
    "prefill_control": "Prefill control",
    "matched_prefix": "Matched prefix",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/; MkDocs calls it."""
    from mkdocs.structure.files import File

    for uri, content in pages(execute=True).items():
        files.append(File.generated(config, uri, content=content))
    return files


def pages(execute: bool = False) -> dict[str, str]:
    """Return every generated page by its path in the site; `execute` runs the notebooks, which takes a minute."""
    api = api_pages()
    return {
        "reference/settings.md": settings_page(),
        "reference/commands.md": commands_page(),
        "gallery.md": gallery_page(),
        "log.md": (ROOT / "LOG.md").read_text("utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text("utf-8"),
        **api,
        **notebook_pages(execute),
    }


# -- notebooks --------------------------------------------------------------------------------------------------------
def notebook_pages(execute: bool) -> dict[str, str]:
    """Return each notebook of docs/notebooks as a page and as .ipynb. An error in a notebook cell is raised."""
    import jupytext
    import nbformat

    site: dict[str, str] = {}
    for source in sorted((DOCS / "notebooks").glob("*.py")):
        notebook = jupytext.read(source)
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        if execute:
            from nbclient import NotebookClient
            from traitlets.config import Config

            notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[source.stem]))
            NotebookClient(notebook, timeout=300, config=Config(KernelManager={"transport": "ipc"})).execute()
            notebook.cells.pop()
        site[f"notebooks/{source.stem}.md"] = notebook_page(notebook, source.stem)
        site[f"notebooks/{source.stem}.ipynb"] = nbformat.writes(notebook)
    return site


def notebook_page(notebook: NotebookNode, name: str) -> str:
    """Return a notebook as Markdown: texts, code and stored outputs."""
    title, *rest = notebook.cells
    links = f"Executed when this site was built. Download: [notebook]({name}.ipynb), [script]({name}.py)."
    parts = [title.source, links]
    for cell in rest:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [shown for output in cell.outputs if (shown := output_block(output))]
    return "\n\n".join(parts) + "\n"


def output_block(output: NotebookNode) -> str:
    """Return one output of a cell as Markdown: an image, HTML or text; "" for blank text and standard error."""
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" and output.text.strip() else ""
    if "image/png" in output.data:
        return f'<img alt="figure" width="420" src="data:image/png;base64,{output.data["image/png"].strip()}">'
    if "text/html" in output.data:
        return f'<div class="md-typeset__scrollwrap">\n{output.data["text/html"].strip()}\n</div>'
    return f"```text\n{output.data['text/plain'].rstrip()}\n```"


# -- settings ---------------------------------------------------------------------------------------------------------
def settings_page() -> str:
    """Return the reference of all settings: of a run, and of each experiment."""
    from steerback.config import PRESETS, RunConfig
    from steerback.experiments import REGISTRY
    from steerback.experiments.settings import experiment_rows, setting_rows

    runs = {name: make("esr", ("organism",)).model_dump() for name, make in PRESETS.items() if name != "specification"}
    lines = [
        "# Settings",
        "",
        "Set one with `--set KEY=VALUE`, or several in a YAML file with `--config FILE`. Presets are starting points: "
        "`specification` (default), `authors` and `quick`; a value that differs is named under the default. "
        "`--dry-run` shows what a run would do.",
        "",
        "## Of every run",
        "",
        *_header(),
    ]
    for key, kind, default, text in setting_rows(RunConfig):
        others = [
            f"{preset}: `{value}`"
            for preset, run in runs.items()
            if key != "preset" and (value := _at(run, key)) != default and default is not PydanticUndefined
        ]
        lines.append(_row(key, kind, default, text, others))
    for name in REGISTRY:
        if rows := experiment_rows(name):
            lines += ["", f"## Of experiment `{name}`", "", *_header()]
            lines += [_row(*row, []) for row in rows]
    return "\n".join(lines) + "\n"


def _header() -> list[str]:
    return ["| setting | type | default | meaning |", "|---|---|---|---|"]


def _at(run: dict[str, Any], key: str) -> object:
    value: Any = run
    for part in key.split("."):
        value = value[part]
    return value


def _row(key: str, kind: str, default: object, text: str, others: list[str]) -> str:
    shown = "required" if default is PydanticUndefined else "; ".join([f"`{default}`", *others])
    return "| " + " | ".join((f"`{key}`", f"`{kind}`", shown, text)) + " |"


# -- commands ---------------------------------------------------------------------------------------------------------
def commands_page() -> str:
    """Return the help of every verb, as `steerback VERB --help` prints it."""
    from typer.main import get_command

    from steerback.cli import app

    lines = ["# Commands", "", "What `steerback VERB --help` prints. `--targets FILE` may stand in every command.", ""]
    root = get_command(app)
    for name, command in sorted(verbs(root).items()):
        context: Any = type(root.make_context("steerback", [], resilient_parsing=True))(
            command, info_name=f"steerback {name}", terminal_width=100, max_content_width=100
        )
        lines += [f"## {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


def verbs(group: Any, prefix: str = "") -> dict[str, Any]:
    """Return all commands of a group by their words, including groups that can be called themselves."""
    site: dict[str, Any] = {}
    for name, command in group.commands.items():
        words = f"{prefix}{name}"
        if not hasattr(command, "commands") or command.invoke_without_command:
            site[words] = command
        if hasattr(command, "commands"):
            site |= verbs(command, f"{words} ")
    return site


# -- Python -----------------------------------------------------------------------------------------------------------
def api_pages() -> dict[str, str]:
    """Return one mkdocstrings page for each part of the package, and their table of contents."""
    package = ROOT / "src" / "steerback"
    parts = ["api", "records", "config", "errors"]
    parts += sorted(p.name for p in package.iterdir() if (p / "__init__.py").is_file())
    site: dict[str, str] = {}
    lines = [
        "# Python API",
        "",
        "What `import steerback` offers is in [steerback](api/steerback.md). "
        "The other parts may change between releases.",
        "",
        "| part | what it is |",
        "|---|---|",
        "| [steerback](api/steerback.md) | what `import steerback` offers |",
    ]
    site["reference/api/steerback.md"] = (
        "# steerback\n\n::: steerback.api\n    options:\n      show_root_heading: false\n"
    )
    for name in parts[1:]:
        place = package / name
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        first = (ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [steerback.{name}](api/{name}.md) | {first.replace('|', chr(92) + '|')} |")
        modules = sorted(p.stem for p in place.glob("*.py") if p.stem != "__init__") if place.is_dir() else []
        site[f"reference/api/{name}.md"] = "\n\n".join(
            [f"# steerback.{name}", f"::: steerback.{name}", *(f"## {m}\n\n::: steerback.{name}.{m}" for m in modules)]
        )
    site["reference/api.md"] = "\n".join(lines) + "\n"
    return site


# -- figures ----------------------------------------------------------------------------------------------------------
def gallery_page() -> str:
    """Return the page of all figures with their captions."""
    lines = [
        "# Figure gallery",
        "",
        "Every figure of `steerback paper`, drawn from the built-in organism, whose behaviour is **planted**: it "
        "restarts because its training text does. The figures show what a run gives you; they are no evidence about "
        "language models. They come from a small run (6 latents, 5 trials each), so that intervals are wide:",
        "",
        "    steerback paper --target organism --preset quick --set n_latents=6 --set trials_per_latent=5 \\",
        "      --set boost-sweep.low=-10 --set boost-sweep.high=14 --set boost-sweep.levels=5 \\",
        "      --set prefill-control.characters=80 --set random-ablation.sets=3",
        "",
        "`steerback figures RUN` draws them again from a run's ledger: `NAME.png`, `NAME.pdf`, the caption as "
        "`NAME.caption.txt`, and both as `NAME.html`. `--captions-inside` writes the caption into the image. All are "
        "85 mm wide, one column of a paper.",
        "",
    ]
    for name, title in TITLES.items():
        caption = GALLERY / f"{name}.caption.txt"
        if caption.is_file():
            words = "\n\n".join(caption.read_text("utf-8").splitlines()).replace("<", "&lt;").replace("*", r"\*")
            lines += [f"## {title}", "", f"![{title}](images/gallery/{name}.png){{ width=420 }}", "", words, ""]
    return "\n".join(lines)


def collect_gallery(folders: Sequence[Path]) -> None:
    """Copy figures from run folders into docs/images/gallery, with few colours to reduce their size."""
    from PIL import Image

    GALLERY.mkdir(parents=True, exist_ok=True)
    for name in TITLES:
        site = next((folder for folder in folders if (folder / f"{name}.png").is_file()), None)
        if site is None:
            print(f"no {name} in these folders")
            continue
        with Image.open(site / f"{name}.png") as image:
            size = (WIDTH, round(image.height * WIDTH / image.width))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.quantize(96, dither=Image.Dither.NONE).save(GALLERY / f"{name}.png", optimize=True)
        (GALLERY / f"{name}.caption.txt").write_text((site / f"{name}.caption.txt").read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    collect_gallery([Path(name) for name in sys.argv[1:]])
