"""Resumable downloads with checked hashes; every failure is a one-line error.

`download` fetches an address, `hub_file` a file of a model hub's repository into the hub's cache. A file at its
destination is always complete; an incomplete file is called NAME.part, and the next call continues it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.readers import read_json_table

if TYPE_CHECKING:
    import httpx2

SPARE = 64 << 20
"""Bytes of disk space that a download leaves free."""


class NoSuchFile(SteerbackError):
    """The repository has no such file. Callers catch this for an optional file."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A complete file: path, SHA-256 of its contents, size in bytes."""

    path: Path
    sha256: str
    size: int


def download(url: str, destination: Path, *, sha256: str | None = None, token: str | None = None) -> Downloaded:
    """Download `url` to `destination`; continue an earlier download if the server's file has not changed.

    An existing destination is kept; with `sha256`, only if it has that hash. `token` is sent as a bearer token, only to
    the host of `url`. A broken connection is retried as long as each attempt receives bytes. Raises SteerbackError for
    every failure; received bytes are kept for the next call unless their hash is wrong.
    """
    if (existing := _existing(destination, sha256)) is not None:
        return existing
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _part(destination) as file:
            if (existing := _existing(destination, sha256)) is not None:  # another process was faster
                Path(file.name).unlink(missing_ok=True)
                return existing
            _fill(url, file, token)
            return _finish(url, file, destination, sha256)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full; free some space and run again to continue" if full else str(error.strerror)
        raise SteerbackError(f"{url}: cannot write {destination}: {reason}") from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise SteerbackError if the disk of `folder`, which need not exist yet, has no room for `size` more bytes."""
    if (free := free_space(folder)) < size + SPARE:
        raise SteerbackError(
            f"{what} needs {gigabytes(size)} of disk, but {folder} has {gigabytes(free)} free; free some space there"
        )


def free_space(folder: Path) -> int:
    """Return the free bytes of a folder's disk; the folder need not exist yet."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def gigabytes(size: float) -> str:
    """Format a size in bytes, e.g. "2.1 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _existing(destination: Path, sha256: str | None) -> Downloaded | None:
    if not destination.is_file():
        return None
    digest = hash_file(destination)
    if sha256 is not None and digest != sha256.lower():
        return None
    return Downloaded(destination, digest, destination.stat().st_size)


@contextlib.contextmanager
def _part(destination: Path) -> Iterator[IO[bytes]]:
    """Open the incomplete file for appending and lock it; other processes wait."""
    path = destination.with_name(destination.name + ".part")
    while True:
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                # if the process that had the lock has renamed the file meanwhile, open it again
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    yield file
                    return


def _fill(url: str, file: IO[bytes], token: str | None) -> None:
    """Download the missing part of a file; retry after a broken connection if the last attempt received bytes."""
    import httpx2

    headers = {"Accept-Encoding": "identity"}  # no compression, so that sizes and ranges are those of the file
    if token:
        headers["Authorization"] = f"Bearer {token}"
    with httpx2.Client(headers=headers, follow_redirects=True, timeout=30) as client:
        whole = False
        while not whole:
            before = file.seek(0, os.SEEK_END)
            try:
                whole = _attempt(client, url, file)
            except httpx2.InvalidURL as error:
                raise SteerbackError(f"{url}: not an address ({error})") from error
            except httpx2.HTTPError as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                size = file.seek(0, os.SEEK_END)
                if not size:
                    raise SteerbackError(
                        f"{url}: cannot be reached ({reason}); check the network and the proxy settings"
                    ) from error
                if size <= before:
                    raise SteerbackError(
                        f"{url}: the connection broke after {size} bytes ({reason}); run again to continue there"
                    ) from error


def _attempt(client: httpx2.Client, url: str, file: IO[bytes]) -> bool:
    """Send one request; return False if the download has to restart. Shows a progress bar if stderr is a terminal."""
    from tqdm import tqdm

    size, notes = file.seek(0, os.SEEK_END), _notes(file)
    same = _remembered(notes, url) if size else None
    # If-Range: the server sends the rest if its file is unchanged, else the whole file with status 200
    with client.stream("GET", url, headers={"Range": f"bytes={size}-", "If-Range": same} if same else {}) as response:
        if response.status_code == 416 and same:  # no bytes after `size`: complete, unless the file has another length
            whole = response.headers.get("content-range") == f"bytes */{size}"
            if not whole:
                file.truncate(0)
            return whole
        if response.status_code >= 400:
            raise SteerbackError(_refusal(response.status_code, url, "authorization" in client.headers))
        if response.status_code != 206:
            file.truncate(0)
            size = 0
        elif not response.headers.get("content-range", "").startswith(f"bytes {size}-"):
            raise SteerbackError(f"{url}: the server sent another part of the file than requested; try again later")
        packed = "content-encoding" in response.headers  # the server compresses anyway, so its length is not the file's
        length = None if packed else response.headers.get("content-length")
        _remember(notes, url, None if packed else response.headers)
        check_space(notes.parent, int(length or 0), notes.name.removesuffix(".part.json"))
        total = None if length is None else size + int(length)
        name = url.rpartition("/")[2]
        with tqdm(desc=name, total=total, initial=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for chunk in response.iter_bytes():
                bar.update(file.write(chunk))
    return True


def _finish(url: str, file: IO[bytes], destination: Path, sha256: str | None) -> Downloaded:
    """Check a complete file and rename it to its destination."""
    part = Path(file.name)
    file.flush()
    os.fsync(file.fileno())
    done = Downloaded(destination, hash_file(part), part.stat().st_size)
    if sha256 is not None and done.sha256 != sha256.lower():
        file.truncate(0)
        raise SteerbackError(
            f"{url}: its SHA-256 is {done.sha256}, expected {sha256.lower()}; the file is damaged or was replaced, so "
            "the download was deleted"
        )
    part.replace(destination)
    _notes(file).unlink(missing_ok=True)
    return done


def _notes(file: IO[bytes]) -> Path:
    """Return the path of the notes on an incomplete file: the version of the server's file that it belongs to."""
    return Path(f"{file.name}.json")


