"""Names that stand in other people's clusters: groups, labels, mount paths, reasons of conditions.

Reasons and what they mean are kept here, in one place, because users write alerts on them.
"""

from __future__ import annotations

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"

PYTORCHJOB_API_VERSION = "kubeflow.org/v1"
PYTORCHJOB_KIND = "PyTorchJob"
PYTORCHJOB_PLURAL = "pytorchjobs"

MANAGED_BY = "finetune-operator"
FIELD_MANAGER = "finetune-operator"

LABEL_NAME = "app.kubernetes.io/name"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
LABEL_JOB = "finetune.dev/job"
"""Children are listed and watched by it. Labels of `app.kubernetes.io` are other tools' too, and theirs to change."""
LABEL_JOB_UID = "finetune.dev/job-uid"
LABEL_ATTEMPT = "finetune.dev/attempt"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PYTORCHJOB = "training.kubeflow.org/job-name"
LABEL_REPLICA_TYPE = "training.kubeflow.org/replica-type"
LABEL_REPLICA_INDEX = "training.kubeflow.org/replica-index"
ANNOTATION_CONFIG_DIGEST = "finetune.dev/config-sha256"
ANNOTATION_PLAN = "finetune.dev/plan"
"""On a PyTorchJob: the plan that it was rendered from, for an operator that ended before it could write it down."""
ANNOTATION_RETRY = "finetune.dev/retry"
"""Set by a user (or Argo CD's action) on a failed job to any new value: the operator tries once more."""
ANNOTATION_ARGOCD_IGNORE_UPDATES = "argocd.argoproj.io/ignore-resource-updates"

CONTAINER = "pytorch"
"""The training operator insists on this container name."""
CONFIG_DIRECTORY = "/etc/finetune"
WORK_DIRECTORY = "/var/lib/finetune"
PVC_DIRECTORY = "/mnt/pvc"
TOKEN_DIRECTORY = "/var/run/secrets/finetune.dev"  # nosec B105  # a folder
PROGRESS_AUDIENCE = "finetune.dev/progress"
PROGRESS_URL_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"
"""Kubeflow Trainer's word for where a trainer reports. Pods without it report nothing."""
MASTER_PORT = 23456

MAX_NAME_LENGTH = 40
"""Room for `-<attempt>-worker-<index>` within the 63 characters of a host name."""


class Phase:
    """`.status.phase`: one word for people; programs look at the conditions."""

    PENDING = "Pending"
    """Accepted and planned; the PyTorchJob is not there yet, or its pods are not."""
    QUEUED = "Queued"
    """Kueue has yet to admit the job."""
    STARTING = "Starting"
    """Pods are scheduled, pull their image, or load the model."""
    RUNNING = "Running"
    """Training."""
    RESTARTING = "Restarting"
    """An attempt failed, and another one follows."""
    SUSPENDED = "Suspended"
    """Stopped by `runPolicy.suspend`; its checkpoint waits."""
    SUCCEEDED = "Succeeded"
    """The result is in object storage, read back and compared."""
    FAILED = "Failed"
    """Over, without a result."""

    ALL = (PENDING, QUEUED, STARTING, RUNNING, RESTARTING, SUSPENDED, SUCCEEDED, FAILED)
    TERMINAL = frozenset({SUCCEEDED, FAILED})


class Condition:
    """`.status.conditions[].type`."""

    ACCEPTED = "Accepted"
    """The spec is valid, and the administrator allows what it asks for."""
    PLANNED = "Planned"
    """Memory and parallelism are worked out and fit; Unknown while the model's config.json cannot be read from here."""
    RUNNING = "Running"
    """The trainer reports that it trains."""
    SUCCEEDED = "Succeeded"
    """The result is there; `kubectl wait --for=condition=Succeeded` waits for it."""
    FAILED = "Failed"
    """The job is over without a result; the message says why and what to do."""
    SUSPENDED = "Suspended"
    """No pod runs, as `runPolicy.suspend` asks."""
    RECONCILING = "Reconciling"
    """Work is under way (kstatus)."""
    STALLED = "Stalled"
    """The job cannot get any further (kstatus)."""

    ALL = (ACCEPTED, PLANNED, RUNNING, SUCCEEDED, FAILED, SUSPENDED, RECONCILING, STALLED)


