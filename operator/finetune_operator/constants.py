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
TOKEN_DIRECTORY = "/var/run/secrets/finetune.dev"
PROGRESS_AUDIENCE = "finetune.dev/progress"
MASTER_PORT = 23456

MAX_NAME_LENGTH = 40
"""Room for `-<attempt>-worker-<index>` within the 63 characters of a host name."""


class Phase:
    """`.status.phase`: one word for people; programs look at the conditions."""

    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    ALL = (PENDING, QUEUED, STARTING, RUNNING, RESTARTING, SUSPENDED, SUCCEEDED, FAILED)
    TERMINAL = frozenset({SUCCEEDED, FAILED})


class Condition:
    """`.status.conditions[].type`."""

    ACCEPTED = "Accepted"
    PLANNED = "Planned"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"

    ALL = (ACCEPTED, PLANNED, RUNNING, SUCCEEDED, FAILED, SUSPENDED, RECONCILING, STALLED)


class Reason:
    """`.status.conditions[].reason` and the reasons of events."""

    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    NOT_PERMITTED = "NotPermitted"
    """The cluster's administrator does not allow what the spec asks for."""
    NOT_SUPPORTED = "NotSupported"

    FITS = "Fits"
    DOES_NOT_FIT = "DoesNotFit"
    MODEL_UNKNOWN = "ModelConfigUnavailable"
    """The model's config.json could not be read from here: the trainer checks in its first seconds."""
    INVALID_SELECTION = "InvalidSelection"

    ATTEMPT_CREATED = "AttemptCreated"
    WAITING_FOR_PODS = "WaitingForPods"
    QUEUED = "Queued"
    TRAINING = "Training"
    TRAINING_OPERATOR_MISSING = "TrainingOperatorMissing"
    NAME_TAKEN = "NameTaken"
    CREATE_REFUSED = "CreateRefused"
    """The API server does not allow a child to be created: rights, quota or an admission policy."""
    REJECTED = "Rejected"
    """The API server says that a child is not valid."""
    PREPARING = "Preparing"
    RESUMING = "Resuming"
    RETRYING = "Retrying"
    SUSPENDED = "Suspended"
    STOPPING = "Stopping"
    NOT_SUSPENDED = "NotSuspended"
    NOT_RUNNING = "NotRunning"
    IN_PROGRESS = "InProgress"
    FINISHED = "Finished"
    CLEANED_UP = "CleanedUp"

    SUCCEEDED = "TrainingSucceeded"
    USER_ERROR = "UserError"
    GPU_OUT_OF_MEMORY = "OutOfGPUMemory"
    HOST_OUT_OF_MEMORY = "OutOfHostMemory"
    PREEMPTED = "Preempted"
    NODE_LOST = "NodeLost"
    INFRASTRUCTURE = "InfrastructureFailure"
    IMAGE_PULL = "ImagePullFailed"
    PROGRESS_STALLED = "ProgressStalled"
    CHILD_DELETED = "PyTorchJobDeleted"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
