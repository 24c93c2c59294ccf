"""Gather, decide, act, one status patch, then the events: the same for every cluster.

Level-triggered: a call names a job and nothing else. Everything that is remembered stands in the job's status and in
its children, so a crash between any two calls loses nothing: whoever comes next decides from what is there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator import logs, render, status
from finetune_operator.announce import events
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.clock import WallClock
from finetune_operator.cluster import Cluster, ObjectRef
from finetune_operator.constants import PYTORCHJOB_API_VERSION, PYTORCHJOB_KIND, Reason
from finetune_operator.decide import CreateAttempt, Decision, DeleteAttempt, Need, View, decide, give_up, held_up
from finetune_operator.errors import AlreadyExists, ClusterError, Conflict, Forbidden, KindUnknown, NotFound
from finetune_operator.excerpts import owner_uid
from finetune_operator.observed import JobRef, Observed, ObservedAttempt, ObservedJob
from finetune_operator.planning import Preparer
from finetune_operator.settings import Settings
from finetune_operator.state import Preparation

log = logging.getLogger(__name__)

SOON_SECONDS = 1.0
"""When to look again after the job changed under our hands."""
_ROUNDS = 6
"""How often one reconcile asks for more before it leaves the rest to the next."""


class _NameTaken(Exception):
    """A child's name is held by an object that is not ours."""


class _Outdated(Exception):
    """What a decision was made of is no longer true: it has to be made again."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A decision with what it was made of."""

    view: View
    decision: Decision
    spec: FineTuneJobSpec | None