def _remember(notes: Path, url: str, headers: httpx2.Headers | None) -> None:
    """Store the server's identifier (ETag or date) of this version; without one, the next call starts again."""
    notes.unlink(missing_ok=True)
    etag = "" if headers is None else headers.get("etag", "")
    mark = etag if etag and not etag.startswith("W/") else headers and headers.get("last-modified")
    if mark:
        notes.write_text(json.dumps({"url": url, "validator": mark}), encoding="utf-8")


def _remembered(notes: Path, url: str) -> str | None:
    try:
        known = read_json_table(notes, "download notes")
    except SteerbackError:  # missing or damaged notes: the download starts again
        return None
    return str(known["validator"]) if known.get("url") == url and known.get("validator") else None


def _refusal(status: int, url: str, token: bool) -> str:
    if status == 404:
        return f"{url}: there is no such file (404); check the address"
    if status in (401, 403):
        page = re.sub(r"/(?:resolve|raw|blob)/.*", "", url)  # of the hub's repository
        return f"{url}: access refused ({status}); {'' if token else 'if it is gated, '}{_access(page, token)}"
    if status == 429:
        return f"{url}: too many requests (429); try again later"
    return f"{url}: the server answered {status}; try again later"


def _access(page: str, token: bool) -> str:
    if token:
        return f"the token in HF_TOKEN may not read it: accept its terms at {page} with the token's account"
    return f"accept its terms at {page} and set HF_TOKEN to a token of that account"


