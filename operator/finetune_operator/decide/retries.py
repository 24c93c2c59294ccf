"""What follows a failure: another attempt, and when, or the end."""

from __future__ import annotations

from dataclasses import replace

from finetune_operator.api.v1alpha1 import AttemptsStatus, FailureStatus, PlanStatus
from finetune_operator.constants import Phase, Reason
from finetune_operator.decide.decision import Decision
from finetune_operator.decide.view import View
from finetune_operator.failures import Failure, Retry
from finetune_operator.state import JobState, Preparation
from finetune_operator.times import rfc3339
from finetune_trainer.contract.vocabulary import Strategy

BACKOFF_SECONDS = 10.0
BACKOFF_LIMIT_SECONDS = 600.0


def after(view: View, failure: Failure) -> Decision:
    """Record a failure, its place in the counters and what comes next, all in one status."""
    at = view.now if failure.at is None else failure.at
    reached = _furthest(view, failure)
    attempts = view.state.attempts.model_copy(
        update={
            "last": FailureStatus(
                reason=failure.detail or failure.reason,
                message=failure.message,
                exit_code=failure.exit_code,
                pod=failure.pod,
                at=rfc3339(at),
            ),
            "furthest_step": reached,
        }
    )
    if failure.retry is Retry.SMALLER:
        return _smaller(view, failure, attempts)
    if failure.retry is Retry.FREE:
        return _free(view, failure, attempts)
    if failure.retry is Retry.COUNTED:
        return _counted(view, failure, attempts)
    return give_up(view, failure.reason, failure.message, attempts)


def give_up(view: View, reason: str, message: str, attempts: AttemptsStatus | None = None) -> Decision:
    """The job has failed."""
    attempts = (attempts or view.state.attempts).model_copy(update={"next_attempt_at": None})
    state = replace(
        view.state,
        phase=Phase.FAILED,
        reason=reason,
        message=message,
        attempts=attempts,
        completion_time=rfc3339(view.now),
        stopping=False,
        report=view.report,
    )
    return Decision(state, requeue_after=0.0)


def refused(view: View, prepared: Preparation) -> Decision | None:
    """The end of a job that cannot run as it is written; None when it can."""
    blamed = next((f for f in (prepared.accepted, prepared.planned) if f is not None and f.status == "False"), None)
    if blamed is None:
        return None
    decision = give_up(view, blamed.reason, blamed.message)
    assert decision.state is not None
    state = replace(decision.state, accepted=prepared.accepted, planned=prepared.planned, plan=prepared.plan)
    return replace(decision, state=state)


def _counted(view: View, failure: Failure, attempts: AttemptsStatus) -> Decision:
    limit = view.policy.retries
    if attempts.retries >= limit:
        if not attempts.retries:
            return give_up(view, failure.reason, f"{failure.message} (spec.runPolicy.retries is 0)", attempts)
        message = f"{attempts.retries} of {limit} retries failed too; the last: {failure.message}"
        return give_up(view, Reason.RETRIES_EXHAUSTED, message, attempts)
    retries = attempts.retries + 1
    attempts = attempts.model_copy(update={"retries": retries, "fruitless_preemptions": 0})
    return _again(view, failure, attempts, _backoff(retries - 1), f"retry {retries} of {limit}")


def _free(view: View, failure: Failure, attempts: AttemptsStatus) -> Decision:
    """Without limit, but ever slower while attempts are taken away before they get any further."""
    before = view.state.attempts.furthest_step or 0
    fruitful = (attempts.furthest_step or 0) > before
    fruitless = 0 if fruitful else attempts.fruitless_preemptions + 1
    attempts = attempts.model_copy(update={"preemptions": attempts.preemptions + 1, "fruitless_preemptions": fruitless})
    delay = _backoff(fruitless - 2) if fruitless > 1 else 0.0
    return _again(view, failure, attempts, delay, "it does not count as a retry")


def _smaller(view: View, failure: Failure, attempts: AttemptsStatus) -> Decision:
    plan = view.state.plan
    smaller = _smaller_micro_batch(plan) if plan else None
    if plan is None or smaller is None:
        advice = (
            "not even one row at a time fits; shorten spec.dataset.maxLength, set "
            f"training.gradientCheckpointing: offload, use qlora, train fewer layers, or {_with_gpus(plan)}"
        )
        return give_up(view, failure.reason, f"{failure.message}; {advice}", attempts)
    attempts = attempts.model_copy(update={"memory_retries": attempts.memory_retries + 1, "micro_batch_size": smaller})
    return _again(view, failure, attempts, 0.0, f"micro-batch {smaller} instead of {plan.micro_batch_size}")


def _with_gpus(plan: PlanStatus | None) -> str:
    """What more room there may be on GPUs, by how the job was spread over them."""
    if plan is None or plan.strategy == Strategy.SINGLE:
        return "take larger GPUs, or several with spec.parallelism.strategy: fsdp"
    if plan.strategy == Strategy.DDP:
        return (
            "set spec.parallelism.strategy: fsdp, which divides the model among the GPUs where the method allows it "
            "(docs/strategies.md)"
        )
    return "take more or larger GPUs"


def _smaller_micro_batch(plan: PlanStatus) -> int | None:
    """The largest that is at most half of the planned one and divides the rows of a process; None below 1."""
    rows = plan.micro_batch_size * plan.gradient_accumulation
    return next((n for n in range(plan.micro_batch_size // 2, 0, -1) if rows % n == 0), None)


def _again(view: View, failure: Failure, attempts: AttemptsStatus, delay: float, how: str) -> Decision:
    due = view.now + delay
    attempts = attempts.model_copy(update={"next_attempt_at": rfc3339(due)})
    when = f"attempt {view.current + 1} follows" + (f" in {delay:.0f} s" if delay else "")
    state: JobState = replace(
        view.state,
        phase=Phase.RESTARTING,
        reason=failure.reason,
        message=f"attempt {view.current} failed: {failure.message}; {when} ({how})",
        attempts=attempts,
        stopping=False,
        report=view.report,
    )
    return Decision(state, requeue_after=delay)


def _furthest(view: View, failure: Failure) -> int | None:
    """The furthest step that is known of, by the failed pod, the newest report, or what was known before."""
    reported = view.report.metrics.get("step") if view.report else None
    shown = view.status.progress.step if view.status.progress else None
    known = [failure.step, None if reported is None else int(reported), shown, view.state.attempts.furthest_step]
    return max((step for step in known if step is not None), default=None)


def _backoff(failures: int) -> float:
    """Seconds before another attempt: doubled with each failure before this one, up to a limit."""
    return min(BACKOFF_LIMIT_SECONDS, BACKOFF_SECONDS * 2.0 ** min(failures, 16))
