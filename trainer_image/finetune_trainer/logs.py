"""Logging of one process: one line per event, as text or as JSON, without secrets."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

FORMAT_VARIABLE = "FINETUNE_LOG_FORMAT"

_SECRET_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
)
_MIN_SECRET_LENGTH = 8
# Libraries whose INFO is of no use to the owner of a job.
_CHATTY = ("botocore", "boto3", "s3transfer", "urllib3", "httpx", "httpcore", "filelock", "fsspec")


def configure(rank: int = 0) -> None:
    """Send all logging to standard error, in the format that `FINETUNE_LOG_FORMAT` (text or json) names."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(rank) if os.environ.get(FORMAT_VARIABLE) == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def redact(text: str) -> str:
    """The text without the value of any credential that the environment holds."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _MIN_SECRET_LENGTH:
            text = text.replace(value, f"<{name}>")
    return text


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Json(logging.Formatter):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "rank": self._rank,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(event, ensure_ascii=False))
