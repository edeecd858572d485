"""Documentation: generated pages are complete, links in messages exist, the commands of the tutorial run."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
import yaml

from steerback import organism
from steerback.cli import main
from steerback.errors import DOCS, docs_page

ROOT = Path(__file__).parent.parent
PAGES = {p.stem: p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")}
QUICK = (
    "--prompts few.txt --set n_latents=1 --set trials_per_latent=2 --set reference_responses=1 "
    "--set floor_responses=0 --set draws=100 "
    "--set calibration.max_iterations=6 --set calibration.trials_per_iteration=2 --set calibration.verify_trials=0 "
    "--set calibration.tolerance=1000 --set sampling.max_new_tokens=40"
)


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "tools" / "site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generated(site: ModuleType) -> dict[str, str]:
    found: dict[str, str] = site.pages()
    return found


def anchors(text: str) -> set[str]:
    """Names of a page's headings as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower()) for h in headings}


def calls_of_page() -> list[tuple[str, str]]:
    """(page, section) of every link that a message of the program makes."""
    found = []
    texts = [file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py")]
    for text in (text for text in texts if "docs_page(" in text):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "docs_page" and node.args:
                given = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if all(isinstance(x, str) for x in given) and len(given) == len(node.args):
                    found.append((str(given[0]), str(given[1]) if len(given) > 1 else ""))
    return found


def test_messages_link_to_pages_that_exist() -> None:
    links = calls_of_page()
    assert len(links) >= 4
    for name, section in links:
        assert name in PAGES, name
        assert not section or section in anchors(PAGES[name]), (name, section)
    assert docs_page("judging", "graders") == f"{DOCS}judging/#graders"


def test_the_address_of_the_site_is_said_once_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"]["Documentation"] == DOCS
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["site_url"] == DOCS


def test_every_page_is_in_the_navigation(generated: dict[str, str]) -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = set(re.findall(r": (\S+\.md)$", text, re.M))
    known = {f"{name}.md" for name in PAGES} | {
        p for p in generated if p.endswith(".md") and not p.startswith("reference/api/")
    }
    assert named == known


def test_every_setting_and_every_verb_is_in_the_reference(site: ModuleType, generated: dict[str, str]) -> None:
    from steerback.config import PRESETS

    def keys(values: object, prefix: str = "") -> set[str]:
        if not isinstance(values, dict) or not values:
            return {prefix}
        return {k for name, v in values.items() for k in keys(v, f"{prefix}.{name}" if prefix else name)}

    for key in keys(PRESETS["specification"]("esr", ("organism",)).model_dump()):
        assert f"| `{key}` |" in generated["reference/settings.md"]
    rows = [line for line in generated["reference/settings.md"].splitlines() if line.startswith("| `")]
    assert any(line.startswith("| `options.levels` | `int, ≥ 2` | `8` |") for line in rows)
    assert not [line for line in rows if line.endswith("|  |")], "a setting without a text under it"
    assert not [line for line in rows if "FieldInfo" in line or "Validator" in line or "object at" in line]
    for verb in ("run", "resume", "show", "figures", "label import", "labels fetch", "finetune train"):
        assert f"## {verb}\n" in generated["reference/commands.md"]


def test_every_figure_of_an_experiment_is_in_the_gallery(site: ModuleType, generated: dict[str, str]) -> None:
    for name in site.TITLES:
        assert (site.GALLERY / f"{name}.png").is_file(), name
        assert f"images/gallery/{name}.png" in generated["gallery.md"]
    assert "planted" in generated["gallery.md"]


def test_terms_are_defined_once_in_alphabetical_order() -> None:
    terms = re.findall(r"^(\S.*)\n:   ", PAGES["glossary"], re.M)
    assert terms == sorted(set(terms), key=str.lower)
    needed = {"Attempt", "Multi-attempt rate", "ESR rate", "Gated", "Receipt", "Organism", "Degraded", "Floor"}
    assert needed | {"Recovery", "Preset", "Threshold boost", "Detector"} <= set(terms)


def test_links_to_other_sites_are_addresses(generated: dict[str, str]) -> None:
    for text in (*PAGES.values(), *generated.values(), (ROOT / "README.md").read_text("utf-8")):
        for link in re.findall(r"\]\((\w+:[^)\s]+)\)", text):
            parts = urlsplit(link)
            assert parts.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc), link


def test_links_between_pages_hold(generated: dict[str, str]) -> None:
    texts = {f"{name}.md": text for name, text in PAGES.items()} | generated
    for place, text in texts.items():
        for link in re.findall(r"\]\(([^):\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
            target, _, section = link.partition("#")
            path = (ROOT / "docs" / place).parent / target if target else ROOT / "docs" / place
            name = str(path.resolve().relative_to(ROOT / "docs"))
            assert name in texts or path.is_file(), f"{place}: {link}"
            assert not section or section in anchors(texts[name]), f"{place}: {link}"


def test_every_notebook_is_checked_when_it_is_executed(site: ModuleType) -> None:
    assert {p.stem for p in (ROOT / "docs" / "notebooks").glob("*.py")} == site.CHECKS.keys()


def test_a_notebook_becomes_a_page_with_its_outputs(site: ModuleType, generated: dict[str, str]) -> None:
    from nbformat import reads
    from nbformat.v4 import new_output

    notebook = reads(generated["notebooks/ten_minutes.ipynb"], 4)
    first, second, third = [cell for cell in notebook.cells if cell.cell_type == "code"][:3]
    first.outputs = [
        new_output("stream", name="stderr", text="bar"),
        new_output("stream", name="stdout", text="a line"),
    ]
    second.outputs = [new_output("display_data", {"text/html": "<b>bold</b>", "text/plain": "bold"})]
    third.outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo=\n", "text/plain": "<Figure>"})]
    page = site.notebook_page(notebook, "ten_minutes")
    assert page.startswith("# Ten minutes\n")
    assert page.count("```python\n") == sum(cell.cell_type == "code" for cell in notebook.cells)
    assert "```text\na line\n```" in page
    assert "<b>bold</b>" in page
    assert 'src="data:image/png;base64,iVBORw0KGgo="' in page
    assert "bar" not in page.split("```")[2]
    assert "planted" in page


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "a model without SAE"
    model.mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(organism.__file__).parent / "weights" / "organism" / file, model)
    text = PAGES["tutorial"].replace("path/to/my-model", str(model))
    for name, content in re.findall(r'```\w+ title="(.+?)"\n(.*?)```', text, re.S):
        (tmp_path / name).write_text(content, "utf-8")
    prompts = (ROOT / "src" / "steerback" / "data" / "prompts" / "evaluation.txt").read_text("utf-8")
    (tmp_path / "few.txt").write_text("\n".join(prompts.splitlines()[:6]), "utf-8")
    commands = re.findall(r"^    steerback (.+)$", text, re.M)
    assert len(commands) >= 7
    for command in commands:
        extra = QUICK if command.startswith("run") else ""
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(f"{command} {extra}"))
        assert stopped.value.code == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "mine" / "figure2.png").is_file()
    assert (tmp_path / "runs" / "mine" / "view.html").is_file()
