"""Ledgers of steerback 0.1.0 can be opened and give the same numbers."""

from __future__ import annotations

import gzip
import json
import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from steerback.jobs.execute import analysed
from steerback.store.facts import CONFIG
from steerback.store.ledger import Ledger
from steerback.store.run import Run

STORED = Path(__file__).parent / "data" / "ledgers-0.1"
RUNS = ("boost-sweep", "random-ablation", "traces")


def opened(name: str, folder: Path) -> Run:
    (folder / "ledger.sqlite").write_bytes(gzip.decompress((STORED / f"{name}.sqlite.gz").read_bytes()))
    return Run.read(folder)


def differences(before: object, now: object, where: str = "") -> list[str]:
    """Places at which `now` lacks or changes what `before` holds; what it adds does not count."""
    if isinstance(before, dict):
        if not isinstance(now, dict):
            return [where]
        return [d for key in before for d in differences(before[key], now.get(key), f"{where}.{key}")]
    if isinstance(before, list):
        if not isinstance(now, list) or len(now) != len(before):
            return [where]
        return [d for i, (a, b) in enumerate(zip(before, now, strict=True)) for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(before, float) and isinstance(now, int | float):
        same = math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(before) and math.isnan(now))
        return [] if same else [f"{where}: {before} -> {now}"]
    return [] if before == now else [f"{where}: {before!r} -> {now!r}"]


@pytest.mark.parametrize("name", RUNS)
def test_a_ledger_of_0_1_gives_the_numbers_that_0_1_gave(name: str, tmp_path: Path) -> None:
    with opened(name, tmp_path) as run:
        assert len(run.ledger.rows()) > 100
        config = run.ledger.get("", CONFIG) or {}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:  # 0.1.0 left degraded responses out, and had no setting
        ledger.put("", CONFIG, {**config, "degraded": "exclude"})
    with Run.read(tmp_path) as run:
        summary = json.loads(json.dumps(analysed(run, run.config.judge).summary))
    before = json.loads(gzip.decompress((STORED / f"{name}.summary.json.gz").read_bytes()))
    assert differences(before, summary) == []


@pytest.mark.parametrize("name", RUNS)
def test_boosts_are_what_interventions_add(name: str, tmp_path: Path) -> None:
    """0.1.0 kept the boost of a trial next to its interventions; the column is the reference."""
    with opened(name, tmp_path) as run:
        rows = run.ledger.rows()
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as file:
            columns = dict(file.execute("SELECT key, boost FROM trials"))
    assert {r.trial.key: r.trial.boost for r in rows} == columns
