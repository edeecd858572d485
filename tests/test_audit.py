"""`make audit` fails for an unlisted vulnerability, and reports services that it cannot reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import audit


def answering(tmp_path: Path, *packages: dict[str, Any]) -> str:
    """A program in the place of pip-audit."""
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps({'dependencies': packages, 'fixes': []})}\nEND\nexit 1\n")
    program.chmod(0o755)
    return str(program)


FOUND = {"name": "torch", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}
SOUND = {"name": "six", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "six", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "accepted", "code", "says"),
    [
        ([SOUND], "", 0, "0 known vulnerabilities"),
        ([SOUND, UNKNOWN, FOUND], "", 1, "PYSEC-1: torch 1.0: mended in ['1.1']"),
        ([SOUND, FOUND], "# ours\nPYSEC-1 we do not call it\n", 0, "1 known vulnerabilities, 1 of them accepted"),
        ([SOUND], "PYSEC-1 we do not call it\n", 1, "PYSEC-1 is accepted but no longer there"),
        ([UNKNOWN], "", 0, "NOTHING WAS AUDITED"),
    ],
)
def test_what_is_known_and_not_accepted_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    packages: list[dict[str, Any]],
    accepted: str,
    code: int,
    says: str,
) -> None:
    monkeypatch.setattr(audit, "ACCEPTED", tmp_path / "accepted.txt")
    (tmp_path / "accepted.txt").write_text(accepted)
    assert audit.main(answering(tmp_path, *packages)) == code
    assert says in capsys.readouterr().out


def test_a_service_that_cannot_be_reached_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "pip-audit"
    program.write_text("#!/bin/sh\necho 'ConnectionError: no network' >&2\nexit 1\n")
    program.chmod(0o755)
    assert audit.main(str(program)) == 0
    said = capsys.readouterr().out
    assert "ConnectionError: no network" in said
    assert "NOTHING WAS AUDITED" in said
