"""Runs of one plan are joined; runs of other plans are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from planted import Runs, thresholds
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.figures import style
from steerback.store.merge import merge
from test_authors_files import analysed


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "save", lambda *given: [])  # they have tests of their own


def test_targets_done_on_two_machines_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds()))
    runs.scripts["second"] = PlantedModel(thresholds=thresholds(12))
    small = ("n_latents=4", "trials_per_latent=4")
    both, _ = runs.run("esr", *small, targets=("planted", "second"), name="both")
    runs.run("esr", *small, targets=("planted",), name="first")
    runs.run("esr", *small, targets=("second",), name="later")
    joined = merge([tmp_path / "first", tmp_path / "later"], tmp_path / "joined")
    assert joined.repeated == 0
    assert runs.ledger("joined").dump()["trials"] == runs.ledger("both").dump()["trials"]
    assert runs.ledger("joined").dump()["judgements"] == runs.ledger("both").dump()["judgements"]
    assert analysed(tmp_path / "joined").summary["targets"] == both.summary["targets"]
    assert joined.trials == len(runs.ledger("both").rows())


def test_halves_of_a_plan_are_merged_and_repeats_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds()))
    small = ("n_latents=4", "trials_per_latent=4")
    runs.run("esr", *small, name="whole")
    runs.run("esr", *small, "limit=8", name="half")
    joined = merge([tmp_path / "half", tmp_path / "whole"], tmp_path / "joined")
    assert joined.differing == 0
    assert joined.repeated == len(runs.ledger("half").rows())
    assert runs.ledger("joined").dump()["completions"] == runs.ledger("whole").dump()["completions"]


def test_runs_of_other_plans_are_not_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds()))
    small = ("n_latents=3", "trials_per_latent=3")
    runs.run("esr", *small, name="a")
    runs.run("esr", *small, "sampling.temperature=0.9", name="b")
    with pytest.raises(SteerbackError, match=r"another plan.*temperature: 0.6 -> 0.9"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    runs.scripts["planted"] = PlantedModel(thresholds=thresholds(20))
    runs.run("esr", *small, name="d")
    with pytest.raises(SteerbackError, match=r"other (engine|thresholds|latents) for planted"):
        merge([tmp_path / "a", tmp_path / "d"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(SteerbackError, match="at least two"):
        merge([tmp_path / "a"], tmp_path / "c")
    with pytest.raises(SteerbackError, match="new run"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "b")
