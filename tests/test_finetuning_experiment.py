"""Fine-tuning experiment: adapters with the latents and prompts of the base, own thresholds, four conditions."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from steerback.analysis.finetuning import Ending, endings
from steerback.calibration.thresholds import THRESHOLDS
from steerback.cli import main
from steerback.config import build_config
from steerback.data.prompts import load_prompts
from steerback.engines.base import Engine
from steerback.engines.options import VllmOptions
from steerback.engines.scripted import PlantedModel
from steerback.figures.finetuning import ending_lines
from steerback.jobs import check
from steerback.jobs.execute import KeptEngine
from steerback.records import Attempt, Completion, Judgement, Receipt, Trial
from steerback.store.facts import LATENTS
from steerback.store.ledger import Ledger, Row
from steerback.store.progress import Silent
from steerback.targets import Target

SMALL = [
    *("--preset", "quick", "--engine", "scripted", "--judge", "scripted"),
    *("--set", "n_latents=4", "--set", "trials_per_latent=10", "--set", "draws=200", "--set", "floor_responses=38"),
    *("--set", "calibration.max_iterations=8", "--set", "calibration.verify_trials=4"),
]
RATES = {10: 0.1, 50: 0.4, 90: 0.8}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    plant(monkeypatch)


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted engine as the base, or as an adapter whose folder says how often it restarts."""
    from steerback import engines
    from steerback.engines import scripted

    class Adapted(scripted.ScriptedEngine):
        def __init__(self, script: Any, target: str, **options: Any) -> None:
            percent = int(target.rpartition("mix-")[2]) if "+" in target else 0
            rate = RATES.get(percent, 0.0)
            # every adapter moves the thresholds, so that those of the base would not do
            super().__init__(
                PlantedModel(threshold=35 + percent / 10, slope=4, restart_rate=rate), target=target, **options
            )

    monkeypatch.setattr(scripted, "ScriptedEngine", Adapted)
    assert engines.make_engine


def adapters(folder: Path) -> Path:
    for percent in RATES:
        own = folder / f"mix-{percent}"
        own.mkdir(parents=True)
        (own / "adapter_config.json").write_text("{}", "utf-8")
        (own / "adapter_model.safetensors").write_bytes(b"")
        (own / "card.json").write_text(json.dumps({"data": {"percent": percent}}), "utf-8")
    return folder


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@dataclass
class Serving:
    """An engine whose processes answer for the model alone and for the adapters of its options."""

    target: Target
    options: VllmOptions
    log: list[str]

    def serving(self, target: Target) -> Serving | None:
        if target.adapter is not None and target.adapter not in self.options.adapters:
            return None
        self.log.append(f"serve {target.name}")
        return replace(self, target=target)

    def close(self) -> None:
        self.log.append("close")


def test_one_engine_of_vllm_serves_the_base_and_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for member in vars(Engine):
        if not member.startswith("_") and not hasattr(Serving, member):
            monkeypatch.setattr(Serving, member, print, raising=False)
    assert steerback("run", "esr", "-t", "organism-control", "--name", "base", *SMALL) == 0
    monkeypatch.setattr(check, "check_engine", lambda *_: VllmOptions())
    chosen = {"options": {"adapters": [str(adapters(tmp_path / "adapters"))]}}
    base = check.start_from(tmp_path / "runs" / "base")
    job = check.check(build_config("finetuning", ("organism-control",), overrides=chosen, base=base))
    assert isinstance(job.engine, VllmOptions)
    assert [Path(folder).name for folder in job.engine.adapters] == [f"mix-{p}" for p in RATES]
    log: list[str] = []

    def start(target: Target, options: Any) -> Any:
        log.append(f"start {target.name}")
        return Serving(target, options, log)

    job = replace(job, makers=replace(job.makers, engine=start))
    with closing(KeptEngine()) as engines:
        for target in (*job.targets, job.targets[1], job.targets[1], replace(job.targets[0], name="other")):
            engine = engines.of(target, job, tmp_path, Silent())
            assert engine.target == target  # type: ignore[attr-defined]
        foreign = job.targets[0].with_adapter(tmp_path / "foreign")
        engines.of(foreign, job, tmp_path, Silent())
    names = [target.name for target in job.targets]
    served = [f"serve {name}" for name in [*names[1:], names[1], "other"]]
    assert log == [f"start {names[0]}", *served, "close", f"start {foreign.name}", "close"]