class Reconciler:
    """Brings one job at a time nearer to what its spec says."""

    def __init__(
        self,
        cluster: Cluster,
        preparer: Preparer,
        settings: Settings,
        clock: WallClock,
        *,
        progress_ca: Callable[[], str | None] = lambda: None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            progress_ca: PEM of the authority that new attempts are told to trust when they report progress.
            on_failure: told of every attempt that failed, by one of `constants.Reason`.
        """
        self._progress_ca = progress_ca
        self._on_failure = on_failure
        self._cluster = cluster
        self._preparer = preparer
        self._settings = settings
        self._clock = clock

    async def reconcile(self, ref: JobRef) -> float | None:
        """Do what is to be done about a job now.

        Returns:
            Seconds after which to come again although nothing was heard of it; None when only an event can change
            anything.

        Raises:
            ClusterError: a call failed in a way that may pass. Nothing is half-done: call again later.
        """
        observed = self._cluster.observe(ref)
        if observed is None:
            return None
        logs.note(uid=observed.job.uid)
        case = await self._decide(observed)
        if case is None:
            return SOON_SECONDS
        state = case.decision.state
        logs.note(attempt=case.view.current if state is None else state.attempts.current)
        carried_out = await self._act(case)
        if carried_out is None:
            return 0.0
        return await self._record(case.view, carried_out)

    async def _decide(self, observed: Observed) -> _Case | None:
        """Decide, gathering what the decision turns out to need; None when the job changed meanwhile."""
        preparation: Preparation | None = None
        spec: FineTuneJobSpec | None = None
        confirmed = False
        for _ in range(_ROUNDS):
            view = self._view(observed, preparation, confirmed)
            decision = decide(view)
            if decision.need is None:
                return _Case(view, decision, spec)
            if decision.need is Need.PREPARATION:
                preparation, spec = await self._preparer.prepare(observed.job, view.status)
            else:
                await self._cluster.refresh(observed.job.ref)
                confirmed = True
            again = self._cluster.observe(observed.job.ref)
            if again is None or again.job.resource_version != observed.job.resource_version:
                return None
            observed = again
        return None

    def _view(self, observed: Observed, preparation: Preparation | None, confirmed: bool) -> View:
        return View(
            observed=observed,
            status=status.read(observed.job.status),
            now=self._clock(),
            reliable_since=self._clock.reliable_since,
            preparation=preparation,
            confirmed=confirmed,
        )

    async def _act(self, case: _Case) -> Decision | None:
        """Carry out a decision's actions; what stands in the way of a creation is a decision too.

        None when the decision was made of what is no longer true.
        """
        view, decision = case.view, case.decision
        for action in decision.actions:
            if isinstance(action, DeleteAttempt):
                await self._delete(view, action.attempt)
                continue
            try:
                obstacle = await self._try_create(case, action)
            except _Outdated:
                return None
            except ClusterError as error:
                if (error.status or 0) >= 500:
                    # It may last, as a webhook's silence does; the queue tries again, ever later.
                    said = f"{error}; it is tried again{_whose_webhook(error)}"
                    await self._record(view, held_up(view, Reason.CREATE_FAILED, said))
                raise
            if obstacle is not None:
                log.warning("%s: %s", view.observed.job.ref, obstacle.state.message if obstacle.state else "")
                return obstacle
        return decision

    async def _try_create(self, case: _Case, action: CreateAttempt) -> Decision | None:
        view = case.view
        try:
            await self._create(case, action)
        except _NameTaken as taken:
            return held_up(view, Reason.NAME_TAKEN, str(taken))
        except KindUnknown as error:
            return held_up(
                view,
                Reason.TRAINING_OPERATOR_MISSING,
                f"the cluster does not know PyTorchJobs ({error}): install the Kubeflow training operator; the job "
                "then goes on by itself",
            )
        except Forbidden as error:
            return held_up(view, Reason.CREATE_REFUSED, f"the API server refuses: {error}")
        except ClusterError as error:
            if error.status not in (400, 422):
                raise
            if _by_policy(error):
                return held_up(view, Reason.CREATE_REFUSED, f"the API server refuses: {error}")
            return give_up(view, Reason.REJECTED, f"the API server says that attempt {action.number} is wrong: {error}")
        return None

    async def _create(self, case: _Case, action: CreateAttempt) -> None:
        job, state = case.view.observed.job, case.decision.state
        assert case.spec is not None and state is not None and state.plan is not None
        attempt = render.Attempt(
            job.ref, job.uid, action.number, case.spec, state.plan, self._settings.trainer, self._progress_ca()
        )
        await self._create_config_map(job, render.config_map(attempt))
        if await self._found(job, render.pytorch_job(attempt)) is not None:
            # Ours, of a turn whose status was lost: it is followed, and says itself by which plan it was made.
            await self._cluster.refresh(job.ref)
            raise _Outdated

    async def _create_config_map(self, job: ObservedJob, manifest: dict[str, Any]) -> None:
        name, found = manifest["metadata"]["name"], await self._found(job, manifest)
        if found is None or found.get("data") == manifest["data"]:
            return
        # Of a turn that did not come to its PyTorchJob, and by other settings or another plan than today's.
        await self._cluster.refresh(job.ref)
        observed = self._cluster.observe(job.ref)
        if observed is None or any(one.name == name for one in observed.attempts):
            raise _Outdated
        await self._cluster.delete(ObjectRef("v1", "ConfigMap", job.ref.namespace, name, found["metadata"]["uid"]))
        await self._cluster.create(manifest)

    async def _found(self, job: ObservedJob, manifest: dict[str, Any]) -> Mapping[str, Any] | None:
        """Create a child, or find that we did so before: then it is what is there.

        Raises:
            _NameTaken: it is there and another job's: never adopted.
            AlreadyExists: it was there, and is gone again.
        """
        try:
            await self._cluster.create(manifest)
        except AlreadyExists as error:
            if error.found is None:
                raise
            if owner_uid(error.found) != job.uid:
                what = f"{manifest['kind']} {job.ref.namespace}/{manifest['metadata']['name']}"
                raise _NameTaken(
                    f"{what} is there and not of this job; waiting for it to go (an earlier job of this name may have "
                    "left it; if it is yours, delete it, or give this job another name)"
                ) from error
            return error.found
        return None

    async def _delete(self, view: View, attempt: ObservedAttempt) -> None:
        """Delete both children; the PyTorchJob last, because it is what is looked for when this has to be repeated."""
        where, uid = (attempt.namespace, attempt.name), view.observed.job.uid
        await self._cluster.delete(ObjectRef("v1", "ConfigMap", *where, owner_uid=uid))
        if not await self._cluster.delete(ObjectRef(PYTORCHJOB_API_VERSION, PYTORCHJOB_KIND, *where, uid=attempt.uid)):
            # The store has what is gone: an event that was lost. Without a fresh look it would be deleted for ever.
            await self._cluster.refresh(view.observed.job.ref)

    async def _record(self, view: View, decision: Decision) -> float | None:
        """Write the status where it changed, then say what is worth an event."""
        if decision.state is None:
            return decision.requeue_after
        job = view.observed.job
        after = status.build(view.status, decision.state, generation=job.generation, now=view.now)
        patch = status.difference(job.status, after)
        if not patch:
            return decision.requeue_after
        if status.is_progress_only(patch):
            wait = self._settings.progress_patch_seconds - status.progress_age(view.status, view.now)
            if wait > 0:
                return decision.within(wait).requeue_after
        try:
            await self._cluster.patch_status(job.ref, uid=job.uid, resource_version=job.resource_version, status=patch)
        except Conflict:
            # A watch that stands still would have us fail with the same old job again and again.
            await self._cluster.reread(job.ref)
            return SOON_SECONDS
        except NotFound:
            return None
        before = view.status.attempts.last if view.status.attempts else None
        last = after.attempts.last if after.attempts else None
        if last is not None and last != before:
            # Not `last.reason`, which may be a word of the trainer's: a metric's labels are ours, and few.
            self._on_failure(decision.state.reason)
        await self._announce(view, after)
        return decision.requeue_after

    async def _announce(self, view: View, after: FineTuneJobStatus) -> None:
        job = view.observed.job
        for event in events(view.status, after):
            log.info("%s: %s: %s", job.ref, event.reason, event.message)
            try:
                await self._cluster.emit(job.ref, job.uid, event)
            except ClusterError as error:
                log.warning("%s: event %s was lost: %s", job.ref, event.reason, error)


def _whose_webhook(error: ClusterError) -> str:
    if "webhook" not in str(error) or "kubeflow" not in str(error):
        return ""
    return ". The webhook is the Kubeflow training operator's: see whether its pods run and answer"


def _by_policy(error: ClusterError) -> bool:
    """Whether somebody's admission policy says no, which may pass: it answers 422, and many a webhook 400.

    The training operator's own webhook checks the PyTorchJob itself.
    """
    webhook = re.search(r'admission webhook "([^"]*)" denied the request', str(error))
    if webhook is not None:
        return not webhook[1].endswith("kubeflow.org")
    return "denied request" in str(error) and "ValidatingAdmissionPolicy" in str(error)
