"""Which pods the one node takes."""

from __future__ import annotations

from typing import Any

import pytest

from demo_cluster.scheduling import NodeFacts, is_ours, obstacles, requests, thousandths

NODE = NodeFacts(
    "here",
    {"cpu": "4", "memory": "8Gi", "pods": "3", "nvidia.com/gpu": "2"},
    labels={"zone": "a", "size": "7"},
    taints=({"key": "gpu", "value": "yes", "effect": "NoSchedule"},),
)
TOLERATION = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}


def pod(*, limits: dict[str, str] | None = None, node: str = "", phase: str = "Pending", **spec: Any) -> dict[str, Any]:
    """A PyTorchJob's pod that the node takes, with this laid over its spec."""
    owner = {"kind": "PyTorchJob", "uid": "u"}
    base = {
        "containers": [{"name": "pytorch", "resources": {"limits": limits or {"cpu": "1", "memory": "1Gi"}}}],
        "tolerations": [TOLERATION],
        **({"nodeName": node} if node else {}),
    }
    return {"metadata": {"name": "p", "ownerReferences": [owner]}, "spec": base | spec, "status": {"phase": phase}}


def required(*expressions: dict[str, Any]) -> dict[str, Any]:
    term = {"matchExpressions": list(expressions)}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def test_a_pod_that_fits_has_no_obstacle() -> None:
    assert obstacles(pod(), NODE, []) == []


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"limits": {"cpu": "4001m"}}, "Insufficient cpu"),
        ({"limits": {"memory": "8193Mi"}}, "Insufficient memory"),
        ({"limits": {"nvidia.com/gpu": "3"}}, "Insufficient nvidia.com/gpu"),
        ({"limits": {"amd.com/gpu": "1"}}, "Insufficient amd.com/gpu"),
        ({"nodeSelector": {"zone": "b"}}, "node(s) didn't match Pod's node affinity/selector"),
        ({"tolerations": []}, "untolerated taint {gpu: yes}"),
        ({"tolerations": [{**TOLERATION, "value": "no"}]}, "untolerated taint {gpu: yes}"),
        ({"tolerations": [{**TOLERATION, "effect": "NoExecute"}]}, "untolerated taint {gpu: yes}"),
    ],
)
def test_an_obstacle_is_named_as_kube_scheduler_does(changes: dict[str, Any], obstacle: str) -> None:
    assert obstacles(pod(**changes), NODE, []) == [obstacle]


@pytest.mark.parametrize(
    ("expression", "matches"),
    [
        ({"key": "zone", "operator": "In", "values": ["a", "b"]}, True),
        ({"key": "zone", "operator": "In", "values": ["b"]}, False),
        ({"key": "gone", "operator": "In", "values": ["b"]}, False),
        ({"key": "zone", "operator": "NotIn", "values": ["a"]}, False),
        ({"key": "gone", "operator": "NotIn", "values": ["a"]}, True),
        ({"key": "zone", "operator": "Exists"}, True),
        ({"key": "gone", "operator": "Exists"}, False),
        ({"key": "gone", "operator": "DoesNotExist"}, True),
        ({"key": "zone", "operator": "DoesNotExist"}, False),
        ({"key": "size", "operator": "Gt", "values": ["6"]}, True),
        ({"key": "size", "operator": "Gt", "values": ["7"]}, False),
        ({"key": "size", "operator": "Lt", "values": ["7"]}, False),
        ({"key": "size", "operator": "Lt", "values": ["8"]}, True),
    ],
)
def test_required_node_affinity(expression: dict[str, Any], matches: bool) -> None:
    assert (obstacles(pod(affinity=required(expression)), NODE, []) == []) is matches


@pytest.mark.parametrize(
    "toleration", [{"operator": "Exists"}, {"key": "gpu", "operator": "Exists"}, {"key": "gpu", "value": "yes"}]
)
def test_ways_to_tolerate(toleration: dict[str, Any]) -> None:
    assert obstacles(pod(tolerations=[toleration]), NODE, []) == []


def test_what_runs_takes_its_share_and_what_has_ended_does_not() -> None:
    three = {"cpu": "3", "memory": "1Gi"}
    running = pod(limits=three, node="here", phase="Running")
    assert obstacles(pod(limits={"cpu": "2"}), NODE, [running]) == ["Insufficient cpu"]
    assert obstacles(pod(limits={"cpu": "1"}), NODE, [running]) == []
    ended = pod(limits=three, node="here", phase="Failed")
    assert obstacles(pod(limits={"cpu": "2"}), NODE, [ended]) == []
    assert obstacles(pod(), NODE, [running, ended, running, running]) == ["Insufficient cpu", "Insufficient pods"]


def test_init_containers_count_by_the_largest() -> None:
    inits = [{"name": name, "resources": {"requests": {"cpu": cpu}}} for name, cpu in (("a", "3"), ("b", "2"))]
    two = {"name": "side", "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "2"}}}
    found = pod(initContainers=inits)
    assert requests(found)["cpu"] == 3000
    found["spec"]["containers"].append(two)
    assert requests(found) == {"cpu": 3000, "memory": 2**30 * 1000, "pods": 1000}
    found["spec"]["containers"].append({**two, "resources": {"requests": {"cpu": "2"}}})
    assert requests(found)["cpu"] == 3500


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 500), ("2", 2000), ("0.1", 100), ("1Ki", 1_024_000), ("1k", 1_000_000), ("1e3", 10**6)]
)
def test_quantities(text: str, value: int) -> None:
    assert thousandths(text) == value


@pytest.mark.parametrize(
    ("found", "ours"),
    [
        (pod(), True),
        (pod(node="there"), False),
        (pod(phase="Failed"), False),
        (pod(schedulerName="volcano"), False),
        (pod(schedulingGates=[{"name": "kueue.x-k8s.io/admission"}]), False),
        ({**pod(), "metadata": {"name": "p"}}, False),
        ({**pod(), "metadata": {**pod()["metadata"], "deletionTimestamp": "now"}}, False),
    ],
)
def test_only_pods_of_pytorchjobs_that_nobody_holds_are_scheduled(found: dict[str, Any], ours: bool) -> None:
    assert is_ours(found) is ours
