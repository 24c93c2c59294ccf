"""The node of the demo cluster: what a PyTorchJob's pods see of it, and what survives when the API server does not."""

from __future__ import annotations

import os
import signal
import ssl
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.e2e.world import World, eventually, has_ended, marked

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TRAININGS = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"


def start(world: World, name: str, source: str, *, grace: int = 30, workers: int = 0, **spec: Any) -> str:
    """A PyTorchJob whose pods run a line of Python; the name of its master."""
    pod = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace,
        "containers": [
            {"name": "pytorch", "image": "any", "command": ["python", "-c", source], **spec.pop("more", {})}
        ],
        **spec,
    }

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": pod}}

    specs = {"Master": replicas(1), **({"Worker": replicas(workers)} if workers else {})}
    body = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": specs},
    }
    world.cluster.plane.api.request("POST", TRAININGS, body)
    return f"{name}-master-0"


def phase(world: World, pod: str) -> str:
    found: str = world.get("pod", pod)["status"].get("phase", "")
    return found


def prints(world: World, pod: str, text: str) -> None:
    eventually(lambda: text in world.log(pod), what=f"{pod} says {text}")


def test_a_pod_starts_soon_and_a_worker_finds_its_master(world: World) -> None:
    source = """
import os, socket, time
place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    with socket.create_server(place) as server:
        print("met", server.accept()[0].recv(10), flush=True)
else:
    for _ in range(200):
        try:
            socket.create_connection(place).sendall(b"worker")
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
"""
    master = start(world, "meet", source, workers=1)
    eventually(lambda: world.kubectl("get", "pod", "meet-worker-0", "--ignore-not-found"), what="the pods are created")
    world.kubectl("wait", "pytorchjob", "meet", "--for=condition=Succeeded", "--timeout=60s")
    assert "met b'worker'" in world.log(master)
    pod = world.get("pod", master)
    created, started = pod["metadata"]["creationTimestamp"], pod["status"]["startTime"]
    seconds = [time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) for text in (created, started)]
    assert seconds[1] - seconds[0] <= 2, "whole seconds, so one of them may be the clock's"
    shown = world.kubectl("get", "pod", "meet-worker-0", "--no-headers").split()
    assert shown[1:3] == ["0/1", "Completed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": {"resources": {"limits": {"nvidia.com/gpu": "3"}}}}, "1 Insufficient nvidia.com/gpu."),
        ({"nodeSelector": {"zone": "b"}}, "1 node(s) didn't match Pod's node affinity/selector."),
    ],
    ids=["gpu", "selector"],
)
def test_a_pod_that_does_not_fit_says_why(
    world: World, change: dict[str, Any], message: str, request: pytest.FixtureRequest
) -> None:
    name = f"unfit-{request.node.callspec.id}"
    pod = start(world, name, "pass", **change)

    def said() -> str:
        conditions = world.get("pod", pod)["status"].get("conditions") or []
        return "".join(one["message"] for one in conditions if one.get("reason") == "Unschedulable")

    eventually(lambda: world.kubectl("get", "pod", pod, "--ignore-not-found"), what="the pod is created")
    assert eventually(said, what="the reason stands in the pod's status") == f"0/1 nodes are available: {message}"
    # Not bound, so nobody has to confirm that it has stopped.
    world.kubectl("delete", "pytorchjob", name)
    eventually(lambda: not world.kubectl("get", "pod", pod, "--ignore-not-found"), what="the pod goes")


STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
SAVING = """
import signal, sys, time
signal.signal(15, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("up", flush=True)
time.sleep(1000)
"""


def test_a_deleted_pod_has_its_grace_period_and_no_more(world: World) -> None:
    pod = start(world, "stubborn", STUBBORN, grace=3)
    prints(world, pod, "up")
    uid, began = world.get("pod", pod)["metadata"]["uid"], time.monotonic()
    world.kubectl("delete", "pytorchjob", "stubborn")
    eventually(lambda: not world.kubectl("get", "pod", pod, "--ignore-not-found"), what="it is gone", seconds=20)
    assert time.monotonic() - began >= 2.9, "it was not given its grace period"
    assert not list(marked(uid))


def test_a_pod_that_stops_when_asked_is_gone_at_once(world: World) -> None:
    pod = start(world, "saving", SAVING, grace=100)
    prints(world, pod, "up")
    world.kubectl("delete", "pytorchjob", "saving")
    eventually(lambda: not world.kubectl("get", "pod", pod, "--ignore-not-found"), what="it is gone", seconds=30)
    assert "saved" in world.log(pod)


