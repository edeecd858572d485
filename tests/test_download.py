"""Downloads from a local server: resumed and checked, one line per error, no partial file at the destination."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import COMMIT, Site, serve
from steerback.errors import SteerbackError
from steerback.targets import download as module
from steerback.targets.download import commit_of, download, hub_file

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(Site(files={"/a.bin": DATA})) as running:
        yield running


@pytest.fixture
def hub(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The site as a model hub, with an empty cache and no token of the machine's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    site.put("owner/sae", "layer/params.npz", DATA)
    return site


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refused(site: Site, path: str, folder: Path, **options: str) -> str:
    """The error of a download of which nothing may be left that looks whole."""
    with pytest.raises(SteerbackError) as caught:
        download(site.url + path, folder / "x", **options)  # type: ignore[arg-type]
    assert not (folder / "x").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_arrives_whole_and_is_not_fetched_twice(site: Site, tmp_path: Path) -> None:
    got = download(site.url + "/a.bin", tmp_path / "deep" / "a.bin", sha256=SHA)
    assert (got.sha256, got.size, got.path.read_bytes()) == (SHA, len(DATA), DATA)
    assert download(site.url + "/a.bin", got.path, sha256=SHA.upper()) == got
    assert len(site.seen) == 1
    assert leftovers(got.path.parent) == ["a.bin"]


def test_a_broken_connection_is_taken_up_again(site: Site, tmp_path: Path) -> None:
    site.break_after = [300_000, 200_000]
    assert download(site.url + "/a.bin", tmp_path / "a").path.read_bytes() == DATA
    assert [h.get("range") for h in site.requests()] == [None, "bytes=300000-", "bytes=500000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(site: Site, tmp_path: Path) -> None:
    site.break_after = [300_000, 0]
    said = refused(site, "/a.bin", tmp_path)
    assert "broke after 300000 bytes" in said
    assert "run again" in said
    site.seen.clear()
    assert download(site.url + "/a.bin", tmp_path / "x", sha256=SHA).size == len(DATA)
    assert [h["range"] for h in site.requests()] == ["bytes=300000-"]
    assert leftovers(tmp_path) == ["x"]


@pytest.mark.parametrize("fault", ["changed", "no ranges", "no etag", "other address"])
def test_what_cannot_be_resumed_begins_anew(site: Site, tmp_path: Path, fault: str) -> None:
    site.etags = fault != "no etag"
    site.ranges = fault != "no ranges"
    site.break_after = [300_000, 0]
    refused(site, "/a.bin", tmp_path)
    other = DATA[::-1] if fault == "changed" else DATA
    path = "/b.bin" if fault == "other address" else "/a.bin"
    site.files[path] = other
    assert download(site.url + path, tmp_path / "x").path.read_bytes() == other
    assert leftovers(tmp_path) == ["x"]


def test_a_part_that_is_whole_or_too_long(site: Site, tmp_path: Path) -> None:
    for extra in (b"", b"more"):
        site.break_after = [300_000, 0]
        refused(site, "/a.bin", tmp_path)
        (tmp_path / "x.part").write_bytes(DATA + extra)
        assert download(site.url + "/a.bin", tmp_path / "x").path.read_bytes() == DATA
        (tmp_path / "x").unlink()


def test_a_wrong_hash_is_refused_and_thrown_away(site: Site, tmp_path: Path) -> None:
    said = refused(site, "/a.bin", tmp_path, sha256="0" * 64)
    assert f"SHA-256 is {SHA}, expected {'0' * 64}" in said
    assert not (tmp_path / "x.part").exists() or (tmp_path / "x.part").stat().st_size == 0
    (tmp_path / "x").write_bytes(b"an older file")
    assert download(site.url + "/a.bin", tmp_path / "x", sha256=SHA).path.read_bytes() == DATA


def test_refusals_say_what_to_do(site: Site, tmp_path: Path) -> None:
    site.gated = {"/owner/m/resolve/main/labels.csv"}
    site.files["/owner/m/resolve/main/labels.csv"] = b"index,label\n"
    site.status = {"/busy": 429, "/broken": 503}
    gated = refused(site, "/owner/m/resolve/main/labels.csv", tmp_path)
    assert f"(401); if it is gated, accept its terms at {site.url}/owner/m and set HF_TOKEN" in gated
    assert "the token in HF_TOKEN may not" in refused(site, "/owner/m/resolve/main/labels.csv", tmp_path, token="bad")
    assert download(f"{site.url}/owner/m/resolve/main/labels.csv", tmp_path / "l.csv", token="good").size == 12
    assert "no such file (404)" in refused(site, "/absent", tmp_path)
    assert "too many requests (429)" in refused(site, "/busy", tmp_path)
    assert "answered 503; try again later" in refused(site, "/broken", tmp_path)


def test_no_network(tmp_path: Path) -> None:
    with serve(Site()) as gone:
        pass
    assert "cannot be reached" in refused(gone, "/a.bin", tmp_path)
    gone.url = "http:/"
    assert "not an address" in refused(gone, "/a", tmp_path) or not (tmp_path / "x").exists()


def test_the_token_stays_with_its_host(site: Site, tmp_path: Path) -> None:
    site.redirect["/lfs.bin"] = site.url.replace("127.0.0.1", "localhost") + "/a.bin"
    assert download(site.url + "/lfs.bin", tmp_path / "a", token="secret").sha256 == SHA
    asked = [headers.get("authorization") for headers in site.requests()]
    assert asked == ["Bearer secret", None]


def test_too_little_disk_is_said_before_anything_is_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    said = refused(site, "/a.bin", tmp_path)
    assert "needs 1.0 MB of disk" in said
    assert "0.1 MB free" in said
    assert (tmp_path / "x.part").stat().st_size == 0


def test_a_disk_that_fills_up_keeps_what_came(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    assert "the disk is full" in refused(site, "/a.bin", tmp_path)
    monkeypatch.undo()
    assert download(site.url + "/a.bin", tmp_path / "x").sha256 == SHA


def test_processes_that_want_the_same_file_take_turns(site: Site, tmp_path: Path) -> None:
    done: list[str] = []
    url = site.url + "/a.bin"
    workers = [threading.Thread(target=lambda: done.append(download(url, tmp_path / "a").sha256)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert done == [SHA] * 4
    assert len(site.seen) == 1
    assert leftovers(tmp_path) == ["a"]


def test_a_hub_file_goes_into_the_hubs_cache(hub: Site) -> None:
    path = hub_file("owner/sae", "layer/params.npz")
    assert path.read_bytes() == DATA
    assert commit_of(path) == COMMIT
    assert commit_of(Path("params.npz")) is None
    before = len(hub.seen)
    assert hub_file("owner/sae", "layer/params.npz", COMMIT) == path
    assert len(hub.seen) == before  # a pinned revision in the cache needs no network
    assert len([h for h in hub.requests() if h]) == 1


def test_a_hub_file_is_resumed_and_checked(hub: Site, tmp_path: Path) -> None:
    hub.break_after = [400_000, 0]
    with pytest.raises(SteerbackError, match="run again"):
        hub_file("owner/sae", "layer/params.npz")
    assert not list((tmp_path / "cache").glob("**/snapshots/*/*"))
    hub.seen.clear()
    assert hub_file("owner/sae", "layer/params.npz").read_bytes() == DATA
    assert [h["range"] for h in hub.requests()] == ["bytes=400000-"]


def test_what_the_hub_refuses_is_one_line(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(repo: str, file: str = "layer/params.npz", revision: str | None = None) -> str:
        with pytest.raises(SteerbackError) as caught:
            hub_file(repo, file, revision)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"no file 'absent.pt' at revision 'main'; see {hub.url}/owner/sae/tree/main" in said(
        "owner/sae", "absent.pt"
    )
    assert "has no revision 'v9'" in said("owner/sae", revision="v9")
    assert "no such repository" in said("owner/none")
    assert "not the name of a hub repository" in said("a/b/c")
    hub.put("owner/gated", "w.pt", DATA)
    hub.gated = {path for path in hub.files if "gated" in path}
    assert f"gated; accept its terms at {hub.url}/owner/gated and set HF_TOKEN" in said("owner/gated", "w.pt")
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "the token in HF_TOKEN may not read it" in said("owner/gated", "w.pt")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert hub_file("owner/gated", "w.pt").read_bytes() == DATA
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.status["/owner/sae/resolve/main/layer/params.npz"] = 403
    assert "access refused (403)" in said("owner/sae")


def test_without_a_network_the_cache_still_serves(hub: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub_file("owner/sae", "layer/params.npz")
    with serve(Site()) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    assert hub_file("owner/sae", "layer/params.npz") == path
    with pytest.raises(SteerbackError, match=r"not in the cache and .* cannot be reached"):
        hub_file("owner/sae", "other.npz", COMMIT)
