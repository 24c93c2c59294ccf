"""A release that works in some namespaces and has no rights on jobs in the others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from controlplane import Binaries
from tests.apiserver.kubelet import SUCCESS, Kubelet
from tests.chart.helm import NAMESPACE, Helm
from tests.chart.installed import ACCOUNT, Installed, cluster

pytestmark = pytest.mark.apiserver


@pytest.fixture(scope="module")
def world(helm: Helm, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    with cluster(helm, binaries, tmp_path_factory.mktemp("namespaced"), "default", "team-b") as made:
        for name in ("team-b", "elsewhere"):
            made.post("/api/v1/namespaces", {"metadata": {"name": name}})
        with Kubelet(made.plane.api, lambda job, number: SUCCESS, ("default", "team-b")):
            yield made


def test_jobs_run_where_it_works_and_nowhere_else(world: Installed) -> None:
    world.deploy()
    with world.deployed_operator():
        world.create("not-ours", "elsewhere")
        for namespace in ("default", "team-b"):
            world.create("ours", namespace)
            world.reaches("ours", "Succeeded", namespace)
        assert world.status("not-ours", "elsewhere") == {}
        kubeconfig = world.plane.service_account_kubeconfig(NAMESPACE, "finetune-operator")
        program = [sys.executable, "-m", "finetune_operator.kubernetes.installation", world.probes]
        environment = {**world.variables(), "KUBECONFIG": str(kubeconfig), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert world.may(ACCOUNT, "list", "finetunejobs.finetune.dev", "-n", "team-b")
    for resource in ("finetunejobs.finetune.dev", "pods", "configmaps", "secrets"):
        assert not world.may(ACCOUNT, "list", resource, "-n", "elsewhere"), resource
        assert not world.may(ACCOUNT, "list", resource, "--all-namespaces"), resource
    assert ("", "secrets", "patch") in world.asked_for()