def test_a_pod_taken_away_by_force_is_killed(world: World) -> None:
    pod = start(world, "force", STUBBORN)
    prints(world, pod, "up")
    (init,) = (one for one in world.processes(pod) if one.pid == world.cluster.node.pids()[pod])
    uid = world.get("pod", pod)["metadata"]["uid"]
    world.kubectl("delete", "pytorchjob", "force", "--cascade=orphan")
    world.kubectl("delete", "pod", pod, "--force", "--grace-period=0")
    eventually(lambda: not list(marked(uid)), what="no process is left", seconds=20)
    # A process on its way out loses its environment, by which it was found, a moment before its end.
    eventually(lambda: has_ended(init), what="its first process is over", seconds=20)


def test_a_killed_process_fails_its_pod_with_137(world: World) -> None:
    pod = start(world, "killed", STUBBORN)
    prints(world, pod, "up")
    (program,) = (one for one in world.processes(pod) if one.cmdline()[1] == "-c")
    os.kill(program.pid, signal.SIGKILL)
    world.kubectl("wait", "pytorchjob", "killed", "--for=condition=Failed", "--timeout=60s")
    ended = world.get("pod", pod)["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 137


def test_a_token_is_renewed_before_it_expires(world: World) -> None:
    source = """
import time
import urllib.error
import urllib.request
def token():
    with open("/var/run/tokens/token") as file:
        return file.read()
first = token()
print("up", flush=True)
while token() == first:
    time.sleep(0.1)
print("another", flush=True)
"""
    token = {"audience": "somebody", "expirationSeconds": 600, "path": "token"}
    volumes = [{"name": "tokens", "projected": {"sources": [{"serviceAccountToken": token}]}}]
    more = {"volumeMounts": [{"name": "tokens", "mountPath": "/var/run/tokens"}]}
    pod = start(world, "renewed", source, volumes=volumes, more=more)
    prints(world, pod, "up")
    (path,) = (world.cluster.folder / "node" / "pods").glob(f"{pod}-*/volumes/tokens/token")
    old = path.read_text()
    os.utime(path, (time.time() - 500, time.time() - 500))
    world.kubectl("wait", "pytorchjob", "renewed", "--for=condition=Succeeded", "--timeout=30s")
    review = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": old, "audiences": ["somebody"]},
    }
    answer = world.cluster.plane.api.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review)
    assert answer["status"]["authenticated"] is True
    assert answer["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"] == [pod]


def test_a_pods_end_while_the_api_server_is_away_is_not_lost(world: World) -> None:
    source = "import os, time; print('up', flush=True)\nwhile not os.path.exists(os.environ['GO']): time.sleep(0.05)\n"
    go = world.folder / "go"
    ends = {"away-well": "", "away-badly": "raise SystemExit(65)"}
    more = {"env": [{"name": "GO", "value": str(go)}]}
    pods = [start(world, name, source + end, more=more) for name, end in ends.items()]
    for pod in pods:
        prints(world, pod, "up")
    processes = [one for pod in pods for one in world.processes(pod)]
    plane = world.cluster.plane
    plane.kill("kube-apiserver")
    go.touch()
    eventually(lambda: all(has_ended(one) for one in processes), what="the processes end, and nobody can be told")
    plane.start("kube-apiserver")
    eventually(lambda: phase(world, pods[0]) == "Succeeded", what="the good end is told")
    eventually(lambda: phase(world, pods[1]) == "Failed", what="the bad end is told")
    ended = world.get("pod", pods[1])["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 65


def test_pods_live_on_through_a_restart_of_the_api_server(world: World) -> None:
    pod = start(world, "through", "import time; print('up', flush=True); time.sleep(1000)")
    prints(world, pod, "up")
    processes = world.processes(pod)
    world.cluster.plane.restart_apiserver()
    time.sleep(2)
    assert processes and not any(has_ended(one) for one in processes)
    assert phase(world, pod) == "Running"
    # And the node sees what comes after it.
    world.kubectl("delete", "pod", pod, "--timeout=60s")
    assert all(has_ended(one) for one in processes)


def test_kubectl_logs(world: World) -> None:
    source = "import time; [print('line', n, flush=True) or time.sleep(0.3) for n in range(8)]"
    pod = start(world, "chatty", source)
    prints(world, pod, "line 0")
    lines = [f"line {n}" for n in range(8)]
    assert world.kubectl("logs", "-f", pod).splitlines() == lines, "until it ends"
    assert world.kubectl("logs", "--tail=2", pod).splitlines() == lines[-2:]
    assert world.kubectl("logs", "--limit-bytes=9", pod) == "line 0\nli"
    assert "timestamps is not to be had" in world.kubectl("logs", "--timestamps", pod, fails=True)
    port = world.get("node", "this-machine")["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
    url = f"https://127.0.0.1:{port}/containerLogs/default/{pod}/pytorch"
    context = ssl.create_default_context(cafile=str(world.cluster.plane.kubeconfig.parent / "pki" / "ca.crt"))
    with pytest.raises(OSError) as refused:
        urllib.request.urlopen(url, context=context, timeout=5).read()
    assert not isinstance(refused.value, urllib.error.HTTPError), "nobody without a certificate is even answered"
