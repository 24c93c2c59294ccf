"""Whether a job may run at all: its spec against the API's rules and what the administrator allows. Pure: no I/O."""

from __future__ import annotations

from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.constants import API_VERSION, KIND, Reason
from finetune_operator.errors import InvalidManifest
from finetune_operator.observed import ObservedJob
from finetune_operator.render import (
    SYSTEM_PRIORITY,
    Attempt,
    OverlayError,
    pod_template,
    restricted_violations,
    rights_taken,
)
from finetune_operator.settings import Permissions, TrainerDefaults
from finetune_operator.shape import unplanned
from finetune_operator.state import Fact
from finetune_trainer.contract.addresses import endpoint_problem


def accept(
    job: ObservedJob, permissions: Permissions, defaults: TrainerDefaults
) -> tuple[Fact, FineTuneJobSpec | None]:
    """The condition Accepted, and the spec when it holds."""
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": job.ref.name, "namespace": job.ref.namespace},
        "spec": job.spec,
    }
    try:
        spec = parse_manifest(manifest).spec
    except InvalidManifest as error:
        return Fact("False", Reason.INVALID_SPEC, "\n".join(error.problems)), None
    forbidden = _not_permitted(spec, permissions, defaults)
    if forbidden:
        return Fact("False", Reason.NOT_PERMITTED, "\n".join(forbidden)), None
    if spec.trainer.pod_template:
        refusal = _overlay_problem(job, spec, permissions, defaults)
        if refusal is not None:
            return refusal, None
    return Fact("True", Reason.ACCEPTED), spec


def _not_permitted(spec: FineTuneJobSpec, permissions: Permissions, defaults: TrainerDefaults) -> list[str]:
    problems = []
    if spec.model.trust_remote_code and not permissions.remote_code:
        problems.append(
            "spec.model.trustRemoteCode: this cluster does not run code that comes with a model; remove it, or ask the "
            "administrator (permissions.remoteCode)"
        )
    if not permissions.local_files:
        problems += [
            f"{field}: {uri} is a file of the machine that `finetune run` works on, which no pod sees; use s3://, "
            "hf:// or pvc://"
            for field, uri in _uris(spec)
            if uri.startswith("file:")
        ]
    endpoint = spec.output.s3.endpoint
    if endpoint is not None and not defaults.s3_link_local and (problem := endpoint_problem(endpoint)):
        problems.append(f"spec.output.s3.endpoint: {endpoint} {problem}")
    if (spec.scheduling.priority_class_name or "").startswith(SYSTEM_PRIORITY):
        problems.append(
            f"spec.scheduling.priorityClassName: {spec.scheduling.priority_class_name} is for the cluster's own pods; "
            "name another class"
        )
    return problems


def _uris(spec: FineTuneJobSpec) -> list[tuple[str, str]]:
    found = [("spec.model.uri", spec.model.uri)]
    own = [(f"spec.adapters[{i}].dataset", one.dataset) for i, one in enumerate(spec.adapters or ())]
    for field, data in (("spec.dataset", spec.dataset), *own):
        if data is None:
            continue
        found.append((f"{field}.uri", data.uri or ""))
        found += [(f"{field}.sources[{i}].uri", source.uri) for i, source in enumerate(data.sources or ())]
        found.append((f"{field}.validation.uri", (data.validation.uri if data.validation else None) or ""))
    return found


def _overlay_problem(
    job: ObservedJob, spec: FineTuneJobSpec, permissions: Permissions, defaults: TrainerDefaults
) -> Fact | None:
    """What is wrong with `trainer.podTemplate`: judged by the pod that comes out, not by the overlay's words."""
    attempt = Attempt(job.ref, job.uid, 1, spec, unplanned(spec), defaults)
    try:
        template = pod_template(attempt)
    except OverlayError as error:
        return Fact("False", Reason.INVALID_SPEC, str(error))
    if permissions.privileged_pod_template:
        return None
    problems = []
    if violations := restricted_violations(template):
        problems.append(
            "spec.trainer.podTemplate: the pod would leave the restricted Pod Security level: "
            f"{'; '.join(violations)}. Remove it, or ask the administrator (permissions.privilegedPodTemplate)"
        )
    if taken := rights_taken(template, permissions.service_accounts):
        problems.append(
            f"spec.trainer.podTemplate: {'; '.join(taken)}. Remove it, or ask the administrator "
            "(permissions.serviceAccounts, permissions.privilegedPodTemplate)"
        )
    return Fact("False", Reason.NOT_PERMITTED, "\n".join(problems)) if problems else None
