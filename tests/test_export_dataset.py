"""Dataset export: `datasets.load_dataset` gives the ledger's numbers, and nothing is uploaded without request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("pyarrow")
from planted import Runs, thresholds
from steerback.cli import main
from steerback.engines.scripted import PlantedModel
from steerback.store.facts import PROVENANCE, Provenance
from steerback.store.ledger import Ledger


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        model = PlantedModel(thresholds=thresholds(), restart_rate=0.3, unscored_rate=0.05, empty_rate=0.05)
        made = Runs(tmp_path_factory.mktemp("runs"), patch, model)
        made.run("esr", "n_latents=5", "trials_per_latent=8")
        with Ledger(made.root / "esr" / "ledger.sqlite") as ledger:
            ledger.put("planted", PROVENANCE, Provenance(planted=True))
        yield made.root / "esr"


def steerback(*words: str) -> object:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return ended.value.code


def export(base: Path, out: Path, *more: str) -> Path:
    assert steerback("export", str(base), "--format", "hf", "--out", str(out), *more) == 0
    return out / "dataset"


def test_load_dataset_reads_the_ledgers_numbers(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = export(base, tmp_path)
    script = (
        "import datasets, json, sys\n"
        "loaded = datasets.load_dataset(sys.argv[1], cache_dir=sys.argv[2])\n"
        "assert list(loaded) == ['train']\n"
        "names = ['key', 'response', 'attempts', 'first', 'last', 'boost', 'status']\n"
        "json.dump([[r[n] for n in names] for r in loaded['train']], open(sys.argv[3], 'w'))\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    out = tmp_path / "rows.json"
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "cache"), str(out)], check=True, env=env)
    read = {key: rest for key, *rest in json.loads(out.read_text())}
    with Ledger(base / "ledger.sqlite", read_only=True) as ledger:
        rows = ledger.rows(judge="scripted")
    assert read.keys() == {r.trial.key for r in rows}
    for row in rows:
        attempts = row.attempts
        scores = [len(attempts), attempts[0].score, attempts[-1].score] if attempts else [None] * 3
        text = row.completion.text if row.completion else None
        status = row.judgement.status if row.judgement else None
        assert read[row.trial.key] == [text, *scores, row.trial.boost, status]


def test_the_card_names_target_judge_rates_and_planted_behaviour(base: Path, tmp_path: Path) -> None:
    card = (export(base, tmp_path, "--license", "mit") / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "mit"
    assert "planted" in body
    assert "`scripted`" in body
    condition, measured = next(
        iter(json.loads((base / "summary.json").read_text())["targets"]["planted"]["conditions"].items())
    )
    rate = measured["headline"]["multi_attempt_rate"]
    assert f"| {condition} |" in body
    assert f"{rate['value'] * 100:.1f} % [{rate['low'] * 100:.1f}, {rate['high'] * 100:.1f}]" in body


def test_exporting_again_leaves_no_shard_of_before(base: Path, tmp_path: Path) -> None:
    folder = export(base, tmp_path)
    files = sorted(p.name for p in (folder / "data").iterdir())
    (folder / "data" / "trials-99999.parquet").write_bytes(b"old")
    assert sorted(p.name for p in (export(base, tmp_path) / "data").iterdir()) == files


@pytest.mark.parametrize(
    "words",
    [["--format", "hf", "--push", "no-owner"], ["--format", "hf", "--push", "../x/y"], ["--push", "me/x"]],
)
def test_a_wrong_push_is_one_line_before_anything_is_written(
    base: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert steerback("export", str(base), "--out", str(tmp_path / "x"), *words) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Address of a hub that accepts datasets with the token "good", and the (path, body) of each request to write."""
    written: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(200, [] if "/tree/" in self.path else {"id": "me/esr", "sha": "0" * 40, "siblings": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer good":
                return self.answer(401, {"error": "Invalid token"})
            written.append((self.path, body))
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
                return self.answer(200, {"files": modes})
            page = f"http://{self.headers['Host']}/datasets/me/esr"
            return self.answer(200, {"url": page, "commitUrl": f"{page}/commit/1", "commitOid": "1" * 40})

        def answer(self, code: int, said: object) -> None:
            data = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", written
    server.shutdown()
    server.server_close()


def pushed(base: Path, out: Path, address: str, token: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's address is read at import."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(out / "home"), "HF_HUB_OFFLINE": "0"}
    words = ["export", str(base), "--format", "hf", "--out", str(out), "--push", "me/esr"]
    return subprocess.run([sys.executable, "-m", "steerback", *words], env=env, capture_output=True, text=True)


def test_push_uploads_card_and_shards(base: Path, tmp_path: Path, hub: tuple[str, list[tuple[str, bytes]]]) -> None:
    address, written = hub
    done = pushed(base, tmp_path, address, "good")
    assert done.returncode == 0, done.stderr
    created = next(json.loads(body) for path, body in written if path.endswith("/repos/create"))
    assert (created["type"], created["name"]) == ("dataset", "esr")
    commit = next(body for path, body in written if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    names = {line["value"]["path"] for line in lines if line["key"] == "file"}
    folder = tmp_path / "dataset"
    assert names == {"README.md", *(f"data/{p.name}" for p in (folder / "data").iterdir())}


def test_a_refused_push_is_one_line_and_keeps_the_folder(
    base: Path, tmp_path: Path, hub: tuple[str, list[tuple[str, bytes]]]
) -> None:
    done = pushed(base, tmp_path, hub[0], "bad")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "hf auth login" in done.stderr
    assert (tmp_path / "dataset" / "README.md").is_file()