def test_adapters_are_measured_like_their_base_and_set_against_the_mix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no row of the table wraps
    assert steerback("run", "esr", "-t", "organism-control", "--name", "base", *SMALL) == 0
    place = adapters(tmp_path / "adapters")
    run = ["run", "finetuning", "--from", "base", "--name", "ft", "--set", f"options.adapters={place}"]
    assert steerback(*run) == 0
    said = capsys.readouterr().out
    assert "no unsteered restart at any mix" in said
    folder = tmp_path / "runs" / "ft"
    assert {"figure6.png", "figure6.pdf", "trends.csv", "table.txt", "comparisons.txt"} <= {
        p.name for p in folder.iterdir()
    }
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        names = ["organism-control", *(f"organism-control+mix-{p}" for p in RATES)]
        conditions = {target: [c for t, c in ledger.conditions() if t == target] for target in names}
        assert all(len(found) == 4 for found in conditions.values())
        base = ledger.rows("organism-control", "measure", "steered")
        held_out = set(load_prompts("organism-held-out"))
        for name, percent in zip(names[1:], RATES, strict=True):
            assert ledger.get(name, LATENTS) == ledger.get("organism-control", LATENTS)
            found = {t.latent: t.threshold.boost for t in ledger.get(name, THRESHOLDS)}
            assert all(abs(boost - (35 + percent / 10)) < 4 for boost in found.values())  # calibrated anew
            rows = {c: ledger.rows(name, "measure", c) for c in conditions[name]}
            there = {r.trial.index: r.trial for r in base}
            for row in rows["steered"]:
                twin = there[row.trial.index]
                assert (row.trial.latent, row.trial.prompt, row.trial.seed) == (twin.latent, twin.prompt, twin.seed)
                assert row.trial.boost == found[row.trial.latent]
            assert {r.trial.prompt for r in rows["held-out"]} <= held_out
            assert all(not r.trial.interventions for r in rows["unsteered"] + rows["held-out unsteered"])
            assert len(rows["unsteered"]) == len(base)
            assert not ledger.rows(name, "reference")  # the yardstick is the base's
    summary = json.loads((folder / "summary.json").read_text("utf-8"))["targets"]["organism-control"]
    rates = [summary["conditions"][f"mix-{p}"]["headline"]["multi_attempt_rate"]["value"] for p in RATES]
    assert rates == sorted(rates)
    assert rates[2] > 0.6
    assert summary["conditions"]["base"]["headline"]["multi_attempt_rate"]["value"] == 0
    assert summary["comparisons"]["mix-90"]["against"] == "base"
    assert summary["comparisons"]["mix-90 held-out"]["against"] == "base held-out"
    found = summary["finetune"]
    assert found["percents"] == [10, 50, 90]
    assert found["attempts_last"]["value"] > 1.5
    assert found["attempts_base"]["value"] == 1.0
    assert found["msi_peak_at"]["value"] == 0.9
    slope = found["trends"]["multi_attempt_rate"]
    assert slope["slope"] == pytest.approx((rates[2] - rates[0]) / 80, rel=0.2)
    assert slope["p"] < 0.05
    capsys.readouterr()
    assert steerback("compare", "ft") == 0
    shown = capsys.readouterr().out
    assert "mean attempts, fine-tuned on most corrections" in shown
    assert f"{found['attempts_last']['value']:.1f}"[:3] in shown
    assert steerback("judge", "ft", "--judge", "offline") == 0
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        for name in names:  # adapters are compared with their base's responses
            verdicts = [r.judgement for r in ledger.rows(name, "measure", judge="offline")]
            assert sum(v is not None and v.status == "scored" for v in verdicts) > 0.9 * len(verdicts)
    assert steerback("resume", "ft") == 0  # nothing is generated again; the analysis is the same
    again = json.loads((folder / "summary.json").read_text("utf-8"))["targets"]["organism-control"]
    assert again == summary


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert steerback(*arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "give --from" in refused("run", "finetuning", "-t", "organism-control")
    assert steerback("run", "esr", "-t", "organism-control", "--name", "base", *SMALL) == 0
    assert "options.adapters=FOLDER" in refused("run", "finetuning", "--from", "base")
    said = refused("run", "finetuning", "--from", "base", "--set", f"options.adapters={tmp_path}")
    assert "no adapter in" in said
    assert "no LoRA adapter there" in refused("run", "esr", "-t", f"organism-control+{tmp_path}")
    assert "unknown target 'nothing+x'" in refused("run", "esr", "-t", "nothing+x")


def test_endings_tell_what_the_length_limit_cut_off() -> None:
    """By hand: single attempts, degraded and unscored responses count for neither part."""
    trial = Trial("t/measure/steered/0", "t", "measure", "steered", 0, "prompt", 1, 3)

    def row(finish: Any, *scores: float, text: str = "First about cats. Wait, no. Then about rivers and hills.") -> Row:
        half = len(text) // 2
        spans = [Attempt(half * n, half * (n + 1), score, "Wait" if n else "") for n, score in enumerate(scores)]
        judged = (
            Judgement("j", "r", "scored", tuple(spans)) if spans else Judgement("j", "r", "unscored", reason="none")
        )
        return Row(trial, Completion(text, (1, 2), 3, finish, Receipt()), judged)

    repeated = "no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no no"
    rows = [row("stop", 10, 80), row("stop", 20, 30), row("length", 50, 10), row("stop", 90), row("length", 5)]
    rows += [row("length"), row("length", 50, 0, text=repeated)]
    assert endings(rows, include_degraded=False) == {"ended": Ending(2, 40.0), "cut": Ending(1, -40.0)}
    assert "1 multi-attempt responses were cut" in ending_lines("x", endings(rows, include_degraded=False))[0]
    assert endings(rows, include_degraded=True)["cut"].n == 2
    assert endings(rows[3:6], include_degraded=True) == {}
    assert ending_lines("x", {}) == []
