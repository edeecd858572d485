"""Export in the authors' format and import give the same summary for every experiment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from planted import Runs
from planted_detectors import BACKTRACKER, FEW_RESPONSES, MODEL
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.experiments import REGISTRY
from steerback.jobs.execute import analysed
from steerback.published.authors import import_authors
from steerback.published.exports import export_authors
from steerback.store.run import Run

SMALL = ("n_latents=4", "trials_per_latent=6", "draws=100", "floor_responses=38")
OPTIONS = {
    "boost-sweep": ("options.levels=3",),
    "meta-prompts": ("options.variants=self-monitor",),
    "prefill-control": ("options.characters=8", "options.multiples=[1]"),
    "matched-prefix": ("options.characters=20", "options.repeats=1"),
    "random-ablation": ("options.sets=2",),
    "traces": (f"options.backtracking=[{BACKTRACKER}]",),
    "episode-statistics": (f"options.backtracking=[{BACKTRACKER}]",),
    "finetuning": ("options.adapters={root}/mix-10,{root}/mix-90", "calibration.max_iterations=8"),
    "cross-judge": ("options.sources=[{root}/esr]", "options.judges=[scripted,offline-bayes]", "judge=scripted"),
    "held-out": ("options.prompts=held-out",),
}
ALONE = ("esr", "detectors")
ELSEWHERE = {"imported"}  # no plan of its own


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        made = Runs(tmp_path_factory.mktemp("runs"), patch, MODEL)
        made.scripts = Scripts(made.scripts)
        made.run("esr", *SMALL)
        made.run("detectors", FEW_RESPONSES, base="esr")
        yield made


def adapter(folder: Path, percent: int) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}", "utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "card.json").write_text(json.dumps({"data": {"percent": percent}}), "utf-8")


class Scripts(dict[str, PlantedModel]):
    """The same model with every adapter."""

    def __missing__(self, name: str) -> PlantedModel:
        return MODEL


def summary(folder: Path, judge: str = "scripted") -> Any:
    with Run.read(folder) as run:
        return json.loads(json.dumps(analysed(run, judge).summary))


@pytest.mark.parametrize("name", sorted(REGISTRY.keys() - ELSEWHERE))
def test_an_experiment_exported_and_imported_has_the_same_summary(runs: Runs, tmp_path: Path, name: str) -> None:
    if name not in ALONE:
        if name == "finetuning":
            for percent in (10, 90):
                adapter(runs.root / f"mix-{percent}", percent)
        needs = name.split("-")[0] in ("detector", "random", "traces", "episode")
        options = [text.format(root=runs.root) for text in OPTIONS.get(name, ())]
        base = None if name == "cross-judge" else "detectors" if needs else "esr"
        runs.run(name, *options, base=base)
    with Run.read(runs.root / name) as run:
        paths = export_authors(run, tmp_path / "out", "scripted")
        rows = len(list(run.ledger.outlines()))
    result = import_authors(paths, tmp_path / "back")
    assert (result.experiment, result.counts["trials"]) == (name, rows)
    assert summary(tmp_path / "back") == summary(runs.root / name)
    with Run.read(tmp_path / "back") as run:
        again = export_authors(run, tmp_path / "again", "scripted")
    theirs = [json.loads(p.read_text())["results_by_feature"] for p in paths]
    assert [json.loads(p.read_text())["results_by_feature"] for p in again] == theirs


@pytest.mark.parametrize(
    "damage",
    [
        {"trial": {"key": "x"}},
        {"completion": {"text": "x"}},
        {"windows": [{"judge": 3}]},
        {"completion": {"text": "x", "token_ids": [], "prompt_tokens": 1, "receipt": [0, 0, 0], "activations": "?"}},
    ],
    ids=["trial", "completion", "windows", "activations"],
)
def test_a_damaged_trial_of_an_export_is_one_line(runs: Runs, tmp_path: Path, damage: dict[str, Any]) -> None:
    with Run.read(runs.root / "esr") as run:
        path = next(p for p in export_authors(run, tmp_path, "scripted") if p.name.startswith("experiment_results"))
    body = json.loads(path.read_text())
    body["results_by_feature"][0]["trials"][0]["steerback"] |= damage
    path.write_text(json.dumps(body))
    with pytest.raises(SteerbackError, match="a trial under steerback is damaged") as raised:
        import_authors([path], tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
