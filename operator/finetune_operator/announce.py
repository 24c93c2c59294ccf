"""Events for people: one when a job enters a phase, an attempt, or a new trouble. Pure: no I/O."""

from __future__ import annotations

from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.cluster import Event
from finetune_operator.constants import Phase, Reason
from finetune_operator.state import carried

_MESSAGE_LIMIT = 1024
"""Characters of an event's message (core/v1 Event)."""
_CALM = frozenset({Reason.RESUMING, Reason.RETRYING, Reason.PREPARING, Reason.STOPPING})
_TROUBLE = frozenset(
    {
        Reason.NAME_TAKEN,
        Reason.CREATE_FAILED,
        Reason.CREATE_REFUSED,
        Reason.NO_REPORTS,
        Reason.PODS_MISSING,
        Reason.TRAINING_OPERATOR_MISSING,
    }
)


def events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> tuple[Event, ...]:
    """What a change of status is worth saying: nothing while phase, attempt and trouble stay what they were."""
    old, new = carried(before), carried(after)
    trouble = new.reason if new.reason in _TROUBLE else ""
    known_trouble = old.reason if old.reason in _TROUBLE else ""
    same_place = (before.phase, old.attempts.current) == (after.phase, new.attempts.current)
    if same_place and trouble == known_trouble:
        return ()
    is_bad = trouble or (new.phase in (Phase.FAILED, Phase.RESTARTING) and new.reason not in _CALM)
    message = new.message if len(new.message) <= _MESSAGE_LIMIT else new.message[: _MESSAGE_LIMIT - 4] + " ..."
    return (Event("Warning" if is_bad else "Normal", new.reason, message),)