class Reason:
    """`.status.conditions[].reason` and the reasons of events."""

    ACCEPTED = "Accepted"
    """The spec is valid."""
    INVALID_SPEC = "InvalidSpec"
    """The spec breaks a rule that the API server did not check. Correct the fields that the message names; `finetune
    validate` finds them before anything is applied."""
    NOT_PERMITTED = "NotPermitted"
    """The cluster's administrator does not allow what the spec asks for. Leave it out, or have it allowed in the
    chart's `permissions`."""
    NOT_SUPPORTED = "NotSupported"
    """Valid, but this version cannot do it with this model or these GPUs. The message names what it can do."""

    FITS = "Fits"
    """The plan fits the GPUs."""
    DOES_NOT_FIT = "DoesNotFit"
    """The job needs more GPU memory than there is. The message tells the need in parts, and what would fit; `finetune
    plan` shows the same."""
    MODEL_UNKNOWN = "ModelConfigUnavailable"
    """The model's config.json could not be read from here, so nothing is planned, and the trainer checks in its first
    seconds. Give `parallelism.strategy` and `training.microBatchSize` yourself, or let the operator reach the model."""
    PLANNING_TOO_LONG = "PlanningTooLong"
    """No plan was found within a minute: the operator has too little CPU, or a defect. The job runs with a careful
    plan, and the trainer checks in its first seconds. Give the operator more CPU, or `parallelism.strategy` and
    `training.microBatchSize` yourself."""
    INVALID_SELECTION = "InvalidSelection"
    """`layers` names blocks or modules that the model does not have. The message lists the near names."""

    ATTEMPT_CREATED = "AttemptCreated"
    """The PyTorchJob is there, and its pods are about to be."""
    WAITING_FOR_PODS = "WaitingForPods"
    """Pods wait for a node, their image, or a Secret. The message has the scheduler's or the kubelet's own words."""
    PODS_MISSING = "PodsMissing"
    """The training operator has not created all pods within a minute: a quota, Pod Security or another admission policy
    refuses them, or it does not run. `kubectl describe pytorchjob NAME` has the refusal as an event; the training
    operator goes on trying."""
    QUEUED = "Queued"
    """Kueue has yet to admit the PyTorchJob. Look at the queue's quota."""
    TRAINING = "Training"
    """The trainer reports progress."""
    NO_REPORTS = "NoReports"
    """The pods run, and in `runPolicy.stallSeconds` no report of this job has ever arrived. Most often a NetworkPolicy
    keeps its pods from the operator's progress port: let them through, and the attempt goes on as it is. If the pods'
    logs show that it hangs instead, nothing need be done: it is ended after four times that long."""
    TRAINING_OPERATOR_MISSING = "TrainingOperatorMissing"
    """The cluster knows no PyTorchJobs. Install the Kubeflow training operator; the job goes on by itself."""
    NAME_TAKEN = "NameTaken"
    """An object of the attempt's name belongs to somebody else. Delete it, or give the job another name."""
    CREATE_REFUSED = "CreateRefused"
    """The API server does not allow the PyTorchJob or the ConfigMap of an attempt to be created: rights, a quota on
    objects or an admission policy. Give what the message names; it is tried again. Pods are the training operator's:
    see `PodsMissing`."""
    CREATE_FAILED = "CreateFailed"
    """The API server could not create a child, though it may: a webhook that does not answer, or a fault of its own. It
    is tried again."""
    REJECTED = "Rejected"
    """The API server says that a child is not valid. Most often `trainer.podTemplate` is the cause; create a corrected
    job."""
    PREPARING = "Preparing"
    """The job was seen, and is checked and planned."""
    RESUMING = "Resuming"
    """`runPolicy.suspend` was taken back: a new attempt goes on from the newest complete checkpoint."""
    RETRYING = "Retrying"
    """Somebody asked for one more attempt of a failed job, by the annotation `finetune.dev/retry`."""
    SUSPENDED = "Suspended"
    """Stopped as `runPolicy.suspend` asks. Set it to false to go on."""
    STOPPING = "Stopping"
    """Pods were asked to stop, save a checkpoint, and have `scheduling.terminationGracePeriodSeconds` for it."""
    NOT_SUSPENDED = "NotSuspended"
    """`runPolicy.suspend` is not set."""
    IN_PROGRESS = "InProgress"
    """The job is not over."""
    FINISHED = "Finished"
    """The job is over."""

    SUCCEEDED = "TrainingSucceeded"
    """The result is in object storage, and every file of it was read back and compared."""
    USER_ERROR = "UserError"
    """The trainer cannot carry the job out as it is written: the data, the model, credentials, or a setting. The
    message says which; create a corrected job."""
    GPU_OUT_OF_MEMORY = "OutOfGPUMemory"
    """The GPU has too little memory for the micro-batch. Once not even one row fits: shorten `dataset.maxLength`, set
    `training.gradientCheckpointing: offload`, use qlora, train fewer layers, or divide the model among several GPUs
    (`parallelism.strategy`)."""
    HOST_OUT_OF_MEMORY = "OutOfHostMemory"
    """A pod used more memory than it may and was killed. Raise `resources.memory`; `sharedMemory` counts towards it."""
    PREEMPTED = "Preempted"
    """The cluster took a pod away, or asked it to stop. The next attempt goes on from the checkpoint."""
    NODE_LOST = "NodeLost"
    """A node answers no more, or was taken out of service. Where it is off for sure, delete the Node, and the next
    attempt need not wait."""
    INFRASTRUCTURE = "InfrastructureFailure"
    """Something broke that another attempt may not meet again: object storage, the network, a node's disk, a defect.
    The message and the pod's log say what."""
    IMAGE_PULL = "ImagePullFailed"
    """The trainer's image cannot be pulled. Check `trainer.image` and the registry's credentials."""
    PROGRESS_STALLED = "ProgressStalled"
    """Nothing was reported for `runPolicy.stallSeconds`, or for four times as long by a job that was never heard of
    (see `NoReports`). The pods' logs show where it hangs; raise it where a step takes longer."""
    CHILD_DELETED = "PyTorchJobDeleted"
    """Somebody deleted the PyTorchJob of a running attempt. To stop a job set `runPolicy.suspend`, or delete the
    FineTuneJob."""
    RETRIES_EXHAUSTED = "RetriesExhausted"
    """As many attempts failed as `runPolicy.retries` allows. Put right what the message tells of the last one; then set
    the annotation `finetune.dev/retry` to a new value."""
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    """The job took longer than `runPolicy.activeDeadlineSeconds`. Its checkpoints stay: raise that, then set the
    annotation `finetune.dev/retry` to a new value."""
