"""Label files: every format, interrupted downloads, damaged files, and precedence of two labels for a latent."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_server import Site, serve
from steerback import readers
from steerback.cli import main
from steerback.errors import SteerbackError
from steerback.targets import label_fetch, resolve
from steerback.targets.labels import read_label_file, read_labels, read_user_labels, store_labels, user_labels_folder

PLACE = "gemma-2-2b/16-gemmascope-res-16k"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "user"))


def verb(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 0


def explanation(index: int, text: str | None, place: str = PLACE) -> str:
    """A line of Neuronpedia's export, with fields that nobody reads."""
    model, _, layer = place.partition("/")
    row = {"id": f"x{index}", "modelId": model, "layer": layer, "index": str(index), "description": text}
    return json.dumps(
        row | {"explanationModelName": "gpt-4o-mini", "typeName": "oai_token-act-pair", "embedding": [0.5]}
    )


def batch(*rows: str) -> bytes:
    return gzip.compress("\n".join(rows).encode(), mtime=0)


def test_formats_say_the_same(tmp_path: Path) -> None:
    wanted = {0: 'quotes, "commas" and ünïcode', 7: "whale anatomy", 12: "two lines"}
    texts = {0: 'quotes, "commas" and ünïcode', 7: " whale anatomy ", 12: "two\nlines", 3: "", 5: "feature_5"}
    quoted = {k: '"' + v.replace('"', '""') + '"' for k, v in texts.items()}
    (tmp_path / "plain.csv").write_text("index,label\n" + "".join(f"{k},{v}\n" for k, v in quoted.items()))
    goodfire = "index_in_sae,label,status,notes,uuid\n" + "".join(f"{k},{v},public,,u-{k}\n" for k, v in quoted.items())
    (tmp_path / "goodfire.csv").write_bytes(b"\xef\xbb\xbf" + goodfire.encode())
    lines = [explanation(k, v) for k, v in texts.items()]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "lines.jsonl.gz").write_bytes(batch(*lines))
    (tmp_path / "list.json").write_text("[" + ",".join(lines) + "]")
    (tmp_path / "table.json").write_text(json.dumps({str(k): v for k, v in texts.items()}))
    for name in ("plain.csv", "goodfire.csv", "lines.jsonl", "lines.jsonl.gz", "list.json", "table.json"):
        found = read_label_file(tmp_path / name)
        assert found.labels == wanted, name
        assert found.empty == 2, name  # a missing label is missing, and a stand-in for one is none
    assert found.origins == set()
    assert read_label_file(tmp_path / "lines.jsonl.gz").origins == {PLACE, "by gpt-4o-mini"}


def test_a_folder_is_read_in_order_and_the_first_label_of_a_latent_stays(tmp_path: Path) -> None:
    (tmp_path / "batch-10.jsonl.gz").write_bytes(batch(explanation(1, "late"), explanation(2, "b")))
    (tmp_path / "batch-2.jsonl.gz").write_bytes(batch(explanation(1, "early")))
    (tmp_path / "README").write_text("not a label file")
    found = read_label_file(tmp_path)
    assert (found.labels, found.repeated) == ({1: "early", 2: "b"}, 1)
    (tmp_path / "batch-11.jsonl.gz").write_bytes(batch(explanation(3, "c", "gemma-2-9b/20-gemmascope-res-16k")))
    with pytest.raises(SteerbackError, match="labels of different SAEs: gemma-2-2b/16"):
        read_label_file(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"latent,name\n1,x\n", "needs the columns index and label, has latent, name"),
        ("a.csv", b"index,label\none,x\n", "line 2: 'one' is not the index"),
        ("a.csv", b"index,label\n-1,x\n", "index -1 is negative"),
        ("a.csv", b'index,label\n1,"x\n', "not a readable table"),
        ("a.csv", b"", "has none"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read"),
        ("a.jsonl", b'{"index": 1, "description": "x"}\n{"index": 2', "line 2 is not valid JSON"),
        ("a.jsonl", b"[1, 2]\n", "expected"),
        ("a.jsonl.gz", batch(explanation(1, "x"))[:20], "is damaged"),
        ("a.jsonl.gz", b"\x1f\x8bnonsense", "is damaged"),
        ("a.json", b"3", "must be a list or an object of labels"),
        ("a.csv", b"index,label\n1," + b"x" * 2001 + b"\n", "line 2: the label of latent 1 has 2,001 characters"),
        ("a.csv", b"index,label\n1," + b"x" * 200_000 + b"\n", "the label of latent 1 has 200,000 characters"),
        ("a.json", b'{"7": "' + b"x" * 200_000 + b'"}', "the label of latent 7 has 200,000 characters; shorten it"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SteerbackError, match=message) as caught:
        read_label_file(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(SteerbackError, match="no label file there"):
        read_label_file(tmp_path / "nowhere")


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=8))
def test_any_damage_is_a_clear_error_or_fewer_labels(
    tmp_path_factory: pytest.TempPathFactory, cut: int, noise: bytes
) -> None:
    whole = batch(*(explanation(k, f"label {k}") for k in range(20)))
    path = tmp_path_factory.mktemp("fuzz") / "batch-0.jsonl.gz"
    path.write_bytes(whole[:cut] + noise)
    try:
        found = set(read_label_file(path).labels)
    except SteerbackError as error:
        found, said = set(), str(error)
    else:
        said = str(path)
    assert found <= set(range(20))
    assert str(path) in said


