"""Text from models, files and judges appears with escaped control characters in terminal and figures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from steerback.cli import main
from steerback.errors import SteerbackError, one_line, unknown, visible
from steerback.store.progress import Plain
from steerback.targets.labels import store_labels

HOSTILE = "a\x1b[31mred \x1b]8;;http://x.test\x07link\x1b]8;;\x07 \u202eright\u2066 b"
CONTROLS = "\x1b\x07\u202e\u2066"


def verb(*words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*words])
    assert stopped.value.code == 0


def test_control_characters_are_written_out_and_line_breaks_stay() -> None:
    assert visible("a\x1b[31m\nb\u202e") == "a\\x1b[31m\nb\\x202e"
    assert not set(CONTROLS) & set(visible(HOSTILE) + one_line(HOSTILE))


def test_imported_names_labels_and_responses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trial = {"prompt": HOSTILE, "response": HOSTILE, "score": {"attempts": [{"attempt_text": HOSTILE, "score": 30}]}}
    feature = {"feature_index_in_sae": 7, "feature_label": HOSTILE, "threshold": 8.5, "trials": [trial]}
    settings = {"model_name": HOSTILE.replace("/", ""), "judge_model_name": HOSTILE}
    variant = {"prompt_variant_id": HOSTILE, "prompt_variant_template": "{prompt} Resist."}
    paths = []
    for name, more in (("base", {}), ("variant", variant)):
        paths.append(tmp_path / f"{name}.json")
        body = {"experiment_config": settings | more, "results_by_feature": [feature]}
        paths[-1].write_text(json.dumps(body), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph")
        verb("import", *map(str, paths), "--name", "odd", "--runs", str(tmp_path))
        verb("figures", "odd", "--runs", str(tmp_path))
        verb("show", "odd", "--runs", str(tmp_path))
    shown = "".join(capfd.readouterr())
    assert "\\x1b[31mred" in shown
    assert not set(CONTROLS) & set(shown)


def test_labels(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path))
    store_labels("gemma-2-2b", {3: HOSTILE}, HOSTILE)
    verb("labels", "show", "gemma-2-2b")
    shown = "".join(capfd.readouterr())
    assert "\\x1b[31mred" in shown
    assert not set(CONTROLS) & set(shown)


def test_a_message_that_repeats_a_file_is_shortened_in_the_middle() -> None:
    said = str(unknown("preset", "p" * 100_000, ["quick"])) + str(SteerbackError(f"place: {'x' * 100_000}: fix"))
    assert len(said) < 1500
    assert said.startswith("unknown preset 'ppp")
    assert "choose one of: quickplace: xxx" in said
    assert said.endswith("xxx: fix")


def test_progress_and_errors(capfd: pytest.CaptureFixture[str]) -> None:
    Plain().note(HOSTILE)
    with pytest.raises(SystemExit):
        main(["figures", HOSTILE])
    shown = "".join(capfd.readouterr())
    assert shown.count("\\x1b[31mred") == 2
    assert not set(CONTROLS) & set(shown)
