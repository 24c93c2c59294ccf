"""API objects to excerpts. Pure: the local cluster and the Kubernetes one read the same objects the same way.

What an API server sends is not trusted to be complete: a missing or odd field becomes the excerpt's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, overload

from finetune_operator import constants as c
from finetune_operator.observed import (
    JobRef,
    ObservedAttempt,
    ObservedCondition,
    ObservedContainer,
    ObservedJob,
    ObservedPod,
)

Manifest = Mapping[str, Any]

_POD_PHASES = frozenset({"Pending", "Running", "Succeeded", "Failed"})


def observed_job(manifest: Manifest) -> ObservedJob:
    """The excerpt of a FineTuneJob."""
    meta = _mapping(manifest, "metadata")
    return ObservedJob(
        ref=JobRef(_text(meta, "namespace", "default"), _text(meta, "name")),
        uid=_text(meta, "uid"),
        generation=_integer(meta.get("generation"), 1),
        resource_version=_text(meta, "resourceVersion"),
        created_at=parse_time(meta.get("creationTimestamp")) or 0.0,
        deleting=meta.get("deletionTimestamp") is not None,
        labels=_mapping(meta, "labels"),
        annotations=_mapping(meta, "annotations"),
        spec=_mapping(manifest, "spec"),
        status=_mapping(manifest, "status"),
    )


def observed_attempt(manifest: Manifest) -> ObservedAttempt:
    """The excerpt of a PyTorchJob."""
    meta = _mapping(manifest, "metadata")
    run_policy = _mapping(_mapping(manifest, "spec"), "runPolicy")
    return ObservedAttempt(
        name=_text(meta, "name"),
        namespace=_text(meta, "namespace", "default"),
        uid=_text(meta, "uid"),
        owner_uid=owner_uid(manifest),
        number=_integer(_mapping(meta, "labels").get(c.LABEL_ATTEMPT), 0) or _number_in_name(manifest),
        created_at=parse_time(meta.get("creationTimestamp")) or 0.0,
        deleting=meta.get("deletionTimestamp") is not None,
        suspended=run_policy.get("suspend") is True,
        plan=_text(_mapping(meta, "annotations"), c.ANNOTATION_PLAN),
        conditions=_conditions(_mapping(manifest, "status")),
        reports=_reports(manifest),
    )


def _reports(manifest: Manifest) -> bool:
    """Whether a PyTorchJob's trainer is told where to report progress."""
    replicas = _mapping(_mapping(manifest, "spec"), "pytorchReplicaSpecs").values()
    templates = [_mapping(one, "template") for one in replicas if isinstance(one, Mapping)]
    containers = [one for template in templates for one in _list(_mapping(template, "spec"), "containers")]
    variables = [variable for one in containers if isinstance(one, Mapping) for variable in _list(one, "env")]
    return any(isinstance(one, Mapping) and one.get("name") == c.PROGRESS_URL_VARIABLE for one in variables)


def observed_pod(manifest: Manifest) -> ObservedPod:
    """The excerpt of a pod of a PyTorchJob.

    A pod that the training operator has not labelled (somebody's copy of one) gets the role `worker`, so that it is
    never taken for the master.
    """
    meta = _mapping(manifest, "metadata")
    labels = _mapping(meta, "labels")
    status = _mapping(manifest, "status")
    phase = _text(status, "phase", "Pending")
    return ObservedPod(
        name=_text(meta, "name"),
        uid=_text(meta, "uid"),
        attempt=_integer(labels.get(c.LABEL_ATTEMPT), 0),
        role="master" if _text(labels, c.LABEL_REPLICA_TYPE).lower() == "master" else "worker",
        index=_integer(labels.get(c.LABEL_REPLICA_INDEX), 0),
        phase=phase if phase in _POD_PHASES else "Unknown",
        deleting=meta.get("deletionTimestamp") is not None,
        reason=_text(status, "reason"),
        message=_text(status, "message"),
        node=_text(_mapping(manifest, "spec"), "nodeName"),
        created_at=parse_time(meta.get("creationTimestamp")) or 0.0,
        conditions=_conditions(status),
        containers=tuple(
            _container(one)
            for field in ("initContainerStatuses", "containerStatuses")
            for one in _list(status, field)
            if isinstance(one, Mapping)
        ),
        job_uid=_text(labels, c.LABEL_JOB_UID),
        attempt_uid=_text(_controller(manifest, c.PYTORCHJOB_KIND, "kubeflow.org"), "uid"),
        gone_by=parse_time(meta.get("deletionTimestamp")),
    )


