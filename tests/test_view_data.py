"""Data of the viewer without a browser: samples of limited size, and activations that are read again."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from labelled import make_run, text_of, verdict
from steerback.config import RunConfig
from steerback.engines import check_engine, make_engine
from steerback.engines.base import Engine, finish
from steerback.errors import SteerbackError
from steerback.jobs.view import ViewSettings, write_view
from steerback.records import (
    Completion,
    Intervention,
    Recording,
    Request,
    Sampling,
    Trial,
)
from steerback.report.view_sample import sampled
from steerback.report.view_trials import STAGES, ShownRun
from steerback.store.facts import DETECTOR_SET, ENGINE, Detector, DetectorSet, EngineIdentity
from steerback.store.run import Run
from steerback.targets import resolve

if TYPE_CHECKING:
    pass

STEERED, DETECTOR, SILENT = 7, 40, 41
SEVERAL = text_of(True)
WORDS = SEVERAL.split(" ")
PROMPT_TOKENS = 3


def unpacked(text: str, part: str) -> Any:
    """A compressed part of a page."""
    found = re.search(f'id="{part}">([^<]*)<', text)
    assert found is not None
    return json.loads(zlib.decompress(base64.b64decode(found.group(1))))


def test_responses_that_take_too_much_room_are_sampled(tmp_path: Path) -> None:
    place = make_run(tmp_path / "run", {"plain": [[n % 2 == 0 for n in range(20)] for _ in range(6)]})
    with Run.read(place) as run:
        shown = [ShownRun(run, "machine")]
        whole, _, chunks = sampled(shown, STAGES, 5000, room=10**9)
        assert (len(whole.keys), whole.total, whole.why) == (120, 120, "")
        room = len(chunks[0]) + len(chunks[1]) + 10
        part, light, fewer = sampled(shown, STAGES, 5000, room)
    assert sum(map(len, fewer)) <= room
    assert 20 <= len(part.keys) < 60
    assert part.total == 120
    assert "MB of responses" in part.why
    assert light["columns"]["key"] == [key for _, key in part.keys]
    latents = {int(key.split("/")[-1]) // 20 for _, key in part.keys}
    assert latents == set(range(6))


def test_record_reads_the_activations_that_the_response_had(tmp_path: Path) -> None:
    place, target = tmp_path / "plain", resolve("organism-s")
    engine = make_engine(target, check_engine("transformers", {}))
    steered = (Intervention("add", 5, 12.0),)
    record = Recording((5, 9, 11))
    trial = Trial(
        "organism-s/measure/baseline/0",
        "organism-s",
        "measure",
        "baseline",
        0,
        "Why is the sky blue?",
        3,
        5,
        "x",
        interventions=steered,
    )
    done = finish(_one(engine, replace(trial, record=record).request(Sampling(max_new_tokens=30))))
    config = RunConfig(experiment="imported", targets=("organism-s",), judge="machine", engine="transformers")
    with Run.start(place, config) as run:
        run.ledger.add_trials([trial])
        run.ledger.add_completions([(trial.key, replace(done, activations=None), engine.fingerprint)])
        run.ledger.add_judgements([(trial.key, verdict("machine", False, text=done.text))])
        detectors = [Detector(latent=k, label=f"label {k}", level=1.0, auc=1.0) for k in (9, 11)]
        run.ledger.put("organism-s", DETECTOR_SET, DetectorSet(source="test", detectors=detectors))
        run.ledger.put(
            "organism-s", ENGINE, EngineIdentity(fingerprint=engine.fingerprint, engine=dict(engine.describe()))
        )
    page = write_view([place], tmp_path / "view.html", ViewSettings(record=True)).read_text("utf-8")
    (detail,) = unpacked(page, "chunk-0")
    assert detail["ends"] == engine.token_ends(done)
    acts = detail["acts"]
    shares = np.frombuffer(base64.b64decode(acts["values"]), "<u2").reshape(len(acts["latents"]), -1)
    read = {latent: row / 65535 * peak for (latent, _, _, peak), row in zip(acts["latents"], shares, strict=True)}
    assert done.activations is not None
    for column, latent in enumerate(record.latents):
        wanted = done.activations[done.prompt_tokens :, column]
        np.testing.assert_allclose(read.get(latent, np.zeros(len(wanted))), wanted, atol=1e-4 * max(wanted.max(), 1))
    assert {latent for latent, *_ in [*acts["latents"], *acts["silent"]]} == {5, 9, 11}
    with pytest.raises(SteerbackError, match="no valid response of trial 'nothing'"):
        write_view([place], tmp_path / "view.html", ViewSettings(record=True, trials=("nothing",)))
    with Run.reopen(place) as run:
        other = {**engine.describe(), "sae": "another"}
        run.ledger.put("organism-s", ENGINE, EngineIdentity(fingerprint="x", engine=other))
    with pytest.raises(SteerbackError, match="used another organism-s: sae differ"):
        write_view([place], tmp_path / "view.html", ViewSettings(record=True))


async def _one(engine: Engine, request: Request) -> Completion:
    (done,) = [done async for _, done in engine.generate([request])]
    return done
