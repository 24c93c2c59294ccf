"""A server that speaks as much of the hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"

_INFO = re.compile(r"/api/(models|datasets)/(.+)/revision/([^/]+)")
_TREE = re.compile(r"/api/(models|datasets)/(.+)/tree/([^/]+)")
_FILE = re.compile(r"/(datasets/)?(.+)/resolve/([^/]+)/(.+)")


@dataclass
class FakeHub:
    """Repositories by name (`org/name`, `datasets/org/name`), each a path to its content."""

    repositories: dict[str, dict[str, bytes]]
    refusal: tuple[int, str] | None = None
    """Status and error code for every request."""
    tokens: set[str | None] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    # One request for each connection: a client that keeps them open would leave threads behind.
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.owner.tokens.add(self.headers.get("Authorization"))
        path = unquote(urlsplit(self.path).path)
        if self.owner.refusal is not None:
            status, code = self.owner.refusal
            return self._answer(status, b'{"error": "no"}', {"X-Error-Code": code})
        if match := _INFO.fullmatch(path):
            return self._info(self._name(match[1], match[2]), match[3])
        if match := _TREE.fullmatch(path):
            return self._tree(self._name(match[1], match[2]))
        if match := _FILE.fullmatch(path):
            return self._file((match[1] or "") + match[2], match[4])
        return self._answer(404, b"{}", {})

    do_HEAD = do_GET

    def _name(self, kind: str, repo: str) -> str:
        return f"datasets/{repo}" if kind == "datasets" else repo

    def _info(self, name: str, revision: str) -> None:
        files = self.owner.repositories.get(name)
        if files is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in files]
        body = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        return self._answer(200, json.dumps(body).encode(), {})

    def _tree(self, name: str) -> None:
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.owner.repositories[name].items()
        ]
        self._answer(200, json.dumps(entries).encode(), {})

    def _file(self, name: str, path: str) -> None:
        content = self.owner.repositories[name][path]
        if self.command == "GET":
            self.owner.downloads.append(path)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""
