"""The cause of a failure among what the pods tell."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_operator.constants import Reason
from finetune_operator.failures.failure import Failure, Retry, Unsettled
from finetune_operator.failures.nodes import is_silent, is_stranded, node_lost, told_by
from finetune_operator.failures.pods import Rank, account_of, disruption, ended_trainer, is_disrupted
from finetune_operator.failures.waiting import stuck
from finetune_operator.observed import ObservedAttempt, ObservedPod
from finetune_trainer.contract import TerminationMessage

TELLING_SECONDS = 30.0
"""How long after the first failure another pod's account of it is still about the same thing."""
SETTLE_SECONDS = 5.0
"""How long after the first failure the other pods are waited for, before a cause is named."""
CONCLUDE_SECONDS = 30.0
"""After so long a failed pod is believed although the PyTorchJob does not say Failed."""


def classify(attempt: ObservedAttempt, pods: Sequence[ObservedPod], now: float) -> Failure | Unsettled | None:
    """Whether an attempt has failed, and of what.

    Args:
        attempt: its PyTorchJob.
        pods: its pods.
        now: seconds since the epoch.

    Returns:
        None while nothing has failed; Unsettled while the pods may still tell more.
    """
    over = attempt.is_true("Failed")
    told = [(pod, account) for pod in pods if (account := account_of(pod, over)) is not None]
    told += _lost(pods, now, suspected=bool(told))
    if not told:
        return _awaited(pods, now) if over else stuck(pods, now)
    accounts = [account for _, account in told]
    ended = [failure.at for _, failure in accounts if failure.at is not None]
    # A pod that was taken away may never tell when it ended.
    first = min(ended or [_last_change(pod) for pod, _ in told])
    # A node's clock may be ahead of ours: we must not wait for it.
    age = now - first if first <= now else CONCLUDE_SECONDS
    if not over and age < CONCLUDE_SECONDS:
        return Unsettled(CONCLUDE_SECONDS - age)
    if age < SETTLE_SECONDS and any(pod.active for pod in pods):
        return Unsettled(SETTLE_SECONDS - age)
    return _cause(accounts, first)


def _awaited(pods: Sequence[ObservedPod], now: float) -> Unsettled:
    """The training operator calls a job failed as soon as a running pod is being deleted, while its trainer saves: how
    that ends decides what it was."""
    waits = [at - now for pod in pods if (at := told_by(pod)) is not None and at > now]
    return Unsettled(min(waits, default=0.0))


def _lost(
    pods: Sequence[ObservedPod], now: float, *, suspected: bool
) -> list[tuple[ObservedPod, tuple[Rank, Failure]]]:
    """The pods of lost nodes. One that is only silent may come back, unless its peers have failed already."""
    return [
        (pod, (Rank.DISRUPTION, node_lost(pod)))
        for pod in pods
        if is_stranded(pod, now) or (suspected and is_silent(pod))
    ]


def stalled(pods: Sequence[ObservedPod], limit: int, *, heard: bool = True) -> Failure:
    """Of an attempt without progress: a lost node where there is one, else the trainer hangs.

    Args:
        limit: seconds that it was silent.
        heard: whether a report of the job has ever arrived; where not, it may be the reports that hang.
    """
    for pod in pods:
        if is_disrupted(pod):
            return disruption(pod, None)
        if is_silent(pod):
            return node_lost(pod)
    if not heard:
        text = (
            f"no report of this job has ever arrived, in {limit} s (a multiple of spec.runPolicy.stallSeconds): the "
            "pods' logs show whether it hangs or `progress was not reported`; in that case let the pods reach the "
            "operator's progress port (NetworkPolicy), or raise spec.runPolicy.stallSeconds"
        )
        return Failure(Reason.PROGRESS_STALLED, text, Retry.COUNTED)
    return Failure(
        Reason.PROGRESS_STALLED,
        f"no progress was reported for {limit} s (spec.runPolicy.stallSeconds); the pods' logs show where it hangs",
        Retry.COUNTED,
    )


def result_of(pods: Sequence[ObservedPod]) -> TerminationMessage | None:
    """What the master left when it succeeded; None when it did not, or left nothing that can be read."""
    for pod in pods:
        container = ended_trainer(pod)
        if pod.role == "master" and container is not None and container.exit_code == 0:
            return TerminationMessage.decode(container.message)
    return None


def _last_change(pod: ObservedPod) -> float:
    changes = [condition.since for condition in pod.conditions.values() if condition.since is not None]
    return max(changes, default=pod.created_at)


def _cause(accounts: Sequence[tuple[Rank, Failure]], first: float) -> Failure:
    def order(account: tuple[Rank, Failure]) -> tuple[float, float, bool, str]:
        rank, failure = account
        at = first if failure.at is None else failure.at
        telling = rank if at <= first + TELLING_SECONDS else Rank.ORDINARY
        # In the same second a process that was asked to stop explains its peers, and not they it.
        return (telling, at, failure.retry is not Retry.FREE, str(failure.pod))

    return min(accounts, key=order)[1]
