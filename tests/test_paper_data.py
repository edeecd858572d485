"""The authors' public data: complete and checked downloads, used only by preset `authors`, required by it."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from hub_server import Site, serve
from steerback.cli import main
from steerback.config import build_config
from steerback.data import paper_files as paper_data
from steerback.data.paper_files import DETECTORS, PROMPTS, PaperFile
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments import make_experiment
from steerback.experiments.detectors import read_latents
from steerback.jobs.check import check
from steerback.jobs.execute import run
from steerback.targets import label_fetch

CONTENTS = {
    PROMPTS: b"Explain how to whistle.\nExplain how to juggle.\n",
    DETECTORS: json.dumps({"model_name": "m", "off_topic_detectors": [5, 17], "detector_stats": {}}).encode(),
}
REAL = dict(paper_data.FILES)
BIG, GEMMA = "llama-3.3-70b", "gemma-2-2b"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "user"))
    monkeypatch.delenv("STEERBACK_PAPER_DATA", raising=False)
    stand_in = {
        name: PaperFile(paper_data.FILES[name].path, hashlib.sha256(data).hexdigest(), paper_data.FILES[name].what)
        for name, data in CONTENTS.items()
    }
    monkeypatch.setattr(paper_data, "FILES", stand_in)


def fill(site: Site) -> None:
    for name, data in CONTENTS.items():
        site.files[f"/{paper_data.REPOSITORY}/{paper_data.COMMIT}/{paper_data.FILES[name].path}"] = data
    for place in ("gemma-2-2b/16-gemmascope-res-16k", "gemma-2-9b/26-gemmascope-res-16k"):
        labels(site, place)
    labels(site, "gemma-2-27b/22-gemmascope-res-131k")


def labels(site: Site, place: str) -> None:
    row = {"modelId": place.split("/")[0], "layer": place.split("/")[1], "index": "3", "description": "tide pools"}
    data = gzip.compress(json.dumps(row).encode(), mtime=0)
    key = f"v1/{place}/explanations/batch-0.jsonl.gz"
    site.files["/" + key] = data
    tag = hashlib.md5(data, usedforsecurity=False).hexdigest()
    listing = f"<R><Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>{tag}</ETag></Contents></R>"
    site.files[f"/?list-type=2&prefix=v1/{place}/explanations/batch-"] = listing.encode()


def verb(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out + said.err


def fetched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    with serve(Site()) as site:
        fill(site)
        monkeypatch.setattr(paper_data, "RAW", site.url)
        monkeypatch.setattr(label_fetch, "NEURONPEDIA", site.url)
        code, said = verb(capsys, "fetch-paper-data", *options)
    assert code == 0, said
    return said


def test_real_addresses_and_hashes_are_those_of_one_commit() -> None:
    assert {f.path for f in REAL.values()} == {"data/prompts.txt", "data/off_topic_detectors.json"}
    assert all(len(f.sha256) == 64 for f in REAL.values())
    assert len(paper_data.COMMIT) == 40


def test_fetch_puts_files_into_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = fetched(monkeypatch, capsys)
    folder = tmp_path / "user" / "paper-data"
    assert {p.name for p in folder.iterdir()} == {PROMPTS, DETECTORS, "source.json"}
    assert (folder / PROMPTS).read_bytes() == CONTENTS[PROMPTS]
    noted = json.loads((folder / "source.json").read_text())
    assert noted["commit"] == paper_data.COMMIT
    assert noted["sha256"][PROMPTS] == hashlib.sha256(CONTENTS[PROMPTS]).hexdigest()
    assert load_prompts("authors") == ("Explain how to whistle.", "Explain how to juggle.")
    for target in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b"):
        assert f"{target}@authors: 1 of" in said
    assert "labels of the Llama models are not in that repository" in said
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("STEERBACK_PAPER_DATA", str(elsewhere))
    fetched(monkeypatch, capsys, "--no-labels")
    assert (elsewhere / PROMPTS).is_file()


@pytest.mark.parametrize("fault", ["broken", "wrong", "missing", "no network"])
def test_a_fetch_that_fails_is_one_line_and_leaves_nothing_half_written(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serve(Site()) as site:
        fill(site)
        monkeypatch.setattr(paper_data, "RAW", site.url)
        first = f"/{paper_data.REPOSITORY}/{paper_data.COMMIT}/{paper_data.FILES[PROMPTS].path}"
        if fault == "wrong":
            site.files[first] = b"Explain how to break in.\n"
        elif fault == "missing":
            del site.files[first]
        elif fault == "broken":
            site.break_after = [10]  # taken up again at once
        else:
            monkeypatch.setattr(paper_data, "RAW", "http://127.0.0.1:9")
        code, said = verb(capsys, "fetch-paper-data", "--no-labels")
    if fault == "broken":
        assert code == 0
        return
    assert (code, said.strip().count("\n")) == (2, 0)
    assert {"wrong": "SHA-256", "missing": "404", "no network": "cannot be reached"}[fault] in said
    assert not (tmp_path / "user" / "paper-data" / PROMPTS).exists()
    with pytest.raises(SteerbackError, match="run steerback fetch-paper-data"):
        load_prompts("authors")


def test_the_preset_refuses_without_and_no_other_preset_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = build_config("esr", (BIG,), "authors", overrides={"judge": "scripted", "engine": "scripted"})
    assert theirs.prompts == "authors"
    ours = build_config("esr", (BIG,), "specification", overrides={"judge": "scripted", "engine": "scripted"})
    known = check(ours).prompts
    with pytest.raises(SteerbackError, match=r"llama-3\.3-70b@authors has none here: run steerback labels fetch llama"):
        check(theirs)
    free = theirs.model_copy(update={"latents": (1, 2)})
    with pytest.raises(
        SteerbackError, match=r"preset authors needs the 38 object-level prompts.* run steerback fetch-"
    ):
        check(free)
    assert len(check(free.model_copy(update={"prompts": "evaluation"})).prompts) == len(known)
    gemma = build_config("esr", (GEMMA,), "authors", overrides={"judge": "scripted", "engine": "scripted"})
    with pytest.raises(SteerbackError, match="gemma-2-2b@authors has none here: run steerback fetch-paper-data"):
        check(gemma)
    fetched(monkeypatch, capsys)
    assert check(free).prompts == ("Explain how to whistle.", "Explain how to juggle.")
    assert check(gemma).targets[0].labels() == {3: "tide pools"}
    assert check(ours).prompts == known  # the files that are there change nothing else
    plain = build_config("esr", (GEMMA,), "specification", overrides={"judge": "scripted", "engine": "scripted"})
    assert check(plain).targets[0].labels() == {}


def test_an_organism_keeps_the_prompts_that_it_knows() -> None:
    config = build_config("esr", ("organism",), "authors", overrides={"engine": "transformers"})
    assert config.prompts == "evaluation"
    assert check(config).prompts == load_prompts("evaluation")


def test_their_detectors_are_used_for_their_model_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def options(experiment: str, target: str, preset: str, **own: object) -> object:
        config = build_config(experiment, (target,), preset, overrides={"options": own} if own else {})
        return make_experiment(config).options.detectors

    given = {"judge": "scripted", "engine": "scripted", "prompts": "evaluation", "latents": (1,)}
    ablation = build_config("detector-ablation", (BIG,), "authors", overrides=given)
    with pytest.raises(SteerbackError, match="needs the 25 off-topic detectors"):
        check(ablation)
    fetched(monkeypatch, capsys, "--no-labels")
    path = str(paper_data.path_of(DETECTORS))
    assert options("detector-ablation", BIG, "authors") == path
    assert check(ablation).prompts == load_prompts("evaluation")
    assert options("detector-ablation", BIG, "authors", detectors=[1]) == [1]
    assert options("detectors", BIG, "authors") is None  # the search itself
    assert options("detector-ablation", "gemma-2-9b", "authors") is None
    assert options("detector-ablation", BIG, "specification") is None
    assert paper_data.used("authors", path) == {name: f.sha256 for name, f in paper_data.FILES.items()}
    assert paper_data.used("evaluation", None) == {}
    assert read_latents(Path(path)) == [5, 17]


def test_an_altered_file_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fetched(monkeypatch, capsys, "--no-labels")
    (paper_data.folder() / PROMPTS).write_text("Explain how to cheat.\n")
    with pytest.raises(SteerbackError, match="is not the authors' file: delete it and run steerback fetch-paper-data"):
        load_prompts("authors")
    fetched(monkeypatch, capsys, "--no-labels")  # a file of another hash is fetched anew
    assert load_prompts("authors")[0] == "Explain how to whistle."


def test_a_run_writes_down_what_it_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fetched(monkeypatch, capsys)
    given = {"judge": "scripted", "engine": "scripted", "trials_per_latent": 2, "draws": 100, "n_latents": 1}
    config = build_config("esr", (GEMMA,), "authors", overrides=given)
    run(
        check(config.model_copy(update={"selection": config.selection.model_copy(update={"relevance": "off"})})),
        tmp_path / "r",
    )
    manifest = json.loads((tmp_path / "r" / "manifest.json").read_text())
    assert manifest["paper data"]["sha256"] == {PROMPTS: paper_data.FILES[PROMPTS].sha256}
    assert manifest["paper data"]["commit"] == paper_data.COMMIT
    assert manifest["prompts"]["source"] == "authors"
    assert manifest["targets"]["gemma-2-2b@authors"]["labels"]["count"] == 1
