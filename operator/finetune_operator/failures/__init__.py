"""Why an attempt failed, and whether another one would help. Pure: pod statuses in, a Failure out.

A gang dies together: one process fails, then its peers lose their connections, are told to stop, or are killed. The
cause is sought in this order:

1. What decides by itself what follows, from any pod that ended within `cause.TELLING_SECONDS` of the first: a user
   error (its exit code is chosen by the trainer, a dying peer cannot cause it), memory (OOMKilled, exit 71), and a pod
   that the cluster took away (`DisruptionTarget`) or whose node answers no more (`nodes`).
2. Otherwise the process that ended first. Those that ended after it are its victims: a survivor that is stopped by
   the training operator's clean-up saves a checkpoint and exits with 75 like a preempted one, and is not.

Kubernetes' own words are those of its documentation: "Pod Lifecycle", "Pod disruption conditions", "Node-pressure
Eviction", and of the kubelet's waiting reasons (`pkg/kubelet/images`, `pkg/kubelet/kuberuntime`).
"""

from finetune_operator.failures.cause import classify, result_of, stalled
from finetune_operator.failures.failure import Failure, Retry, Unsettled, deleted, unexplained, vanished
from finetune_operator.failures.nodes import is_stranded, stranded_at, who_can_help
from finetune_operator.failures.waiting import PULL_SECONDS, blocked_start

__all__ = [
    "PULL_SECONDS",
    "Failure",
    "Retry",
    "Unsettled",
    "blocked_start",
    "classify",
    "deleted",
    "is_stranded",
    "result_of",
    "stalled",
    "stranded_at",
    "unexplained",
    "vanished",
    "who_can_help",
]
