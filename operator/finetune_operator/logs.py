"""Logs: one JSON object a line (or text), each with the job that it is about. Nothing logs manifests or tokens."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError

_FIELDS = ("lease", "identity", "cause", "count", "seconds")
_ABOUT: ContextVar[dict[str, object] | None] = ContextVar("what is logged about", default=None)


@contextlib.contextmanager
def about(job: str) -> Iterator[None]:
    """Everything that is logged inside says which job (`namespace/name`) it is about, and what `note` adds."""
    token = _ABOUT.set({"job": job})
    try:
        yield
    finally:
        _ABOUT.reset(token)


def note(**facts: object) -> None:
    """More about the job: its `uid`, the `attempt`. Nothing outside of `about`."""
    known = _ABOUT.get()
    if known is not None:
        known.update(facts)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _ABOUT.get() or {}
        entry |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Connections that broke are told as defects by kopf, whose watches are started again and say why themselves;
    and by aiohttp, whoever sends to a port what is no HTTP (a scanner, a client with TLS)."""
    if record.name.startswith("kopf._"):
        record.exc_info = record.exc_text = None
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "%s; answered %d: %s", (record.getMessage(), error.code, " ".join(str(error).split()))
        record.exc_info = record.exc_text = None
    return True


def configure(log_format: str, level: int = logging.INFO) -> None:
    """Send everything to standard error. kopf's chatter about single events is left out."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.addFilter(_without_traceback)
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It warns that it has to leave signals alone outside the main thread, as it should.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    for name in ("kopf.objects", "httpx2", "httpx", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
