"""The generated CRD on a real API server: it keeps the cost limits, and refuses and accepts as Python does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from controlplane import ApiError, Binaries, ControlPlane
from finetune_operator.api import crd
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from tests import waiting
from tests.unit.api.accepted_cases import ACCEPTED
from tests.unit.api.change_cases import ALLOWED_CHANGES, CHANGES, IMMUTABLE_WORDS
from tests.unit.api.field_cases import BROKEN_FIELDS, UNKNOWN_FIELDS
from tests.unit.api.manifests import MINIMAL, Accepted, Refused, manifest, merged
from tests.unit.api.refused_cases import BROKEN_RULES

pytestmark = pytest.mark.apiserver

JOBS = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
DRY_RUN = "?fieldValidation=Strict&dryRun=All"
MERGE_PATCH = "application/merge-patch+json"


@pytest.fixture(scope="module")
def plane(apiserver_binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    path = tmp_path_factory.mktemp("crd") / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=apiserver_binaries, crds=[path]) as running:
        eventually(lambda: running.api.missing(JOBS) == "")
        yield running


eventually = partial(waiting.eventually, seconds=30.0)


def create(plane: ControlPlane, data: dict[str, Any], query: str = DRY_RUN) -> dict[str, Any]:
    created: dict[str, Any] = plane.api.request("POST", JOBS + query, data)
    return created


def refusal(plane: ControlPlane, method: str, path: str, body: dict[str, Any], content_type: str) -> str:
    with pytest.raises(ApiError) as caught:
        plane.api.request(method, path, body, content_type)
    assert caught.value.status in (400, 422), caught.value
    return str(caught.value)


@pytest.fixture(scope="module")
def existing(plane: ControlPlane) -> Iterator[str]:
    """The path of a job that was created and stays."""
    create(plane, manifest(name="existing"), "")
    yield f"{JOBS}/existing"
    plane.api.request("DELETE", f"{JOBS}/existing")


def test_the_crd_is_established_without_a_complaint(plane: ControlPlane) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune.dev"
    conditions = {c["type"]: c for c in plane.api.request("GET", path)["status"]["conditions"]}
    assert conditions["Established"]["status"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("case", [*BROKEN_RULES, *BROKEN_FIELDS], ids=lambda case: case.id)
def test_broken_manifests_are_refused_with_field_and_words(plane: ControlPlane, case: Refused) -> None:
    message = refusal(plane, "POST", JOBS + DRY_RUN, case.manifest, "application/json")
    assert f"{case.field}:" in message
    assert case.server_words in message


@pytest.mark.parametrize("case", UNKNOWN_FIELDS, ids=lambda case: case.id)
def test_unknown_fields_are_refused_under_strict_validation(plane: ControlPlane, case: Refused) -> None:
    message = refusal(plane, "POST", JOBS + DRY_RUN, case.manifest, "application/json")
    assert f'unknown field "{case.field}"' in message


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.id)
def test_valid_manifests_are_accepted_and_get_pythons_defaults(plane: ControlPlane, case: Accepted) -> None:
    spec = create(plane, case.manifest)["spec"]
    stored = FineTuneJobSpec.model_validate(spec)
    assert stored == FineTuneJobSpec.model_validate(case.manifest["spec"] | without_nulls(case.manifest["spec"]))
    without_empty = {name: value for name, value in spec.items() if value is not None}
    assert as_numbers(without_empty) == as_numbers(stored.to_wire()), "the server filled every default"


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        name: without_nulls(child) if isinstance(child, dict) and name != "trainer" else child
        for name, child in value.items()
        if child is not None
    }


def as_numbers(value: Any) -> Any:
    """JSON has one kind of number, and a quantity may be one."""
    if isinstance(value, dict):
        return {name: str(child) if name == "cpu" else as_numbers(child) for name, child in value.items()}
    if isinstance(value, list):
        return [as_numbers(child) for child in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.mark.parametrize(("change", "field"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_a_change_after_creation_is_refused(
    plane: ControlPlane, existing: str, change: dict[str, Any], field: str
) -> None:
    message = refusal(plane, "PATCH", existing + DRY_RUN, {"spec": change}, MERGE_PATCH)
    assert f"{field}: Invalid value: {IMMUTABLE_WORDS}" in message


def test_an_optional_part_cannot_be_taken_away_either(plane: ControlPlane) -> None:
    create(plane, manifest(name="with-lora", lora={"rank": 8}, layers={"last": 2}), "")
    try:
        message = refusal(plane, "PATCH", f"{JOBS}/with-lora{DRY_RUN}", {"spec": {"lora": None}}, MERGE_PATCH)
        assert f"spec.lora: Invalid value: {IMMUTABLE_WORDS}" in message
    finally:
        plane.api.request("DELETE", f"{JOBS}/with-lora")


def test_nested_parts_of_a_pod_template_cannot_change(plane: ControlPlane) -> None:
    template = {"spec": {"containers": [{"name": "pytorch", "env": [{"name": "A", "value": "1"}]}]}}
    create(plane, manifest(name="with-template", trainer={"podTemplate": template}), "")
    changed = {"spec": {"containers": [{"name": "pytorch", "env": [{"name": "A", "value": "2"}]}]}}
    try:
        body = {"spec": {"trainer": {"podTemplate": changed}}}
        message = refusal(plane, "PATCH", f"{JOBS}/with-template{DRY_RUN}", body, MERGE_PATCH)
        assert f"spec.trainer: Invalid value: {IMMUTABLE_WORDS}" in message
    finally:
        plane.api.request("DELETE", f"{JOBS}/with-template")


@pytest.mark.parametrize("change", ALLOWED_CHANGES, ids=str)
def test_run_policy_may_change(plane: ControlPlane, existing: str, change: dict[str, Any]) -> None:
    patched = plane.api.request("PATCH", existing + DRY_RUN, {"spec": change}, MERGE_PATCH)
    assert merged(patched["spec"], change) == patched["spec"]


def test_status_is_a_subresource_of_its_own_and_holds_all_that_we_write(plane: ControlPlane, existing: str) -> None:
    time_text = "2026-01-02T03:04:05Z"
    condition = {"type": "Running", "status": "True", "reason": "Training", "lastTransitionTime": time_text}
    status = {
        "phase": "Running",
        "observedGeneration": 1,
        "conditions": [condition | {"observedGeneration": 1, "message": ""}],
        "progress": {"percent": 42, "loss": 1.5, "tokensPerSecond": 1234.5, "updatedAt": time_text},
        "result": {"uri": "s3://b/x", "evaluation": {"base": {"perplexity": 9.5}, "tuned": {"perplexity": 4}}},
    }
    unchanged = plane.api.request("PATCH", existing + DRY_RUN, {"status": status}, MERGE_PATCH)
    assert unchanged.get("status") is None
    path = f"{existing}/status{DRY_RUN}"
    patched = plane.api.request("PATCH", path, {"status": status, "spec": {"method": "full"}}, MERGE_PATCH)
    assert patched["status"] == status
    assert patched["spec"]["method"] == "lora"


def kubectl(plane: ControlPlane, *arguments: str, text: str = "") -> str:
    program = shutil.which("kubectl") or str(Path(sys.executable).parent / "kubectl")
    done = subprocess.run(
        [program, "--kubeconfig", str(plane.kubeconfig), *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def test_kubectl_explains_lists_and_selects(plane: ControlPlane, existing: str) -> None:
    explained = kubectl(plane, "explain", "finetunejob.spec.layers")
    assert "Exactly these decoder blocks, counted from 0; in any order." in explained
    assert "unfreeze" in explained
    status = {"status": {"phase": "Running", "progress": {"percent": 42, "loss": 1.5}}}
    plane.api.request("PATCH", f"{existing}/status", status, MERGE_PATCH)
    header, row = kubectl(plane, "get", "ftj").splitlines()
    assert header.split() == ["NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "GPUS", "AGE"]
    assert row.split()[:-1] == ["existing", "Running", "lora", "hf://org/model", "42", "1.5", "1"]
    wide = kubectl(plane, "get", "finetune", "-o", "wide").splitlines()[0]
    assert wide.split()[-4:] == ["ATTEMPT", "TOKENS/S", "ETA", "RESULT"]
    selected = kubectl(plane, "get", "ftj", "-o", "name", "--field-selector", "status.phase=Running,spec.method=lora")
    assert selected.strip() == "finetunejob.finetune.dev/existing"
    assert "No resources found" in kubectl(plane, "get", "ftj", "--field-selector", "spec.method=full")


def test_kubectl_apply_shows_the_words(plane: ControlPlane) -> None:
    data = json.dumps(manifest(method="full", lora={"rank": 8}))
    output = kubectl(plane, "apply", "--dry-run=server", "-f", "-", text=data)
    assert "spec.lora: Invalid value: lora is for method lora and qlora; remove it, or change method full" in output
    valid = kubectl(plane, "apply", "--dry-run=server", "-f", "-", text=json.dumps(MINIMAL))
    assert "finetunejob.finetune.dev/medical-qa created (server dry run)" in valid
