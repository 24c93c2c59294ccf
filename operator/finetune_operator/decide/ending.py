"""Whether the newest attempt has come to an end, and how."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator import failures
from finetune_operator.api.v1alpha1 import AdapterStatus, EvaluationStatus, ResultStatus
from finetune_operator.constants import Phase, Reason
from finetune_operator.decide.decision import Decision, Need
from finetune_operator.decide.following import follow, stall_in, stall_limit
from finetune_operator.decide.retries import after, give_up
from finetune_operator.decide.view import View, child_name
from finetune_operator.times import rfc3339
from finetune_trainer.contract import RunResult


def succeeded(view: View) -> Decision | None:
    """The master succeeded, whatever became of the workers."""
    attempt = view.attempt
    said = failures.result_of(view.pods)
    # Pods that finish while they are being stopped have still finished.
    if not (attempt is not None and attempt.is_true("Succeeded")) and not (said and said.result):
        return None
    if said is None and not view.confirmed:
        return Decision(need=Need.CONFIRMATION)
    uri = f"{view.output_uri.rstrip('/')}/runs/{view.observed.job.uid}"
    lost = f"what it left is listed in {uri}/manifest.json, or named below {view.output_uri.rstrip('/')}/specs"
    message = said.message if said and said.result else lost
    state = replace(
        view.state,
        phase=Phase.SUCCEEDED,
        reason=Reason.SUCCEEDED,
        message=message,
        attempts=view.state.attempts.model_copy(update={"next_attempt_at": None}),
        result=_result(said.result) if said and said.result else ResultStatus(uri=uri),
        completion_time=rfc3339(view.now),
        stopping=False,
        report=view.report,
    )
    return Decision(state, requeue_after=0.0)


def _result(result: RunResult) -> ResultStatus:
    evaluation = result.evaluation
    return ResultStatus(
        uri=result.uri,
        manifest_sha256=result.manifest_sha256,
        size_bytes=result.size_bytes,
        trainable_parameters=result.trainable_parameters,
        evaluation=EvaluationStatus(base=evaluation.base, tuned=evaluation.tuned) if evaluation else None,
        merged_uri=result.merged_uri,
        adapters=tuple(
            AdapterStatus(name=one.name, trainable_parameters=one.trainable_parameters, metrics=one.metrics)
            for one in result.adapters
        )
        or None,
    )


def over_deadline(view: View) -> Decision | None:
    """`activeDeadlineSeconds` after the start, whatever the job is doing."""
    remaining = view.deadline_in
    if remaining is None or remaining > 0:
        return None
    return give_up(
        view,
        Reason.DEADLINE_EXCEEDED,
        f"not finished {view.policy.active_deadline_seconds} s after its start (spec.runPolicy.activeDeadlineSeconds); "
        "its checkpoints are kept",
    )


def failed(view: View) -> Decision | None:
    """The newest attempt failed, and the status does not say so yet."""
    attempt = view.attempt
    if view.needs_attempt:
        return None
    if view.is_stopping and (view.policy.suspend or attempt is None or attempt.deleting):
        return None  # it ends because we stop it
    if attempt is None or attempt.deleting:
        if not view.confirmed:
            return Decision(need=Need.CONFIRMATION)
        return after(view, failures.deleted(child_name(view.observed.job.ref.name, view.current)))
    if attempt.suspended:
        return None  # Kueue takes the pods away: they end, and the attempt does not
    verdict = failures.classify(attempt, view.pods, view.now)
    if isinstance(verdict, failures.Failure):
        return after(view, verdict)
    if verdict is not None and verdict.failed:
        if verdict.seconds > 0:
            return follow(view).within(verdict.seconds)
        return after(view, failures.unexplained(attempt)) if view.confirmed else Decision(need=Need.CONFIRMATION)
    remaining = stall_in(view)
    if remaining is not None and remaining <= 0:
        return after(view, failures.stalled(view.pods, stall_limit(view), heard=view.was_heard))
    return None
