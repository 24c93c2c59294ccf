"""The body of a progress report: Kubeflow Trainer's wire protocol. Pure: bytes in, a bounded, checked report out.

    {"trainerStatus": {"progressPercentage": 12, "estimatedRemainingSeconds": 340,
                       "metrics": [{"name": "loss", "value": "1.25"}], "lastUpdatedTime": "..."}}

The senders are `KubeflowCallback` of transformers, which writes metric values as text, and whatever image a user
brings: nothing in a body is trusted. A metric that is no finite number, or a step that no job can take, is left out,
since the rest of the report is still worth having; a body of another shape is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from finetune_operator.errors import FinetuneError
from finetune_operator.observed import ProgressReport
from finetune_trainer.contract.outcome import MAX_COUNT

MAX_BODY_BYTES = 64 * 1024
MAX_METRICS = 64
MAX_NAME_LENGTH = 63
MAX_REMAINING_SECONDS = 10 * 365 * 86_400
_ALIASES = {"current_step": "step", "current_epoch": "epoch"}
"""Names that KubeflowCallback has for what is called otherwise here."""
_COUNTS = frozenset({"step", "total_steps"})


class InvalidReport(FinetuneError):
    """A body that is no progress report."""


def parse_report(body: bytes, *, received_at: float, attempt: int | None = None) -> ProgressReport:
    """Read one report.

    Args:
        body: as received.
        received_at: seconds since the epoch; a sender's own clock is not believed.
        attempt: which attempt the sender belongs to, where that is known.

    Raises:
        InvalidReport: too large, not JSON, or of another shape.
    """
    if len(body) > MAX_BODY_BYTES:
        raise InvalidReport(f"the body has {len(body)} bytes; at most {MAX_BODY_BYTES} are read")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidReport(f"the body is not JSON: {error}") from error
    status = document.get("trainerStatus") if isinstance(document, dict) else None
    if not isinstance(status, dict):
        raise InvalidReport('the body has no object "trainerStatus"')
    percent = _number(status.get("progressPercentage"))
    remaining = _number(status.get("estimatedRemainingSeconds"))
    return ProgressReport(
        received_at=received_at,
        attempt=attempt,
        percent=None if percent is None else int(min(100, max(0, percent))),
        remaining_seconds=None if remaining is None else int(min(MAX_REMAINING_SECONDS, max(0, remaining))),
        metrics=_metrics(status.get("metrics")),
    )


def _metrics(value: object) -> Mapping[str, float]:
    if value is None:
        return {}
    if not isinstance(value, list):
        raise InvalidReport('"metrics" is not a list')
    metrics: dict[str, float] = {}
    for entry in value[:MAX_METRICS]:
        if not isinstance(entry, dict):
            raise InvalidReport('an entry of "metrics" is not an object with "name" and "value"')
        name, number = entry.get("name"), _number(entry.get("value"))
        if isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and number is not None:
            known = _ALIASES.get(name, name)
            if known not in _COUNTS or 0 <= number <= MAX_COUNT:
                metrics[known] = number
    return metrics


def _number(value: Any) -> float | None:
    """A finite number, also where it stands as text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 64:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