def test_labels_that_are_there_stay_unless_overwritten() -> None:
    organism = resolve("organism")
    shipped = organism.own_labels()
    k, label = next(iter(shipped.items()))
    free = next(n for n in range(organism.n_latents) if n not in shipped)
    first = store_labels("organism", {k: "mine", free: "new"}, "a test", taken=shipped)
    assert (first.written, first.kept) == (1, 1)
    assert organism.labels()[k] == label
    assert organism.labels()[free] == "new"
    again = store_labels("organism", {free: "newer"}, "another")
    assert (again.written, again.kept, organism.labels()[free]) == (0, 1, "new")
    over = store_labels("organism", {k: "mine", free: "newer"}, "another", taken=shipped, overwrite=True)
    assert (over.written, organism.labels()[k], organism.labels()[free]) == (2, "mine", "newer")
    assert read_user_labels("organism")[free].source == "another"
    assert len(organism.labels()) == len(shipped) + 1
    assert organism.own_labels() == shipped


def test_a_targets_table_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a run asks for the label of every latent; a table of 16,384 latents takes a quarter of a second to read
    table, read = tmp_path / "labels.csv", list[str]()
    table.write_text("index,label\n1,volcanoes\n")
    text_of = readers.read_text
    monkeypatch.setattr(readers, "read_text", lambda *a, **k: read.append(str(a[0])) or text_of(*a, **k))
    for _ in range(3):
        assert read_labels(tmp_path) == {1: "volcanoes"}
    assert read == [str(table)]
    read_labels(tmp_path).clear()  # a caller's change stays with the caller
    assert read_labels(tmp_path) == {1: "volcanoes"}
    table.write_text("index,label\n1,volcanoes\n2,rain\n")
    assert read_labels(tmp_path) == {1: "volcanoes", 2: "rain"}


def test_a_label_too_long_to_be_one_leaves_the_table_as_it_was() -> None:
    store_labels("organism", {1: "x"}, "a test")
    with pytest.raises(SteerbackError, match="a judge: the label of latent 2 has 200,000 characters"):
        store_labels("organism", {2: "y" * 200_000, 3: "z"}, "a judge")
    assert set(read_user_labels("organism")) == {1}


def test_labels_like_formulas_are_stored_quoted_and_read_back_unchanged(tmp_path: Path) -> None:
    labels = {1: "=cmd|' /C calc'!A0", 2: "+plus", 3: "-ing verbs", 4: "@home", 5: "'=quoted", 6: "-", 7: "plain"}
    stored = store_labels("organism", labels, "@someone")
    cells = [line.split(",")[1] for line in stored.path.read_text().splitlines()[1:]]
    assert not [cell for cell in cells if cell[0] in "=+-@" and cell != "-"]
    assert {k: n.label for k, n in read_user_labels("organism").items()} == labels
    assert read_user_labels("organism")[1].source == "@someone"
    assert read_label_file(stored.path).labels == labels
    theirs = tmp_path / "theirs.csv"  # an apostrophe in a table of others belongs to the label
    theirs.write_text("index,label\n1,'-ing' endings\n")
    assert read_label_file(theirs).labels == {1: "'-ing' endings"}


def test_a_damaged_table_of_the_user_is_named() -> None:
    store_labels("organism", {1: "x"}, "a test")
    path = user_labels_folder("organism") / "labels.csv"
    path.write_text("index,label,source\none,x,y\n")
    with pytest.raises(SteerbackError, match=r"labels\.csv, line 2: 'one' is not the index"):
        resolve("organism").labels()


def bucket(site: Site, batches: list[bytes], page: int = 2) -> None:
    """Neuronpedia's bucket: objects, and their listing in pages."""
    prefix = f"v1/{PLACE}/explanations/batch-"
    keys = [f"{prefix}{n}.jsonl.gz" for n in range(len(batches))]
    entries = []
    for key, data in zip(keys, batches, strict=True):
        site.files["/" + key] = data
        tag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        entries.append(f"<Contents><Key>{key}</Key><Size>{len(data)}</Size><ETag>&quot;{tag}&quot;</ETag></Contents>")
    for start in range(0, max(len(entries), 1), page):
        token = f"&continuation-token={start}" if start else ""
        more = start + page < len(entries)
        follow = f"<NextContinuationToken>{start + page}</NextContinuationToken>" if more else ""
        body = "".join(entries[start : start + page])
        site.files[f"/?list-type=2&prefix={prefix}{token}"] = (
            f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{body}{follow}</ListBucketResult>'
        ).encode()