def owner_uid(manifest: Manifest) -> str:
    """UID of the FineTuneJob that controls an object; empty when none does."""
    return _text(_controller(manifest, c.KIND, c.GROUP), "uid")


def owner_name(manifest: Manifest) -> str:
    """Name of the FineTuneJob that controls an object; empty when none does."""
    return _text(_controller(manifest, c.KIND, c.GROUP), "name")


def _number_in_name(manifest: Manifest) -> int:
    """Number of an attempt that has lost its label: its name has it, too. 0 where no FineTuneJob controls it."""
    owner, name = owner_name(manifest), _text(_mapping(manifest, "metadata"), "name")
    digits = name.removeprefix(f"{owner}-")
    return int(digits) if owner and digits != name and digits.isascii() and digits.isdigit() else 0


def _controller(manifest: Manifest, kind: str, group: str) -> Manifest:
    """The reference to the object of a kind that controls this one; empty when none does."""
    for owner in _list(_mapping(manifest, "metadata"), "ownerReferences"):
        if not isinstance(owner, Mapping) or owner.get("kind") != kind or owner.get("controller") is not True:
            continue
        # Whatever the version: an owner of an older one is the same object.
        if _text(owner, "apiVersion").partition("/")[0] == group:
            return owner
    return {}


def parse_time(text: object) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None when it is not one."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _container(status: Manifest) -> ObservedContainer:
    name, state = _text(status, "name"), _mapping(status, "state")
    if "terminated" in state:
        return _terminated(name, _mapping(state, "terminated"))
    kind: Literal["waiting", "running"] = "running" if "running" in state else "waiting"
    found = _mapping(state, kind)
    return ObservedContainer(
        name=name,
        state=kind,
        reason=_text(found, "reason"),
        message=_text(found, "message"),
        started_at=parse_time(found.get("startedAt")),
    )


def _terminated(name: str, found: Manifest) -> ObservedContainer:
    return ObservedContainer(
        name=name,
        state="terminated",
        exit_code=_integer(found.get("exitCode"), None),
        reason=_text(found, "reason"),
        message=_text(found, "message"),
        started_at=parse_time(found.get("startedAt")),
        finished_at=parse_time(found.get("finishedAt")),
    )


def _conditions(status: Manifest) -> dict[str, ObservedCondition]:
    return {
        _text(one, "type"): ObservedCondition(
            status=_text(one, "status", "Unknown"),
            reason=_text(one, "reason"),
            message=_text(one, "message"),
            since=parse_time(one.get("lastTransitionTime")),
        )
        for one in _list(status, "conditions")
        if isinstance(one, Mapping) and _text(one, "type")
    }


def _mapping(source: Manifest, name: str) -> Mapping[str, Any]:
    value = source.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(source: Manifest, name: str) -> list[Any]:
    value = source.get(name)
    return value if isinstance(value, list) else []


def _text(source: Manifest, name: str, default: str = "") -> str:
    value = source.get(name)
    return value if isinstance(value, str) and value else default


@overload
def _integer(value: object, default: int) -> int: ...
@overload
def _integer(value: object, default: None) -> int | None: ...
def _integer(value: object, default: int | None) -> int | None:
    """Label values are text, other fields numbers."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return default
    try:
        return int(value)
    except ValueError:
        return default
