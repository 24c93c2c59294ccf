"""Every object that the chart gives, taken by a real API server that knows all kinds, at the restricted level."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from controlplane import Binaries, ControlPlane
from tests.apiserver.world import World
from tests.chart import other_crds
from tests.chart.helm import NAMESPACE, VALUES_FILES, Helm, Manifest

pytestmark = pytest.mark.apiserver

EVERYTHING: dict[str, Any] = {
    "replicas": 2,
    "tls": {"certManager": {"enabled": True}},
    "networkPolicy": {"enabled": True, "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
    "metrics": {name: {"enabled": True} for name in ("serviceMonitor", "prometheusRule", "dashboard")},
    "watchNamespaces": ["team-a", "team-b"],
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 30}],
    "affinity": {"podAntiAffinity": {}},
}


@pytest.fixture(scope="module")
def world(apiserver_binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("dry-run")
    try:
        crds = other_crds.files(folder)
    except other_crds.NotHere as missing:
        pytest.skip(str(missing))
    with ControlPlane(binaries=apiserver_binaries, crds=crds) as plane:
        made = World(plane, folder)
        for name in (NAMESPACE, "team-a", "team-b"):
            level = {"pod-security.kubernetes.io/enforce": "restricted"}
            made.post("/api/v1/namespaces", {"metadata": {"name": name, "labels": level}})
        yield made


def applied(world: World, objects: list[Manifest]) -> list[str]:
    """The lines of a server-side dry run, which refuses what it does not know."""
    text = yaml.safe_dump_all(objects)
    arguments = ("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-")
    return world.kubectl(*arguments, stdin=text).splitlines()


@pytest.mark.parametrize(
    "values", [None, *VALUES_FILES, EVERYTHING], ids=lambda one: getattr(one, "stem", "everything" if one else "none")
)
def test_the_api_server_takes_every_object(helm: Helm, world: World, values: Any) -> None:
    objects = helm.template(values).objects
    lines = applied(world, objects)
    assert len([line for line in lines if line.endswith("serverside-applied (server dry run)")]) == len(objects), lines
    assert not [line for line in lines if "arning" in line], lines


@pytest.mark.parametrize("release", ["team.models", "2024"])
def test_it_takes_them_of_releases_with_odd_names(helm: Helm, world: World, release: str) -> None:
    objects = helm.template({**EVERYTHING, "dashboard": {"enabled": True}}, release=release).objects
    lines = applied(world, objects)
    assert len([line for line in lines if line.endswith("serverside-applied (server dry run)")]) == len(objects), lines


@pytest.mark.parametrize("values", [None, EVERYTHING], ids=["none", "everything"])
def test_its_pods_are_let_into_a_restricted_namespace(helm: Helm, world: World, values: Any) -> None:
    template = helm.template(values).one("Deployment")["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": "operator", "namespace": NAMESPACE},
    }
    # No controller makes accounts or priority classes here.
    spec = {name: value for name, value in template["spec"].items() if name != "priorityClassName"}
    assert applied(world, [{**pod, "spec": spec}]) == ["pod/operator serverside-applied (server dry run)"]
    del spec["containers"][0]["securityContext"]
    refused = world.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump({**pod, "spec": spec}), code=1)
    assert "violates PodSecurity" in refused


def test_strict_means_strict(helm: Helm, world: World) -> None:
    deployment = helm.template().one("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    arguments = ("apply", "--server-side", "--dry-run=server", "-f", "-")
    assert "readinesProbe" in world.kubectl(*arguments, stdin=yaml.safe_dump(deployment), code=1)
