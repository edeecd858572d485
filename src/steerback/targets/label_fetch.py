"""Download public labels: Neuronpedia's exports, or a label file at an address or in a hub repository.

    neuronpedia:MODEL/SOURCE          e.g. neuronpedia:gemma-2-2b/16-gemmascope-res-16k
    hub:OWNER/NAME/FILE[@REVISION]    a label file in a hub repository
    https://...                       a label file

Downloaded files are kept, so an interrupted download continues. Each file is checked against the size and hash that the
server lists, and its SHA-256 is recorded.
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
"""Public bucket with v1/MODEL/SOURCE/explanations/batch-N.jsonl.gz; see docs.neuronpedia.org/api-and-data/exports."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fetched:
    """Downloaded labels; `source` is the source in the user's table, `files` maps file names to SHA-256 hashes."""

    labels: LatentLabels
    source: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Object:
    key: str
    size: int
    etag: str


def fetch_labels(target: str, source: str, say: Say = lambda _: None) -> Fetched:
    """Download and read the labels of `source` for a target; a JSON file next to their folder records the source."""
    name = re.sub(r"[^\w.@+-]+", "_", source)
    folder = user_labels_folder(target) / "fetched" / name
    files = _get(source, folder, say)
    labels = read_label_file(folder)
    if not labels.labels:
        raise SteerbackError(f"labels of {source}: the files contain no label")
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
        choices = ", ".join(SUFFIXES)
        raise SteerbackError(f"label source {source!r}: {file!r} is not a label file; supported suffixes: {choices}")


def _hub(place: str, folder: Path) -> dict[str, str]:
    where, _, revision = place.partition("@")
    parts = where.split("/", 2)
    if len(parts) != 3:
        raise SteerbackError(f"label source 'hub:{place}' must have the form hub:OWNER/NAME/FILE[@REVISION]")
    _readable(f"hub:{place}", parts[2])
    cached = hub_file("/".join(parts[:2]), parts[2], revision or None)
    make_folder(folder)
    link = folder / Path(parts[2]).name
    link.unlink(missing_ok=True)
    link.symlink_to(cached)
    return {link.name: hash_file(link)}


def _neuronpedia(place: str, folder: Path, say: Say) -> dict[str, str]:
    if not re.fullmatch(r"[\w.@+-]+/[\w.@+-]+", place):
        raise SteerbackError(f"label source 'neuronpedia:{place}' must have the form neuronpedia:MODEL/SOURCE")
    objects = _list_objects(f"v1/{place}/explanations/batch-", folder)
    if not objects:
        raise SteerbackError(
            f"Neuronpedia has no explanations for {place}; see the folders at {NEURONPEDIA}/index.html?prefix=v1/"
        )
    hashes = {}
    for number, item in enumerate(objects, 1):
        file = folder / Path(item.key).name
        is_new = not file.is_file()
        hashes[file.name] = _checked(item, download(f"{NEURONPEDIA}/{urllib.parse.quote(item.key)}", file))
        if is_new:
            say(f"{number}/{len(objects)} files")
    return hashes


def _checked(item: _Object, got: Downloaded) -> str:
    """Return a file's SHA-256. Raises SteerbackError if its size, or its MD5 if listed, differs from the listing."""
    right = got.size == item.size
    if right and re.fullmatch(r"[0-9a-f]{32}", item.etag):  # the MD5, unless the object was uploaded in parts
        with got.path.open("rb") as file:
            right = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == item.etag
    if not right:
        got.path.unlink(missing_ok=True)
        raise SteerbackError(f"{item.key}: the downloaded file differs from Neuronpedia's listing; run again")
    return got.sha256


def _list_objects(prefix: str, folder: Path) -> list[_Object]:
    """Return the objects of the bucket with a prefix, from all pages of S3's ListObjectsV2."""
    objects: list[_Object] = []
    token = ""
    while True:
        query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
        page = folder.parent / f".{folder.name}.listing"
        page.unlink(missing_ok=True)
        try:
            root = ET.fromstring(download(f"{NEURONPEDIA}/?{urllib.parse.urlencode(query)}", page).path.read_bytes())
        except ET.ParseError as error:
            raise SteerbackError(f"{NEURONPEDIA}: the listing is not valid XML ({error}); try again later") from error
        finally:
            page.unlink(missing_ok=True)
        for entry in root.iterfind("{*}Contents"):
            key = entry.findtext("{*}Key", "")
            if key.endswith(".jsonl.gz"):
                etag = entry.findtext("{*}ETag", "").strip('"')
                objects.append(_Object(key, int(entry.findtext("{*}Size", "-1")), etag))
        token = root.findtext("{*}NextContinuationToken", "")
        if not token:
            return objects
