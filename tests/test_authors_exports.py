"""Runs exported in the authors' format give the same numbers after import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from authors_results import analysed
from planted import Runs, thresholds
from steerback.engines.scripted import PlantedModel
from steerback.published.authors import import_authors
from steerback.published.exports import export_authors
from steerback.store.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        model = PlantedModel(thresholds=thresholds(), restart_rate=0.3, unscored_rate=0.05, empty_rate=0.05)
        made = Runs(tmp_path_factory.mktemp("runs"), patch, model)
        made.run("esr", "n_latents=5", "trials_per_latent=8")
        made.run("meta-prompts", "options.variants=self-monitor", base="esr")
        yield made


def measured(paths: list[Path]) -> list[Path]:
    """The files that the authors' own programs read."""
    return [path for path in paths if path.name.startswith("experiment_results_")]


def test_a_run_exported_and_imported_has_the_same_summary(runs: Runs, tmp_path: Path) -> None:
    with Run.read(runs.root / "meta-prompts") as run:
        paths = measured(export_authors(run, tmp_path / "out", "scripted"))
    assert len(paths) == 2
    body = json.loads(paths[0].read_text())
    assert set(body["results_by_feature"][0]) >= {"feature_index_in_sae", "feature_label", "threshold", "trials"}
    import_authors(paths, tmp_path / "back")
    before = json.loads((runs.root / "meta-prompts" / "summary.json").read_text())["targets"]["planted"]
    after = analysed(tmp_path / "back").summary["targets"]["planted"]
    for condition in ("baseline", "self-monitor"):
        for name, estimate in before["conditions"][condition]["headline"].items():
            assert after["conditions"][condition]["headline"][name]["value"] == pytest.approx(estimate["value"]), name
        assert after["conditions"][condition]["counts"] == before["conditions"][condition]["counts"]
    assert after["comparisons"]["self-monitor"]["pairs"] == before["comparisons"]["self-monitor"]["pairs"]


def test_each_file_of_a_no_steering_export_can_be_imported(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = Runs(tmp_path / "runs", patch, PlantedModel(thresholds=thresholds(), restart_rate=0.3))
        made.run("esr", "n_latents=3", "trials_per_latent=4")
        made.run("no-steering", base="esr")
    with Run.read(made.root / "no-steering") as run:
        paths = measured(export_authors(run, tmp_path / "out", "scripted"))
    assert [path.stem for path in paths] == [f"experiment_results_planted_{c}" for c in ("baseline", "unsteered")]
    for number, files in enumerate((paths, paths[:1], paths[1:])):
        import_authors(files, tmp_path / f"back{number}")
        conditions = analysed(tmp_path / f"back{number}").summary["targets"]["planted"]["conditions"]
        assert len(conditions) == len(files)
        assert all(c["counts"]["valid"] == 12 for c in conditions.values())
