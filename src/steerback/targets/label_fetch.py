"""Downloads public labels: Neuronpedia's exports, or a label file at an address or in a hub repository.

    neuronpedia:MODEL/SOURCE          e.g. neuronpedia:gemma-2-2b/16-gemmascope-res-16k
    hub:OWNER/NAME/FILE[@REVISION]    a label file in a hub repository
    https://...                       a label file

What has arrived stays, so a stopped fetch goes on where it was; each file is checked against what the server says of
it, and its SHA-256 is written down. It knows nothing of what labels are used for.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.readers import read_address
from steerback.store.files import make_folder, write_json
from steerback.targets.download import Downloaded, download, hash_file, hub_file
from steerback.targets.labels import SUFFIXES, LatentLabels, read_label_file, user_labels_folder

NEURONPEDIA = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
"""Public bucket; v1/MODEL/SOURCE/explanations/batch-N.jsonl.gz, see docs.neuronpedia.org/api-and-data/exports."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fetched:
    """Labels with what they are called in the user's table; `files` maps each file's name to its SHA-256."""

    labels: LatentLabels
    source: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Object:
    key: str
    size: int
    etag: str


def fetch_labels(target: str, source: str, say: Say = lambda _: None) -> Fetched:
    """Downloads and reads the labels of `source` for a target; provenance goes to `fetched.json` beside the files."""
    name = re.sub(r"[^\w.@+-]+", "_", source)
    folder = user_labels_folder(target) / "fetched" / name
    files = _get(source, folder, say)
    labels = read_label_file(folder)
    if not labels.labels:
        raise SteerbackError(f"labels of {source}: the files hold no label")
    write_json(
        folder.parent / f"{name}.json",
        {
            "source": source,
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
            "sha256": files,
            "labels": len(labels.labels),
            "without label": labels.empty,
            "repeated": labels.repeated,
            "origins": sorted(labels.origins),
        },
    )
    by = sorted(o for o in labels.origins if o.startswith("by "))
    return Fetched(labels, " ".join([source, *by]), files)


def _get(source: str, folder: Path, say: Say) -> dict[str, str]:
    if source.startswith("neuronpedia:"):
        return _neuronpedia(source.removeprefix("neuronpedia:"), folder, say)
    if source.startswith("hub:"):
        return _hub(source.removeprefix("hub:"), folder)
    if source.startswith(("http://", "https://")):
        file = Path(read_address(source, "label source").path).name
        _readable(source, file)
        return {file: download(source, folder / file).sha256}
    raise SteerbackError(
        f"label source {source!r} is not one of neuronpedia:MODEL/SOURCE, hub:OWNER/NAME/FILE, or an https address"
    )


def _readable(source: str, file: str) -> None:
    if not file.endswith(SUFFIXES):
        raise SteerbackError(f"label source {source!r}: {file!r} is no label file; readable are {', '.join(SUFFIXES)}")


def _hub(place: str, folder: Path) -> dict[str, str]:
    where, _, revision = place.partition("@")
    parts = where.split("/", 2)
    if len(parts) != 3:
        raise SteerbackError(f"label source 'hub:{place}' is not of the form hub:OWNER/NAME/FILE[@REVISION]")
    _readable(f"hub:{place}", parts[2])
    found = hub_file("/".join(parts[:2]), parts[2], revision or None)
    make_folder(folder)
    here = folder / Path(parts[2]).name
    here.unlink(missing_ok=True)
    here.symlink_to(found)
    return {here.name: hash_file(here)}


def _neuronpedia(place: str, folder: Path, say: Say) -> dict[str, str]:
    if not re.fullmatch(r"[\w.@+-]+/[\w.@+-]+", place):
        raise SteerbackError(f"label source 'neuronpedia:{place}' is not of the form neuronpedia:MODEL/SOURCE")
    objects = _list_objects(f"v1/{place}/explanations/batch-", folder)
    if not objects:
        raise SteerbackError(
            f"Neuronpedia has no explanations of {place}; see the folders at {NEURONPEDIA}/index.html?prefix=v1/"
        )
    hashes = {}
    for number, item in enumerate(objects, 1):
        file = folder / Path(item.key).name
        there = file.is_file()
        hashes[file.name] = _checked(item, download(f"{NEURONPEDIA}/{urllib.parse.quote(item.key)}", file))
        if not there:
            say(f"{number}/{len(objects)} files")
    return hashes


def _checked(item: _Object, got: Downloaded) -> str:
    """SHA-256 of a file that has the size and, where the bucket tells it, the MD5 of the listing."""
    right = got.size == item.size
    if right and re.fullmatch(r"[0-9a-f]{32}", item.etag):  # the MD5, unless the object was uploaded in parts
        with got.path.open("rb") as file:
            right = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == item.etag
    if not right:
        got.path.unlink(missing_ok=True)
        raise SteerbackError(f"{item.key}: what arrived is not the file that the listing names; run it again")
    return got.sha256


def _list_objects(prefix: str, folder: Path) -> list[_Object]:
    """Objects of the bucket under a prefix, page by page (S3's ListObjectsV2)."""
    found: list[_Object] = []
    token = ""
    while True:
        query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
        page = folder.parent / f".{folder.name}.listing"
        page.unlink(missing_ok=True)
        try:
            root = ET.fromstring(download(f"{NEURONPEDIA}/?{urllib.parse.urlencode(query)}", page).path.read_bytes())
        except ET.ParseError as error:
            raise SteerbackError(f"{NEURONPEDIA}: its listing is not readable ({error})") from error
        finally:
            page.unlink(missing_ok=True)
        for entry in root.iterfind("{*}Contents"):
            key = entry.findtext("{*}Key", "")
            if key.endswith(".jsonl.gz"):
                etag = entry.findtext("{*}ETag", "").strip('"')
                found.append(_Object(key, int(entry.findtext("{*}Size", "-1")), etag))
        token = root.findtext("{*}NextContinuationToken", "")
        if not token:
            return found
