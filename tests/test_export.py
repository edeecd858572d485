"""Flat exports contain each trial with its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planted import Runs, thresholds
from steerback.engines.scripted import PlantedModel
from steerback.errors import SteerbackError
from steerback.readers.tables import csv_rows
from steerback.report.export import export_flat


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        model = PlantedModel(thresholds=thresholds(), restart_rate=0.3, unscored_rate=0.05, empty_rate=0.05)
        made = Runs(tmp_path_factory.mktemp("runs"), patch, model)
        made.run("esr", "n_latents=5", "trials_per_latent=8")
        yield made


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_flat_exports_hold_every_trial(runs: Runs, tmp_path: Path, form: str) -> None:
    with runs.ledger("esr") as ledger:
        rows = ledger.rows(judge="scripted")
        if form == "parquet":
            pytest.importorskip("pyarrow")
        path = export_flat(ledger, tmp_path / f"t.{form}", "scripted", form)
        if form == "csv":
            with path.open(newline="", encoding="utf-8") as file:
                records = [{k: v or None for k, v in r.items()} for _, r in csv_rows(file.read(), "export")]
        else:
            import pyarrow.parquet as pq

            records = pq.read_table(path).to_pylist()
    assert [r["key"] for r in records] == [r.trial.key for r in rows]
    for record, row in zip(records, rows, strict=True):
        scored = row.judgement is not None and row.judgement.status == "scored"
        assert (record["attempts"] is not None) == scored
        if scored and row.judgement:
            assert float(record["first"]) == row.judgement.attempts[0].score
        assert record["response"] == row.completion.text  # type: ignore[union-attr]
        trial, lead = row.trial, row.trial.lead or (None if form == "csv" else "")
        assert (record["label"], record["prompt"], record["prefill"]) == (trial.label, trial.prompt, lead)
        assert {str(record[name]) for name in ("index", "latent", "boost", "seed")} == {
            str(value) for value in (trial.index, trial.latent, trial.boost, trial.seed)
        }
        assert str(record["latent"]) == str(trial.latent)


def test_an_unknown_form_names_the_choices(runs: Runs, tmp_path: Path) -> None:
    with runs.ledger("esr") as ledger, pytest.raises(SteerbackError, match="csv, parquet"):
        export_flat(ledger, tmp_path / "t", "scripted", "xml")