def test_fetch_from_neuronpedia_resumes_and_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[explanation(10 * n + k, f"label {10 * n + k}") for k in range(10)] for n in range(3)]
    with serve(Site()) as site:
        monkeypatch.setattr(label_fetch, "NEURONPEDIA", site.url)
        bucket(site, [batch(*r) for r in rows])
        name = f"/v1/{PLACE}/explanations/batch-2.jsonl.gz"
        site.status[name] = 503
        with pytest.raises(SteerbackError, match="503"):
            label_fetch.fetch_labels("organism", f"neuronpedia:{PLACE}")
        assert read_user_labels("organism") == {}
        folder = user_labels_folder("organism") / "fetched"
        assert sorted(p.name for p in folder.rglob("*.gz")) == ["batch-0.jsonl.gz", "batch-1.jsonl.gz"]
        del site.status[name]
        site.seen.clear()
        site.break_after = [150, 20]  # a listing page breaks, then the last batch
        verb("labels", "fetch", "organism", "--from", f"neuronpedia:{PLACE}")
        asked = [path for _, path, _ in site.seen if path.endswith(".gz")]
        assert asked == [name, name] or asked == [name]  # the others were there
    said = capsys.readouterr().out
    target = resolve("organism")
    taken = [k for k in range(30) if k in target.own_labels()]
    assert f"{30 - len(taken)} labels written" in said
    assert f"{len(taken)} latents had one and keep it" in said
    assert all(target.labels()[k] == f"label {k}" for k in range(30) if k not in taken)
    source = read_user_labels("organism")[next(k for k in range(30) if k not in taken)].source
    assert source == f"neuronpedia:{PLACE} by gpt-4o-mini"
    noted = json.loads(next(folder.glob("*.json")).read_text())
    assert noted["sha256"]["batch-0.jsonl.gz"] == hashlib.sha256(batch(*rows[0])).hexdigest()
    assert noted["labels"] == 30


def test_what_is_not_the_listed_file_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(Site()) as site:
        monkeypatch.setattr(label_fetch, "NEURONPEDIA", site.url)
        bucket(site, [batch(explanation(1, "a"))])
        name = f"/v1/{PLACE}/explanations/batch-0.jsonl.gz"
        right = site.files[name]
        site.files[name] = right[:-1] + bytes([right[-1] ^ 1])  # as long, and another MD5
        with pytest.raises(SteerbackError, match="differs from Neuronpedia's listing; run again"):
            label_fetch.fetch_labels("t", f"neuronpedia:{PLACE}")
        assert not list(user_labels_folder("t").rglob("*.gz"))
        site.files[name] = right
        assert label_fetch.fetch_labels("t", f"neuronpedia:{PLACE}").labels.labels == {1: "a"}


def test_fetch_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: str | None) -> str:
        with pytest.raises(SystemExit) as left:
            main(["labels", "fetch", "organism", *(["--from", source] if source else [])])
        said = capsys.readouterr().err.strip()
        assert (left.value.code, said.count("\n")) == (2, 0)
        assert read_user_labels("organism") == {}
        return said

    assert "no public labels are known for organism" in refused(None)
    assert "is not one of neuronpedia:MODEL/SOURCE" in refused("ftp://x")
    assert "must have the form neuronpedia:MODEL/SOURCE" in refused("neuronpedia:gemma")
    assert "must have the form hub:" in refused("hub:owner/name")
    assert "is not a label file" in refused("https://example.invalid/labels.parquet")
    with serve(Site()) as site:
        monkeypatch.setattr(label_fetch, "NEURONPEDIA", site.url)
        bucket(site, [])
        assert f"Neuronpedia has no explanations for {PLACE}" in refused(f"neuronpedia:{PLACE}")
        site.files["/labels.csv"] = b"index,label\n99999,x\n"
        site.files["/empty.csv"] = b"index,label\n1,\n"
        assert "labels latent 99999, and the SAE of organism has 1024" in refused(f"{site.url}/labels.csv")
        assert "contain no label" in refused(f"{site.url}/empty.csv")
        assert "404" in refused(f"{site.url}/nothing.csv")
        gone = site.url
    assert "cannot be reached" in refused(f"{gone}/other.csv")


def test_import_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "goodfire.csv").write_text(
        f"index_in_sae,label,status,notes,uuid\n0,tide pools{' of rock' * 100},public,,a\n1,,public,,b\n"
    )
    verb("labels", "import", "organism", str(tmp_path / "goodfire.csv"))
    shipped = len(resolve("organism").own_labels())
    assert f"{shipped + 1} of 1024 latents have a label, {1024 - shipped - 1} have none" in capsys.readouterr().out
    verb("labels", "show", "organism", "--find", "TIDE")
    [line, _] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +0  tide pools of rock.{150,200}\.\.\.  \(file goodfire\.csv\)", line)
