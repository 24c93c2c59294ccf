"""The strategic merge, and what it may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.render import OverlayError, pod_template, restricted_violations
from finetune_operator.render.overlay import merged
from tests.unit.render.cases import make

BASE: dict[str, Any] = {
    "metadata": {"labels": {"finetune.dev/job": "qa", "app": "x"}},
    "spec": {
        "nodeSelector": {"gpu": "a", "zone": "1"},
        "tolerations": [{"key": "a"}],
        "containers": [
            {
                "name": "pytorch",
                "args": ["1"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/b"}],
            }
        ],
    },
}


def container(**changes: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "pytorch", **changes}]}}


CASES: list[tuple[str, dict[str, Any], tuple[Any, ...], Any]] = [
    ("maps by key", {"spec": {"nodeSelector": {"gpu": "b"}}}, ("nodeSelector",), {"gpu": "b", "zone": "1"}),
    ("null deletes", {"spec": {"nodeSelector": {"gpu": None}}}, ("nodeSelector",), {"zone": "1"}),
    ("null of nothing", {"spec": {"affinity": None, "x": {"y": None, "z": 1}}}, ("x",), {"z": 1}),
    ("other lists are replaced", {"spec": {"tolerations": [{"key": "b"}]}}, ("tolerations",), [{"key": "b"}]),
    ("plain lists are replaced", container(args=["2", "3"]), ("containers", 0, "args"), ["2", "3"]),
    (
        "variables by name",
        container(env=[{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]),
        ("containers", 0, "env"),
        [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
    ),
    (
        "a variable's value gives way to a source",
        container(env=[{"name": "A", "value": None, "valueFrom": {"x": 1}}]),
        ("containers", 0, "env", 0),
        {"name": "A", "valueFrom": {"x": 1}},
    ),
    (
        "deleted by name",
        container(env=[{"name": "A", "$patch": "delete"}, {"name": "Z", "$patch": "delete"}]),
        ("containers", 0, "env"),
        [{"name": "B", "value": "2"}],
    ),
    (
        "mounts by path, though they share a name",
        container(volumeMounts=[{"name": "v", "mountPath": "/b", "readOnly": True}]),
        ("containers", 0, "volumeMounts"),
        [{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/b", "readOnly": True}],
    ),
    (
        "a new container comes last",
        {"spec": {"containers": [{"name": "proxy"}]}},
        ("containers", 1),
        {"name": "proxy"},
    ),
    ("a list that is new", {"spec": {"volumes": [{"name": "v"}]}}, ("volumes",), [{"name": "v"}]),
]


@pytest.mark.parametrize(("name", "overlay", "path", "expected"), CASES, ids=[case[0] for case in CASES])
def test_merge(name: str, overlay: dict[str, Any], path: tuple[Any, ...], expected: Any) -> None:
    before = copy.deepcopy((BASE, overlay))
    value: Any = merged(BASE, overlay)["spec"]
    for step in path:
        value = value[step]
    assert value == expected
    assert (BASE, overlay) == before


REFUSED = [
    ({"template": {}}, "podTemplate: unknown field 'template'"),
    ({"spec": []}, "podTemplate.spec: is list, and has to be a map"),
    ({"spec": {"containers": {"a": 1}}}, "containers: is dict, and has to be a list"),
    ({"spec": {"containers": ["a"]}}, "containers[0]: is str, and has to be a map"),
    ({"spec": {"containers": [{"image": "x"}]}}, "containers[0]: has no name"),
    (container(volumeMounts=[{"name": "v"}]), "volumeMounts[0]: has no mountPath"),
    (container(args="x"), "args: is str, and has to be a list"),
    ({"spec": {"$patch": "replace"}}, "spec.$patch: this directive is not supported"),
    ({"spec": {"containers": [{"name": "pytorch", "$patch": "replace"}]}}, "$patch: 'replace' is not supported"),
    ({"metadata": {"labels": {"finetune.dev/job": "other"}}}, "finetune.dev/job is the operator's"),
    ({"metadata": {"labels": {"finetune.dev/job": None}}}, "finetune.dev/job is the operator's"),
    ({"metadata": {"labels": None}}, "finetune.dev/job is the operator's"),
    ({"metadata": {"labels": {"training.kubeflow.org/job-name": "x"}}}, "training.kubeflow.org/job-name is"),
]


@pytest.mark.parametrize(("overlay", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(OverlayError) as caught:
        merged(BASE, overlay)
    assert message in str(caught.value)
    assert str(caught.value).startswith("spec.trainer.podTemplate")


def test_labels_of_ones_own_are_welcome() -> None:
    assert merged(BASE, {"metadata": {"labels": {"team": "a"}}})["metadata"]["labels"]["team"] == "a"


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["name", "a", "env"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["containers", "nodeSelector", "tolerations", "x"]), VALUES, max_size=4))
@settings(deadline=None)
def test_any_overlay_is_merged_or_explained(spec: dict[str, Any]) -> None:
    before = copy.deepcopy(BASE)
    try:
        result = merged(BASE, {"spec": spec})
    except OverlayError:
        result = None
    assert before == BASE
    if result is not None:
        assert merged(result, {}) == result


def unsafe(**changes: Any) -> dict[str, Any]:
    return {"securityContext": changes}


VIOLATIONS = [
    ({"spec": {"hostNetwork": True}}, "spec.hostNetwork"),
    ({"spec": {"hostPID": True}}, "spec.hostPID"),
    ({"spec": {"hostIPC": True}}, "spec.hostIPC"),
    ({"spec": {"volumes": [{"name": "h", "hostPath": {"path": "/"}}]}}, "'h' is of kind hostPath"),
    ({"spec": {"volumes": [{"name": "n", "nfs": {}}]}}, "'n' is of kind nfs"),
    ({"spec": unsafe(runAsNonRoot=False)}, "runAsNonRoot"),
    ({"spec": unsafe(runAsNonRoot=None)}, "does not set runAsNonRoot"),
    ({"spec": unsafe(runAsUser=0)}, "runAsUser is 0"),
    ({"spec": unsafe(seccompProfile={"type": "Unconfined"})}, "seccompProfile is Unconfined"),
    ({"spec": unsafe(seccompProfile=None)}, "has no seccompProfile"),
    ({"spec": unsafe(sysctls=[{"name": "kernel.msgmax"}])}, "kernel.msgmax"),
    ({"spec": unsafe(seLinuxOptions={"type": "spc_t"})}, "seLinuxOptions"),
    ({"spec": unsafe(windowsOptions={"hostProcess": True})}, "hostProcess"),
    (container(**unsafe(privileged=True)), "is privileged"),
    (container(**unsafe(allowPrivilegeEscalation=True)), "allowPrivilegeEscalation"),
    (container(**unsafe(capabilities={"add": ["SYS_ADMIN"]})), "adds capabilities SYS_ADMIN"),
    (container(**unsafe(capabilities={"drop": ["NET_RAW"]})), "does not drop ALL"),
    (container(**unsafe(capabilities=None)), "does not drop ALL"),
    (container(**unsafe(runAsUser=0)), "runAsUser is 0"),
    (container(**unsafe(runAsNonRoot=False)), "runAsNonRoot is not true"),
    (container(**unsafe(procMount="Unmasked")), "procMount"),
    (container(**unsafe(appArmorProfile={"type": "Unconfined"})), "appArmorProfile is Unconfined"),
    (container(**unsafe(seccompProfile={"type": "Unconfined"})), "seccompProfile is Unconfined"),
    (container(ports=[{"containerPort": 1, "hostPort": 1}]), "hostPort"),
    ({"spec": {"initContainers": [{"name": "i"}]}}, "spec.initContainers 'i' does not drop ALL"),
    (
        {"metadata": {"annotations": {"container.apparmor.security.beta.kubernetes.io/pytorch": "unconfined"}}},
        "apparmor",
    ),
]


@pytest.mark.parametrize(("overlay", "violation"), VIOLATIONS, ids=[text for _, text in VIOLATIONS])
def test_what_leaves_the_restricted_level(overlay: dict[str, Any], violation: str) -> None:
    found = restricted_violations(pod_template(make(trainer={"podTemplate": overlay})))
    assert any(violation in one for one in found), found


def test_a_safe_sidecar_is_fine() -> None:
    safe = {
        "name": "proxy",
        "image": "proxy",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
        },
    }
    template = pod_template(make(trainer={"podTemplate": {"spec": {"containers": [safe]}}}))
    assert restricted_violations(template) == []
