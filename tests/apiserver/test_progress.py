"""Who may report progress, by tokens of a real API server; and what a flood and silent callers do to the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane import Binaries, ControlPlane
from demo_cluster.operator_process import OperatorProcess
from finetune_operator import constants as c
from finetune_operator.api import crd
from finetune_operator.constants import PROGRESS_AUDIENCE, Reason
from tests.apiserver.faults import Fault
from tests.apiserver.kubelet import NEVER_ENDS, SUCCESS, Kubelet, Outcome
from tests.apiserver.world import SYSTEM, World, free_port, jobs
from tests.waiting import eventually

pytestmark = pytest.mark.apiserver

FLOOD = 3000
SILENT = 400
SERVICE = "finetune-progress"
SLICE = f"/apis/discovery.k8s.io/v1/namespaces/{SYSTEM}/endpointslices/{SERVICE}-ipv4"


class Reporting(World):
    """With pods that report."""

    url = ""

    def running_pod(self, job: str, **spec: Any) -> dict[str, Any]:
        """The master of a job that runs."""
        self.create(job, **spec)
        self.reaches(job, "Running")
        found: dict[str, Any] = self.api.request("GET", f"/api/v1/namespaces/default/pods/{job}-1-master-0")
        return found

    def token(self, pod: dict[str, Any] | None, audience: str = PROGRESS_AUDIENCE) -> str:
        """As the kubelet projects it into a pod; of no pod at all without one."""
        spec: dict[str, Any] = {"audiences": [audience]}
        if pod is not None:
            meta = pod["metadata"]
            bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
            spec["boundObjectRef"] = bound
        path = "/api/v1/namespaces/default/serviceaccounts/default/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        token: str = self.api.request("POST", path, body)["status"]["token"]
        return token

    def report(self, token: str, percent: int) -> int:
        """The answer's status."""
        body = {"trainerStatus": {"progressPercentage": percent, "metrics": [{"name": "loss", "value": "1.5"}]}}
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Authorization": f"Bearer {token}"}, method="POST"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def percent(self, job: str) -> int | None:
        """What the status shows."""
        found: int | None = (self.status(job).get("progress") or {}).get("percent")
        return found


