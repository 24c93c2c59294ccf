"""The front end's files, read once: nothing else of the file system can be asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file."""

    body: bytes
    content_type: str
    etag: str


def etag_of(body: bytes) -> str:
    """An entity tag (RFC 9110, section 8.8.3) that is another one for another body."""
    return f'"{hashlib.sha256(body).hexdigest()[:24]}"'


def load() -> dict[str, Asset]:
    """Every file of `static/` by its name."""
    found = {}
    for entry in files(__package__).joinpath("static").iterdir():
        kind = _TYPES.get("." + entry.name.rpartition(".")[2])
        if entry.is_file() and kind is not None:
            body = entry.read_bytes()
            found[entry.name] = Asset(body, kind, etag_of(body))
    return found
