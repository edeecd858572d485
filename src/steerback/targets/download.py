"""Files from the network: resumed, checked, renamed into place when whole, and every failure in one line.

`download` fetches a URL, `hub_file` a file of a model hub's repository into the hub's own cache. Whatever is at the
destination is whole; what is not stands beside it as NAME.part and is gone on with. Knows nothing of what is in a file.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from steerback.errors import SteerbackError

CHUNK = 1 << 20
SPARE = 64 << 20
"""Bytes of disk that a download leaves free."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are there and the size of the file, None where the server does not say."""


class NoSuchFile(SteerbackError):
    """The repository is there, the file is not: not an error to who can do without it."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A whole file: where it is, the SHA-256 of its contents, and its size in bytes."""

    path: Path
    sha256: str
    size: int


def download(
    url: str,
    destination: Path,
    *,
    sha256: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Downloaded:
    """Fetches `url` to `destination`, going on from an earlier attempt where the server's file is still the same.

    A destination that is there already is kept (with `sha256`: where it has that hash). `token` is sent as a bearer
    token to the host of `url` alone. A connection that breaks is taken up again as long as each attempt brings bytes.
    Raises SteerbackError for anything that goes wrong; what has arrived by then is kept for the next attempt, unless
    its hash is wrong.
    """
    if (there := _existing(destination, sha256)) is not None:
        return there
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _part(destination) as file:
            if (there := _existing(destination, sha256)) is not None:  # another process was faster
                Path(file.name).unlink(missing_ok=True)
                return there
            return _Transfer(url, destination, file, token, progress).run(sha256)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full: make room and run it again, it goes on from there" if full else str(error.strerror)
        raise SteerbackError(f"{url}: cannot write {destination}: {what}") from error


def hash_file(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, size: int, what: str) -> None:
    """SteerbackError where `size` more bytes do not fit the disk that `folder` is (or will be) on."""
    if (free := free_space(folder)) < size + SPARE:
        raise SteerbackError(
            f"{what} needs {gigabytes(size)} of disk and {folder} has {gigabytes(free)} free; make room there"
        )


def free_space(folder: Path) -> int:
    """Free bytes of the disk that a folder is, or would be, on."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(place).free


def gigabytes(size: float) -> str:
    """A size in bytes for people, e.g. "2.1 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _existing(destination: Path, sha256: str | None) -> Downloaded | None:
    if not destination.is_file():
        return None
    found = hash_file(destination)
    if sha256 is not None and found != sha256.lower():
        return None
    return Downloaded(destination, found, destination.stat().st_size)


@contextlib.contextmanager
def _part(destination: Path) -> Iterator[IO[bytes]]:
    """The unfinished file, open for appending and held by this process alone; others wait for their turn."""
    path = destination.with_name(destination.name + ".part")
    while True:
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:  # else its holder has renamed it meanwhile
                    yield file
                    return


class _Transfer:
    """One file on its way: what has arrived, and what the server said of the file when it began."""

    def __init__(self, url: str, destination: Path, file: IO[bytes], token: str | None, progress: Progress | None):
        self.url, self.destination, self.file = url, destination, file
        self.token, self.progress = token, progress
        self.notes = destination.with_name(destination.name + ".part.json")
        self.part = Path(file.name)
        self.size = file.seek(0, os.SEEK_END)
        self.total: int | None = None
        self.digest = hashlib.sha256()
        validator = self._remembered()
        if self.size and validator is None:
            self._restart()
        self.validator = validator
        file.seek(0)
        while chunk := file.read(CHUNK):
            self.digest.update(chunk)

    def run(self, sha256: str | None) -> Downloaded:
        import httpx2

        headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        with httpx2.Client(headers=headers, follow_redirects=True, timeout=30) as client:
            before = -1
            while True:
                try:
                    if self._attempt(client):
                        return self._finish(sha256)
                except httpx2.InvalidURL as error:
                    raise SteerbackError(f"{self.url}: not an address ({error})") from error
                except httpx2.HTTPError as error:
                    if self.size <= before or not self.size:
                        raise SteerbackError(self._broken(error)) from error
                before = self.size

    def _broken(self, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not self.size:
            return f"{self.url}: cannot be reached ({reason}); is there a network, or a proxy to be set?"
        return f"{self.url}: the connection broke after {self._have} ({reason}); run it again, it goes on from there"

    @property
    def _have(self) -> str:
        return f"{self.size} of {self.total if self.total is not None else 'unknown'} bytes"

    def _attempt(self, client: Any) -> bool:
        """One request; True when the file is whole, False when another attempt is needed."""
        asked = {"Range": f"bytes={self.size}-", "If-Range": str(self.validator)} if self.size else {}
        with client.stream("GET", self.url, headers=asked) as response:
            if response.status_code == 416 and self.size:
                if response.headers.get("content-range") == f"bytes */{self.size}":
                    return True
                self._restart()
                return False
            if response.status_code >= 400:
                raise SteerbackError(_refusal(response.status_code, self.url, bool(self.token)))
            start = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            if response.status_code != 206 or start is None or int(start[1]) != self.size:
                if response.status_code == 206:
                    raise SteerbackError(f"{self.url}: the server sent another part of the file than was asked for")
                self._restart()
            packed = "content-encoding" in response.headers  # though asked not to: lengths are not the file's
            length = None if packed else response.headers.get("content-length")
            self.total = None if length is None else self.size + int(length)
            self._remember(response.headers)
            check_space(self.destination.parent, int(length or 0), self.destination.name)
            for chunk in response.iter_bytes():
                self._take(chunk)
        return self.total is None or self.size >= self.total

    def _take(self, chunk: bytes) -> None:
        self.file.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)
        if self.progress is not None:
            self.progress(self.size, self.total)

    def _finish(self, sha256: str | None) -> Downloaded:
        found = self.digest.hexdigest()
        if self.total is not None and self.size != self.total:
            self._restart()
            raise SteerbackError(f"{self.url}: sent more bytes than it said it would; what came was thrown away")
        if sha256 is not None and found != sha256.lower():
            self._restart()
            raise SteerbackError(
                f"{self.url}: its SHA-256 is {found}, expected {sha256.lower()}; the file is damaged or was replaced, "
                "what came was thrown away"
            )
        self.file.flush()
        os.fsync(self.file.fileno())
        self.part.replace(self.destination)
        self.notes.unlink(missing_ok=True)
        return Downloaded(self.destination, found, self.size)

    def _restart(self) -> None:
        self.file.truncate(0)
        self.file.seek(0)
        self.notes.unlink(missing_ok=True)
        self.size, self.total, self.digest = 0, None, hashlib.sha256()

    def _remember(self, headers: Any) -> None:
        """Notes what tells whether the server's file is the same next time; without it the file starts anew."""
        etag = headers.get("etag", "")
        self.validator = etag if etag and not etag.startswith("W/") else headers.get("last-modified")
        if "content-encoding" in headers:
            self.validator = None
        if self.validator:
            self.notes.write_text(json.dumps({"url": self.url, "validator": self.validator}), encoding="utf-8")

    def _remembered(self) -> str | None:
        try:
            known = json.loads(self.notes.read_text(encoding="utf-8"))
            return str(known["validator"]) if known["url"] == self.url else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _refusal(status: int, url: str, token: bool) -> str:
    if status == 404:
        return f"{url}: there is no such file (404); check the address"
    if status in (401, 403):
        return f"{url}: access refused ({status}); {'' if token else 'if it is gated, '}{_access(_page(url), token)}"
    if status == 429:
        return f"{url}: the server asks for patience (429); try again later"
    return f"{url}: the server answered {status}; try again later"


def _page(url: str) -> str:
    """The page of the repository that a hub's URL belongs to."""
    return re.sub(r"/(?:resolve|raw|blob)/.*", "", url)


def _access(page: str, token: bool) -> str:
    if token:
        return f"the token in HF_TOKEN may not read it: accept its terms at {page} with the token's account"
    return f"accept its terms at {page} and set HF_TOKEN to a token of that account"


def hub_file(
    repo: str,
    file: str,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """A file of a hub repository ("owner/name") in the hub's cache (`HF_HOME`); downloaded unless it is there.

    `revision` is a commit, tag or branch; a commit that is in the cache needs no network. Honours HF_ENDPOINT, HF_TOKEN
    and HF_HUB_OFFLINE. Large files are checked against the hash the hub gives and are resumed. The commit that a
    branch stood for is in the path (`commit_of`). Raises SteerbackError for anything that goes wrong.
    """
    from huggingface_hub import hf_hub_download

    where, version = endpoint or hub_place(), revision or "main"
    with hub_errors(repo, version, file, where):
        reached = _prefetch(repo, file, version, where, progress)
        return Path(hf_hub_download(repo, file, revision=version, endpoint=where, local_files_only=not reached))


def hub_place() -> str:
    """Address of the model hub: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextlib.contextmanager
def hub_errors(repo: str, version: str, file: str, where: str | None = None) -> Iterator[None]:
    """What the hub's library raises about a file of a repository, as one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    where = where or hub_place()
    page, known = f"{where}/{repo}", _token() is not None
    address = f"{page}/resolve/{version}/{file}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise SteerbackError(f"{repo}: gated; {_access(page, known)}") from error
    except errors.RevisionNotFoundError as error:
        raise SteerbackError(f"{repo}: no revision {version!r} there; see {page}/commits/main") from error
    except errors.RepositoryNotFoundError as error:
        raise SteerbackError(
            f"{repo}: no such repository at {where}, or it is private: then set HF_TOKEN to a token that may read it"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            status = getattr(error.__cause__.response, "status_code", 0)
            raise SteerbackError(_refusal(status, address, known)) from error
        raise SteerbackError(
            f"{repo}: {file} is not in the cache and {where} cannot be reached; connect once, or fetch it elsewhere "
            "and point HF_HOME at that cache"
        ) from error
    except errors.EntryNotFoundError as error:
        raise NoSuchFile(f"{repo}: no file {file!r} at revision {version!r}; see {page}/tree/{version}") from error
    except errors.HfHubHTTPError as error:
        raise SteerbackError(_refusal(getattr(error.response, "status_code", 0), address, known)) from error
    except errors.HFValidationError as error:
        raise SteerbackError(f"{repo!r} is not the name of a hub repository (owner/name)") from error
    except (httpx2.HTTPError, OSError) as error:
        raise SteerbackError(f"{repo}: cannot get {file}: {' '.join(str(error).split())}") from error


def _prefetch(repo: str, file: str, version: str, endpoint: str, progress: Progress | None) -> bool:
    """Puts a large file where the hub's library looks before it downloads: that library begins anew when it is stopped.

    The place is the documented layout of its cache, `blobs/<hash>`; in another layout it would just download itself.
    Returns whether there is any point in asking the hub (that library retries for half a minute where there is none).
    """
    import httpx2
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, is_offline_mode
    from huggingface_hub import try_to_load_from_cache as cached

    commit = re.fullmatch(r"[0-9a-f]{40}", version)
    if is_offline_mode() or (commit and isinstance(cached(repo, file, revision=version), str)):
        return False
    url = hf_hub_url(repo, file, revision=version, endpoint=endpoint)
    token = _token()
    try:
        known = get_hf_file_metadata(url, token=token, endpoint=endpoint)
    except errors.HfHubHTTPError:
        return True  # the hub's library will say so, or find an older copy in its cache
    except httpx2.TransportError:
        return False
    if known.etag is None or not re.fullmatch(r"[0-9a-f]{64}", known.etag):
        return True  # a small file, not named by its SHA-256
    blob = Path(constants.HF_HUB_CACHE) / ("models--" + repo.replace("/", "--")) / "blobs" / known.etag
    if not blob.exists():
        with _bar(file) as shown:
            download(url, blob, sha256=known.etag, token=token, progress=progress or shown)
    return True


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """A progress bar where a person is looking (stderr is a terminal)."""
    from tqdm import tqdm

    with tqdm(desc=Path(name).name, unit="B", unit_scale=True, disable=None) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def commit_of(path: Path) -> str | None:
    """The commit of a file in the hub's cache, None for any other path."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
    return found[1] if found else None


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()
