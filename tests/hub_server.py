"""A local HTTP server for tests: plain files with ranges and faults, and parts of a model hub's protocol."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What the server serves and what it was asked for.

    `files` maps paths ("/owner/name/resolve/main/x") to contents. `break_after` closes the connection after that many
    bytes of a body, once per entry. `gated` paths need the token "good". `seen` is (method, path, headers).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    status: dict[str, int] = field(default_factory=dict)
    redirect: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def put(self, repo: str, file: str, data: bytes, revision: str = "main") -> None:
        """A file of a hub repository, under its branch and its commit."""
        for name in (revision, COMMIT):
            self.files[f"/{repo}/resolve/{name}/{file}"] = data

    def requests(self, method: str = "GET") -> list[dict[str, str]]:
        """The headers of the requests of a kind, names in lower case."""
        return [headers for asked, _, headers in self.seen if asked == method]


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            site.seen.append((self.command, path, headers))
            if path.startswith("/api/models/"):
                return self.tell(path)
            repo = "/".join(path.split("/")[1:3])
            known = any(name.startswith(f"/{repo}/resolve/") for name in site.files)
            if path in site.redirect:
                return self.refuse(302, {"Location": site.redirect[path]})
            if path in site.status:
                return self.refuse(site.status[path])
            if path in site.gated and headers.get("authorization") != "Bearer good":
                code = 403 if "authorization" in headers else 401
                return self.refuse(code, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            if path not in site.files:
                error = "RepoNotFound" if not known else "EntryNotFound"
                if known and (named := re.search(r"/resolve/([^/]+)/", path)) and named[1] not in ("main", COMMIT):
                    error = "RevisionNotFound"
                return self.refuse(404, {"X-Error-Code": error})
            return self.send(site.files[path], headers, body)

        def tell(self, path: str) -> None:
            """What a hub says of a repository: its commit, or the files of one."""
            words = path.split("?")[0].split("/")
            repo, about = "/".join(words[3:5]), words[5] if len(words) > 5 else "revision"
            start = f"/{repo}/resolve/{COMMIT}/"
            files = {name[len(start) :]: data for name, data in site.files.items() if name.startswith(start)}
            if not files:
                return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
            if about == "revision":
                said: object = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            else:
                said = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            data = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return None

        def refuse(self, code: int, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            begin = 0
            wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
            if wanted and site.ranges and headers.get("if-range", tag) == tag:
                begin = int(wanted[1])
                if begin >= len(data):
                    return self.refuse(416, {"Content-Range": f"bytes */{len(data)}"})
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            if site.etags:
                self.send_header("ETag", tag)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if not body:
                return None
            part = data[begin:]
            if site.break_after:
                self.wfile.write(part[: site.break_after.pop(0)])
                self.close_connection = True
                return None
            self.wfile.write(part)
            return None

    return Handler


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """The site on a free port of this machine, at `site.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
