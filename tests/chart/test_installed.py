"""Install, run a job, upgrade with the job running, uninstall: on a real API server beside the real training operator.

At the end the API server's audit log is read: the chart's roles are what the operator needs, no less and no more.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from lightkube import AsyncClient, Client, KubeConfig

from controlplane import Binaries
from finetune_operator.errors import ClusterError, FinetuneError
from finetune_operator.kubernetes.certificate_secret import CertificateSecret
from finetune_operator.kubernetes.installation import check
from tests.apiserver.kubelet import SUCCESS, Kubelet, Outcome
from tests.apiserver.world import collection
from tests.chart.helm import NAMESPACE, RELEASE, Helm
from tests.chart.installed import ACCOUNT, CRD, SECRET, SERVER, Installed, cluster, previous_chart
from tests.waiting import eventually

pytestmark = pytest.mark.apiserver

SECRET_NAME = "secrets/finetune-operator-progress-tls"
LONG = Outcome(seconds=8)


@pytest.fixture(scope="module")
def world(helm: Helm, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    with cluster(helm, binaries, tmp_path_factory.mktemp("installed")) as made:
        with Kubelet(made.plane.api, lambda job, number: LONG if job == "upgraded" else SUCCESS):
            yield made
        made.nothing_was_granted_in_vain()


def test_install_a_job_upgrade_and_the_job_goes_on(world: Installed) -> None:
    said = world.deploy(previous_chart(world.folder))
    assert "STATUS: deployed" in said and "helm test" in said
    with world.deployed_operator() as operator:
        job = world.create("upgraded", runPolicy={"ttlSecondsAfterFinished": 3600})
        assert "ttlSecondsAfterFinished" not in job["spec"]["runPolicy"], "the CRD before does not know it"
        world.reaches("upgraded", "Running")
        certificate = world.handshake(world.authority("upgraded-1"))
        assert operator.exit_code is None
        held = world.api.request("GET", SECRET)["data"]
        before = world.api.request("GET", f"{collection('pytorchjobs')}/upgraded-1")["metadata"]["uid"]
        assert "STATUS: deployed" in world.deploy()
        assert "FINETUNE_LOG_FORMAT" in world.variables()
    # As the new ReplicaSet's pod takes over.
    with world.deployed_operator():
        assert world.api.request("GET", SECRET)["data"] == held, "an upgrade takes nobody's certificate away"
        assert world.handshake(world.authority("upgraded-1")) == certificate
        final = world.reaches("upgraded", "Succeeded")
        assert final["attempts"]["current"] == 1
        assert world.api.request("GET", f"{collection('pytorchjobs')}/upgraded-1")["metadata"]["uid"] == before
        job = world.create("after", runPolicy={"ttlSecondsAfterFinished": 3600})
        assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] == 3600, "Helm upgraded the CRD"
        world.reaches("after", "Succeeded")
        slices = world.api.request("GET", f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices")["items"]
        led = [one for one in slices if one["metadata"]["labels"]["kubernetes.io/service-name"] == SERVER.split(".")[0]]
        assert [one["endpoints"][0]["addresses"] for one in led] == [["10.1.2.3"]]
        assert "finetune_progress_certificate_expiry_timestamp_seconds 1." in world.read("/metrics")


def test_the_test_pod_finds_it_well_and_says_what_is_not(world: Installed) -> None:
    kubeconfig = world.plane.service_account_kubeconfig(NAMESPACE, "finetune-operator")
    with world.deployed_operator():
        program = [sys.executable, "-m", "finetune_operator.kubernetes.installation", world.probes]
        environment = {**world.variables(), "KUBECONFIG": str(kubeconfig), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        nobody = world.plane.service_account_kubeconfig("default", "default")
        with Client(config=KubeConfig.from_file(nobody)) as client:
            with pytest.raises(FinetuneError, match="FineTuneJobs cannot be listed"):
                check(world.probes, client, ())
        probes = world.probes
    with Client(config=KubeConfig.from_file(kubeconfig)) as client:
        with pytest.raises(FinetuneError, match=r"does not answer as it should: .*healthz"):
            check(probes, client, (), patience=0)


async def test_replicas_share_a_certificate_and_renew_it(world: Installed) -> None:
    kubeconfig = world.plane.service_account_kubeconfig(NAMESPACE, "finetune-operator")
    client = AsyncClient(config=KubeConfig.from_file(kubeconfig))
    now = [time.time()]
    expiries: list[float] = []

    def replica(name: str = "finetune-operator-progress-tls") -> CertificateSecret:
        return CertificateSecret(
            client, namespace=NAMESPACE, name=name, hosts=(SERVER,), clock=lambda: now[0], on_expiry=expiries.append
        )

    world.merge(SECRET, {"data": None})
    replicas = [replica() for _ in range(3)]
    first = await asyncio.gather(*(one() for one in replicas))
    assert len(set(first)) == 1, "whoever was slower took what was there"
    assert await replicas[0]() == first[0]
    now[0] += 61 * 86_400
    second = await asyncio.gather(*(one() for one in replicas))
    assert len(set(second)) == 1 and second[0].chain != first[0].chain
    assert second[0].ca == first[0].ca, "pods that know the authority need not be told"
    assert expiries[-1] - expiries[0] == pytest.approx(61 * 86_400, abs=60)
    world.merge(SECRET, {"data": {"tls.key": "bm9uc2Vuc2U="}})
    repaired = await replicas[1]()
    assert repaired != second[0] and repaired.ca == first[0].ca
    assert await replicas[2]() == repaired
    await client.close()
    assert world.may(ACCOUNT, "get", SECRET_NAME, "-n", NAMESPACE)
    for verb in ("get", "patch", "delete", "list", "create"):
        assert not world.may(ACCOUNT, verb, "secrets", "-n", NAMESPACE), verb
    client = AsyncClient(config=KubeConfig.from_file(world.plane.kubeconfig))
    with pytest.raises(ClusterError, match="The chart makes this Secret"):
        await replica("another")()
    await client.close()


def test_users_of_a_namespace_get_their_share(world: Installed) -> None:
    rights = {
        "view": ["get", "list", "watch"],
        "edit": ["create", "update", "patch", "delete"],
        "admin": ["deletecollection"],
    }
    allowed: list[str] = []
    for role, verbs in rights.items():
        user, allowed = f"{role}er", [*allowed, *verbs]
        world.kubectl("create", "rolebinding", f"{role}-jobs", f"--clusterrole={role}", f"--user={user}")
        eventually(lambda user=user, verb=verbs[0]: world.may(user, verb, "finetunejobs.finetune.dev"), what=role)
        for verb in [verb for verbs in rights.values() for verb in verbs]:
            assert world.may(user, verb, "finetunejobs.finetune.dev") is (verb in allowed), (role, verb)
        may_write_status = world.may(user, "patch", "finetunejobs.finetune.dev", "--subresource=status")
        assert not may_write_status, "the status is the operator's"
        assert not world.may(user, "get", "finetunejobs.finetune.dev", "-n", "kube-system")


def test_uninstalling_keeps_jobs_unless_told_otherwise(world: Installed) -> None:
    jobs = eventually(lambda: world.names_of_jobs())
    assert "kept due to the resource policy" in world.helm("uninstall", RELEASE)
    assert world.names_of_jobs() == jobs and world.names("pytorchjobs") == ["after-1", "upgraded-1"]
    deployment = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/finetune-operator"
    assert not world.has(deployment) and not world.has(SECRET)
    assert "STATUS: deployed" in world.deploy(), "the next release takes the CRD over"
    with world.deployed_operator():
        world.create("later")
        world.reaches("later", "Succeeded")
    # Kubernetes' garbage collector looks for new kinds every 30 s. What belongs to objects of a kind that is gone
    # before it has seen it stays for ever.
    world.kubectl("delete", "finetunejob", "later")
    eventually(
        lambda: "later-1" not in world.names("pytorchjobs"), seconds=120, what="the collector knows FineTuneJobs"
    )
    assert "EVERY FineTuneJob" in world.deploy(crds={"keep": False})
    world.helm("uninstall", RELEASE)
    eventually(lambda: not world.has(CRD), what="the CRD is gone")
    eventually(lambda: not world.names("pytorchjobs"), what="and all that jobs left")
