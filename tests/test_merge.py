"""Merge joins runs with the same plan and rejects runs with other plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from authors_results import analysed, attempts, feature, result, trial, write
from planted import Runs, thresholds
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.figures import style
from steerback.published.authors import import_authors
from steerback.records import Spend
from steerback.store.facts import IMPORTED, JUDGE_SPEND
from steerback.store.ledger import Ledger
from steerback.store.merge import merge
from steerback.store.run import Run


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "save_all", lambda *given: None)  # they have tests of their own


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


def test_the_spending_on_judges_is_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds()))
    small = ("n_latents=3", "trials_per_latent=3")
    for name, spent in (("whole", Spend(10, 200, 30, 0.5)), ("half", Spend(4, 80, 12, 0.25))):
        _, folder = runs.run("esr", *small, *(["limit=5"] if name == "half" else []), name=name)
        with Run.reopen(folder) as run:
            run.add_spend("haiku", spent)
    merge([tmp_path / "half", tmp_path / "whole"], tmp_path / "joined")
    assert runs.ledger("joined").get("", JUDGE_SPEND) == {"haiku": Spend(14, 280, 42, 0.75)}


def imported(folder: Path, index: int, model: str, **config: object) -> Path:
    features = [feature(index, [trial(attempts(30)), trial(attempts(20, 60), 2, seed=5)])]
    file = write(folder.parent / f"{folder.name} results.json", result(features, config={"model_name": model} | config))
    import_authors([file], folder)
    return folder


def test_imported_runs_are_merged_or_their_clashing_trials_named(tmp_path: Path) -> None:
    a = imported(tmp_path / "a", 7, "Llama-3.1-8B", n_trials_per_feature=5)
    b = imported(tmp_path / "b", 9, "gemma-2-2b", n_trials_per_feature=10)
    merge([a, b], tmp_path / "joined")
    with Ledger(tmp_path / "joined" / "ledger.sqlite", read_only=True) as ledger:
        assert len(ledger.rows()) == 4
        files = ledger.get("", IMPORTED)
    assert files is not None
    assert files.files == ["a results.json", "b results.json"]
    assert files.counts["trials"] == 4
    assert "trials_per_latent" in files.unknown
    assert [*analysed(tmp_path / "joined").summary["targets"]] == ["llama-3.1-8b", "gemma-2-2b"]
    c = imported(tmp_path / "c", 8, "gemma-2-2b")
    message = (
        r"2 trials clash: gemma-2-2b/measure/steered/0 is latent 9, seed 123, 'Explain how rainbows form.' in b and "
        r"latent 8, .* in c; .*steered/1 .*import their files together: steerback import "
        r"'b results.json' 'c results.json' --name NAME"
    )
    with pytest.raises(SteerbackError, match=message):
        merge([b, c], tmp_path / "no")
    d = imported(tmp_path / "d", 9, "gemma-2-9b", disable_steering=True)
    with pytest.raises(SteerbackError, match=r'experiment: "esr" -> "no-steering"; import their files together'):
        merge([b, d], tmp_path / "no")
    assert not (tmp_path / "no").exists()