@pytest.fixture(scope="module")
def plane(binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    folder = tmp_path_factory.mktemp("progress")
    path = folder / crd.FILE_NAME
    path.write_text(crd.render())
    with ControlPlane(binaries=binaries, controller_manager=True, training_operator=True, crds=[path]) as plane:
        yield plane


@pytest.fixture(scope="module")
def world(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reporting]:
    made = Reporting(plane, tmp_path_factory.mktemp("world"))
    made.install()
    made.post(f"/api/v1/namespaces/{SYSTEM}/services", service())
    port = free_port()
    made.url = f"http://127.0.0.1:{port}/"
    with Kubelet(plane.api, script), made.operator(FINETUNE_PROGRESS_PORT=str(port), **led("10.0.0.1")):
        yield made


def script(job: str, number: int) -> Outcome:
    return SUCCESS if job.startswith("bystander") or number > 1 else NEVER_ENDS


def service() -> dict[str, Any]:
    """Without a selector: the leader says where it leads."""
    port = {"name": "progress", "port": 8443}
    return {"metadata": {"name": SERVICE, "namespace": SYSTEM}, "spec": {"ports": [port]}}


def led(address: str) -> dict[str, str]:
    return {"FINETUNE_PROGRESS_SERVICE": SERVICE, "FINETUNE_ADDRESS": address}


def test_a_pod_reports_for_its_own_job_only(world: Reporting) -> None:
    one, other = world.running_pod("one"), world.running_pod("other")
    assert world.report(world.token(one), 11) == 200
    assert world.report(world.token(other), 22) == 200
    eventually(lambda: (world.percent("one"), world.percent("other")) == (11, 22), what="both are shown")


def test_what_is_refused(world: Reporting) -> None:
    pod = world.running_pod("guarded")
    good = world.token(pod)
    head, claims, signature = good.split(".")
    answers = {
        "for somebody else": world.report(world.token(pod, "somebody-else"), 66),
        "of no pod": world.report(world.token(None), 66),
        "forged": world.report(f"{head}.{claims}.{signature[::-1]}", 66),
        "of a pod of no job": world.report(world.token(stranger(world)), 66),
    }
    assert answers == {"for somebody else": 401, "of no pod": 401, "forged": 401, "of a pod of no job": 403}
    assert world.percent("guarded") is None
    assert world.report(good, 33) == 200


def stranger(world: Reporting) -> dict[str, Any]:
    """A pod that says that it belongs to a job, and whose PyTorchJob is nobody's."""
    labels = {c.LABEL_MANAGED_BY: c.MANAGED_BY, c.LABEL_JOB: "guarded", c.LABEL_ATTEMPT: "1"}
    container = {"name": "c", "image": "i"}
    body = {"metadata": {"name": "stranger", "labels": labels}, "spec": {"containers": [container]}}
    made: dict[str, Any] = world.api.request("POST", "/api/v1/namespaces/default/pods", body)
    return made


def test_the_pod_of_an_attempt_that_has_ended_is_told_so(world: Reporting) -> None:
    pod = world.running_pod("paused")
    # A pod that takes its time to end, as one that saves does.
    path = "/api/v1/namespaces/default/pods/paused-1-master-0"
    world.api.request("PATCH", path, {"metadata": {"finalizers": ["test/slow"]}}, "application/merge-patch+json")
    token = world.token(pod)
    assert world.report(token, 40) == 200
    eventually(lambda: world.percent("paused") == 40)
    world.edit("paused", {"spec": {"runPolicy": {"suspend": True}}})
    eventually(lambda: "paused-1" not in world.names("pytorchjobs"))
    eventually(lambda: world.report(token, 41) == 410, 20, "the attempt has ended")
    world.api.request("PATCH", path, {"metadata": {"finalizers": None}}, "application/merge-patch+json")
    world.reaches("paused", "Suspended")
    assert world.percent("paused") == 40


def test_a_job_that_falls_silent_is_begun_anew(world: Reporting) -> None:
    pod = world.running_pod("stalled", runPolicy={"stallSeconds": 30, "retries": 1})
    assert world.report(world.token(pod), 50) == 200
    began = time.monotonic()
    eventually(lambda: world.status("stalled")["attempts"].get("last"), 60, "the attempt counts as stuck")
    assert time.monotonic() - began > 25
    last = world.status("stalled")["attempts"]["last"]
    assert last["reason"] == Reason.PROGRESS_STALLED, last
    final = world.reaches("stalled", "Succeeded")
    assert (final["attempts"]["current"], final["attempts"]["retries"]) == (2, 1)


def test_a_flood_and_silent_callers_harm_nobody(world: Reporting) -> None:
    pod = world.running_pod("flooded")
    good = world.token(pod)
    assert world.report(good, 1) == 200
    port = int(world.url.rstrip("/").rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(SILENT)]
    for one in silent:
        with contextlib.suppress(OSError):
            one.send(b"POST / HTTP/1.1\r\nHost: x\r\nAuthor")
    statuses: list[int] = []
    flood = threading.Thread(target=lambda: statuses.extend(asyncio.run(flooded(port, good))))
    flood.start()
    waits = []
    for percent in range(2, 12):
        began = time.monotonic()
        assert world.report(good, percent) == 200
        waits.append(time.monotonic() - began)
    world.create("bystander")
    world.reaches("bystander", "Succeeded")
    flood.join(120)
    assert not flood.is_alive()
    assert sorted(waits)[len(waits) // 2] < 2.0
    assert len(statuses) == FLOOD and set(statuses) <= {401, 0}, "0: the connection was cut off"
    eventually(lambda: world.percent("flooded") == 11)
    assert world.read("/healthz") == "ok\n"
    for one in silent:
        one.close()


async def flooded(port: int, good: str) -> list[int]:
    """Tokens that look right and are not, many at once; each costs a review, and no more."""
    head, claims, _ = good.split(".")
    places = asyncio.Semaphore(64)

    async def one(number: int) -> int:
        async with places:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                text = f"POST / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {head}.{claims}.{number}\r\n"
                writer.write(f"{text}Content-Length: 2\r\n\r\n{{}}".encode())
                line = await asyncio.wait_for(reader.readline(), 30)
                writer.close()
            except OSError:
                return 0
            return int(line.split()[1]) if line else 0

    return list(await asyncio.gather(*(one(number) for number in range(FLOOD))))


def test_the_service_leads_to_the_leader(world: Reporting) -> None:
    def addresses() -> list[str]:
        found = world.api.request("GET", SLICE)
        return [address for endpoint in found["endpoints"] for address in endpoint["addresses"]]

    assert addresses() == ["10.0.0.1"]
    version = world.api.request("GET", SLICE)["metadata"]["resourceVersion"]
    with world.operator(FINETUNE_RESYNC_SECONDS="1", **led("10.0.0.2")):
        eventually(lambda: addresses() == ["10.0.0.2"])
        time.sleep(2.5)
        after = int(world.api.request("GET", SLICE)["metadata"]["generation"])
    assert after == 2, "written once"
    assert version != world.api.request("GET", SLICE)["metadata"]["resourceVersion"]


def test_it_is_not_ready_before_its_first_lists(world: Reporting) -> None:
    port = free_port()
    probes = f"http://127.0.0.1:{port}"
    with world.proxy("unready") as proxy:
        proxy.plan = lambda call: Fault("500", status=500) if call.method == "GET" else None
        environment = world.environment(proxy.kubeconfig, port)
        process = OperatorProcess(environment, log=world.folder / "unready.log", metrics_port=port)
        process.launch()
        try:
            eventually(lambda: status_of(f"{probes}/healthz") == 200)
            time.sleep(1.0)
            assert (status_of(f"{probes}/healthz"), status_of(f"{probes}/readyz")) == (200, 503)
            proxy.plan = lambda call: None
            eventually(lambda: status_of(f"{probes}/readyz") == 200, 30)
        finally:
            proxy.plan = lambda call: None
            process.stop()


def status_of(url: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return 0


def test_two_jobs_of_one_name_are_two(world: Reporting) -> None:
    """The token of a pod of a job that was deleted is good for nothing, whatever the next job is called."""
    token = world.token(world.running_pod("again"))
    world.delete(f"{jobs()}/again")
    eventually(lambda: "again-1" not in world.names("pytorchjobs"))
    world.running_pod("again")
    assert world.report(token, 90) in (401, 403, 410)
    assert world.percent("again") is None
