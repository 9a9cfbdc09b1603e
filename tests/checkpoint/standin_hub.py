"""A small hub on a local port: the endpoints that huggingface_hub's downloads use, and the ways in which they fail."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """The files of each branch, who may read them, and how transfers of its files misbehave.

    `cut_after` breaks the first transfers of a file off: a list of how many bytes each of them still sends.
    `status` answers every request for a file with that HTTP status.
    """

    branches: dict[str, Files]
    token: str | None = None
    gated: bool = False
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    status: int | None = None

    def commit(self, branch: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[branch].items())).encode()).hexdigest()

    def files_at(self, revision: str) -> tuple[str, Files] | None:
        for branch, files in self.branches.items():
            if revision in (branch, self.commit(branch)):
                return self.commit(branch), files
        return None


class StandInHub:
    """Serves `repositories` by id until `stop`; `requests` records (method, path, Range header) of every request.

    `page`, once set, answers everything instead, as the log-in pages of some networks do.
    """

    def __init__(self, repositories: dict[str, Repository]) -> None:
        self.repositories = repositories
        self.page: bytes | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def transfers_of(self, file: str) -> list[str | None]:
        """The Range headers of the GET requests for a file, in order."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(f"/{file}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        if self.hub.page is not None:
            self._send(self.hub.page, "text/html")
            return
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository = self.hub.repositories.get("/".join(parts[:2]))
        given = self.headers.get("Authorization")
        found = repository.files_at(parts[3]) if repository else None
        if repository is None:
            self._fail(404, "RepoNotFound")
        elif repository.gated:
            self._fail(403, "GatedRepo")
        elif repository.token is not None and given is None:
            self._fail(401, "RepoNotFound")
        elif repository.token is not None and given != f"Bearer {repository.token}":
            self._fail(401, None, "Invalid credentials in Authorization header")
        elif found is None:
            self._fail(404, "RevisionNotFound")
        elif is_api and parts[2] == "revision":
            self._json({"id": "/".join(parts[:2]), "sha": found[0], "siblings": []})
        elif is_api:
            self._json([_listing(name, content) for name, content in found[1].items()])
        elif repository.status is not None:
            self._fail(repository.status, None)
        else:
            self._file(repository, found[0], "/".join(parts[4:]), found[1])

    def _file(self, repository: Repository, commit: str, name: str, files: Files) -> None:
        content = files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cuts = repository.cut_after.get(name)
        if self.command == "HEAD":
            pass
        elif cuts:
            self.wfile.write(content[start : start + cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def _fail(self, status: int, code: str | None, message: str | None = None) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _listing(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree endpoint lists it."""
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