def hub_file(repo: str, file: str, revision: str | None = None) -> Path:
    """Return a file of a hub repository ("owner/name") in the hub's cache (`HF_HOME`), downloaded if necessary.

    `revision` is a commit, tag or branch; a cached commit needs no network. Respects HF_ENDPOINT, HF_TOKEN and
    HF_HUB_OFFLINE. Large files are resumable and checked against the hub's hash. The path contains the commit that a
    branch pointed to (`commit_of`). Raises SteerbackError for every failure.
    """
    from huggingface_hub import hf_hub_download

    where, version = hub_place(), revision or "main"
    with hub_errors(repo, version, file):
        reached = _prefetch(repo, file, version, where)
        return Path(hf_hub_download(repo, file, revision=version, endpoint=where, local_files_only=not reached))


def hub_place() -> str:
    """Return the address of the model hub: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextlib.contextmanager
def hub_errors(repo: str, version: str, file: str) -> Iterator[None]:
    """Convert the exceptions of the hub's library about a file into a one-line SteerbackError with the fix."""
    import httpx2
    from huggingface_hub import errors, get_token

    where = hub_place()
    page, token = f"{where}/{repo}", get_token() is not None
    known = {  # the first match counts, because some are subclasses of later ones
        errors.GatedRepoError: f"{repo}: gated; {_access(page, token)}",
        errors.RevisionNotFoundError: f"{repo}: has no revision {version!r}; see {page}/commits/main",
        errors.RepositoryNotFoundError: f"{repo}: no such repository at {where}, or it is private: then set HF_TOKEN "
        "to a token that may read it",
        errors.LocalEntryNotFoundError: f"{repo}: {file} is not in the cache and {where} cannot be reached; connect "
        "once, or fetch it elsewhere and point HF_HOME at that cache",
        errors.HFValidationError: f"{repo!r} is not the name of a hub repository (owner/name)",
    }
    try:
        yield
    except (errors.EntryNotFoundError, errors.HFValidationError, httpx2.HTTPError, OSError) as error:
        refused = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        line = next((text for kind, text in known.items() if isinstance(error, kind)), None)
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise NoSuchFile(f"{repo}: no file {file!r} at revision {version!r}; see {page}/tree/{version}") from error
        if isinstance(refused, errors.HfHubHTTPError) and (line is None or refused is not error):
            status = getattr(refused.response, "status_code", 0)
            line = _refusal(status, f"{page}/resolve/{version}/{file}", token)
        raise SteerbackError(line or f"{repo}: cannot get {file}: {' '.join(str(error).split())}") from error


def _prefetch(repo: str, file: str, version: str, endpoint: str) -> bool:
    """Download a large file to the place where the hub's library looks first; return whether the hub is reachable.

    The library (up to 2.4) deletes an incomplete file when it is stopped, and an SAE is one file of several GB. The
    place `blobs/<hash>` is documented; if the layout changed, the library would only download the file again. Without
    a network the library retries for half a minute; the returned False avoids that.
    """
    import httpx2
    from huggingface_hub import constants, errors, get_hf_file_metadata, get_token, hf_hub_url, is_offline_mode
    from huggingface_hub import try_to_load_from_cache as cached

    commit = re.fullmatch(r"[0-9a-f]{40}", version)
    if is_offline_mode() or (commit and isinstance(cached(repo, file, revision=version), str)):
        return False
    url, token = hf_hub_url(repo, file, revision=version, endpoint=endpoint), get_token()
    try:
        known = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    except errors.HfHubHTTPError:
        return True  # the library then reports the error, or uses an older copy in its cache
    except httpx2.TransportError:
        return False
    if known.etag is not None and re.fullmatch(r"[0-9a-f]{64}", known.etag):  # large files are named by their SHA-256
        blob = Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--")) / "blobs" / known.etag
        download(url, blob, sha256=known.etag, token=token)
    return True


def commit_of(path: Path) -> str | None:
    """Return the commit of a file in the hub's cache, None for any other path."""
    match = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return match[1] if match else None
