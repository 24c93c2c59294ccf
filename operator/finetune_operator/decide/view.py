"""One job as the checks look at it: what was observed, with what follows from it at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from finetune_operator.api.v1alpha1 import AttemptsStatus, FineTuneJobStatus, PlanStatus, RunPolicy
from finetune_operator.constants import ANNOTATION_RETRY, CONTAINER, Phase, Reason
from finetune_operator.excerpts import parse_time
from finetune_operator.observed import Observed, ObservedAttempt, ObservedPod, ProgressReport
from finetune_operator.state import JobState, Preparation, carried
from finetune_operator.times import rfc3339


@dataclass(frozen=True)
class View:
    """What a decision about one job may look at."""

    observed: Observed
    status: FineTuneJobStatus
    """The job's status, read."""
    now: float
    """Seconds since the epoch."""
    reliable_since: float
    """When this operator started, or its clock was set: of the time before it cannot tell how long it lasted."""
    preparation: Preparation | None = None
    """The spec, checked and planned, once it was asked for."""
    confirmed: bool = False
    """Whether the children were read past the watches' cache."""

    @cached_property
    def policy(self) -> RunPolicy:
        """`spec.runPolicy`; the defaults where it cannot be read."""
        return self._policy or RunPolicy()

    @property
    def policy_is_readable(self) -> bool:
        """Whether `spec.runPolicy` is what the schema asks for."""
        return self._policy is not None

    @cached_property
    def _policy(self) -> RunPolicy | None:
        raw = self.observed.job.spec.get("runPolicy") or {}
        try:
            # Nulls mean absent, as on the API server.
            return RunPolicy.model_validate({k: v for k, v in raw.items() if v is not None})
        except (ValidationError, AttributeError):
            return None

    @cached_property
    def owned(self) -> tuple[ObservedAttempt, ...]:
        """This job's PyTorchJobs, oldest first."""
        uid = self.observed.job.uid
        mine = [one for one in self.observed.attempts if one.owner_uid == uid and one.number > 0]
        return tuple(sorted(mine, key=lambda one: one.number))

    @cached_property
    def current(self) -> int:
        """Number of the newest attempt that was ever created; 0 before the first."""
        return max(self._recorded.current, self.owned[-1].number if self.owned else 0)

    @property
    def is_unrecorded(self) -> bool:
        """Whether the newest attempt was created without the status knowing: what it says is of an older one."""
        return self.current > self._recorded.current

    @property
    def _recorded(self) -> AttemptsStatus:
        return self.status.attempts or AttemptsStatus()

    @cached_property
    def attempt(self) -> ObservedAttempt | None:
        """The PyTorchJob of the newest attempt."""
        return next((one for one in self.owned if one.number == self.current), None)

    @cached_property
    def pods(self) -> tuple[ObservedPod, ...]:
        """The pods of the newest attempt."""
        uid = self.observed.job.uid
        return tuple(p for p in self.observed.pods if p.attempt == self.current > 0 and p.job_uid in ("", uid))

    @property
    def has_active_pods(self) -> bool:
        """Whether a pod of the newest attempt may still use its GPUs."""
        return any(pod.active for pod in self.pods)

    @property
    def leaving(self) -> tuple[ObservedPod, ...]:
        """Those that are being deleted, and may still save a checkpoint."""
        return tuple(pod for pod in self.pods if pod.active and pod.deleting)

    @property
    def were_leaving(self) -> bool:
        """Whether the status tells that pods of the newest attempt were being deleted, and not by a suspension."""
        return self.state.reason == Reason.STOPPING and not (self.is_unrecorded or self.is_stopping)

    @property
    def name_is_taken(self) -> bool:
        """Whether leftovers of another job of this name hold the names of the next attempt."""
        job, number = self.observed.job, self.current + 1
        name = child_name(job.ref.name, number)
        return any(one.name == name and one.owner_uid != job.uid for one in self.observed.attempts) or any(
            pod.attempt == number and pod.job_uid not in ("", job.uid) for pod in self.observed.pods
        )

    @cached_property
    def is_stopping(self) -> bool:
        """Whether the newest attempt is being stopped because the job was suspended."""
        return carried(self.status).stopping and not self.is_unrecorded

    @property
    def needs_attempt(self) -> bool:
        """Whether the newest attempt is over, by what the status says, and another one is to follow."""
        if self.current == 0:
            return True
        return self.status.phase in (Phase.RESTARTING, Phase.SUSPENDED) and not self.is_unrecorded

    @cached_property
    def state(self) -> JobState:
        """What the status says now, brought up to the newest attempt: where the next state starts from."""
        state = carried(self.status)
        token = self.observed.job.annotations.get(ANNOTATION_RETRY)
        attempts = state.attempts.model_copy(update={"current": self.current, "retry_token": token})
        if self.is_unrecorded:
            attempts = attempts.model_copy(update={"next_attempt_at": None})
        start = state.start_time
        # Of an attempt that is on record it was cleared on purpose: a job that is tried once more has its own time.
        if start is None and self.is_unrecorded and self.attempt is not None:
            start = rfc3339(self.attempt.created_at)
        plan = (self._rendered_plan or state.plan) if self.is_unrecorded else state.plan
        return replace(state, attempts=attempts, start_time=start, plan=plan, stopping=self.is_stopping)

    @property
    def _rendered_plan(self) -> PlanStatus | None:
        """The plan that the newest attempt was rendered from, as it says itself."""
        if self.attempt is None or not self.attempt.plan:
            return None
        try:
            return PlanStatus.model_validate_json(self.attempt.plan)
        except ValidationError:
            return None

    @property
    def next_attempt_at(self) -> float:
        """When the next attempt is due, in seconds since the epoch; 0 where nothing holds it back."""
        return parse_time(self._recorded.next_attempt_at) or 0.0

    @cached_property
    def report(self) -> ProgressReport | None:
        """The newest report of the newest attempt."""
        report, attempt = self.observed.report, self.attempt
        if report is None or attempt is None:
            return None
        if report.attempt is None:
            return report if report.received_at >= attempt.created_at else None
        return report if report.attempt == self.current else None

    @property
    def was_heard(self) -> bool:
        """Whether a report of the job was ever taken in, of whichever attempt: its pods can reach the operator."""
        return self.observed.report is not None or self.status.progress is not None

    @cached_property
    def running_since(self) -> float | None:
        """When the last of the pods started to train; None while one of them does not."""
        expected = self.status.plan.nodes if self.status.plan else max(1, len(self.pods))
        starts = [
            one.started_at or pod.created_at
            for pod in self.pods
            for one in pod.containers
            if one.name == CONTAINER and (one.state == "running" or one.exit_code == 0) and not pod.deleting
        ]
        return max(starts) if len(starts) >= expected else None

    @property
    def deadline_in(self) -> float | None:
        """Seconds until `activeDeadlineSeconds` are over; None without such a limit."""
        limit, start = self.policy.active_deadline_seconds, parse_time(self.status.start_time)
        return None if limit is None or start is None else start + limit - self.now

    @property
    def output_uri(self) -> str:
        """`spec.output.uri`, as it stands there."""
        output = self.observed.job.spec.get("output")
        return str(output.get("uri", "")) if isinstance(output, Mapping) else ""

    @property
    def queue(self) -> str:
        """`spec.scheduling.queue`, as it stands there."""
        scheduling: Any = self.observed.job.spec.get("scheduling")
        return str(scheduling.get("queue") or "") if isinstance(scheduling, Mapping) else ""


def child_name(job: str, number: int) -> str:
    """Name of an attempt's ConfigMap and PyTorchJob: the same attempt always has the same name."""
    return f"{job}-{number}"
