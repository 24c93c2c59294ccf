"""Attempts whose pods were deleted, and left nothing behind."""

from __future__ import annotations

from finetune_operator.decide.decision import Decision, Need
from finetune_operator.decide.retries import after
from finetune_operator.decide.view import View
from finetune_operator.failures import Unsettled, classify, vanished


def taken_away(view: View) -> Decision | None:
    """A kubelet removes a pod a moment after it has told how that ended, which may be missed. The status still says
    that it was being deleted: then the attempt did not fail by itself, and that does not count."""
    attempt = view.attempt
    if view.needs_attempt or attempt is None or attempt.deleting or attempt.suspended or not view.were_leaving:
        return None
    if classify(attempt, view.pods, view.now) != Unsettled(0.0):
        return None
    return after(view, vanished(attempt)) if view.confirmed else Decision(need=Need.CONFIRMATION)
