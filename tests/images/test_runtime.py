"""A pod becomes a container as a kubelet would have it made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from images.engine import Image
from images.errors import ImageError
from images.proof import operator_pod, trainer_pod
from images.runtime import Surroundings, configuration
from tests.images.dockerfiles import ROOT

IMAGE = Image(
    "acme",
    {
        "User": "65532:65532",
        "Env": ["PATH=/bin", "A=image"],
        "Entrypoint": ["run"],
        "Cmd": ["--all"],
        "WorkingDir": "/tmp",
    },
    (),
)
AROUND = Surroundings(
    config_maps={"settings": {"config.json": "{}", "ca.crt": "authority"}},
    secrets={"s3": {"key": "planted"}},
    fields={"metadata.name": "pod-0"},
    token=lambda audience: f"token for {audience}",
    hosts={"server.svc": "127.0.0.1"},
    environment={"KUBERNETES_SERVICE_HOST": "127.0.0.1"},
)
SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
}


def pod(**changes: Any) -> dict[str, Any]:
    volumes = changes.pop("volumes", [])
    return {"volumes": volumes, "containers": [{"name": "a", "securityContext": SECURITY, **changes}]}


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(spec: dict[str, Any], image: Image = IMAGE, around: Surroundings = AROUND) -> dict[str, Any]:
        return configuration(image, Path("/root-of-image"), spec, around, tmp_path)

    return make


def mount(found: dict[str, Any], path: str) -> dict[str, Any]:
    (one,) = (one for one in found["mounts"] if one["destination"] == path)
    assert isinstance(one, dict)
    return one


def test_a_restricted_pod_has_nothing_that_it_does_not_need(made: Callable[..., dict[str, Any]]) -> None:
    found = made(pod())
    process = found["process"]
    assert (process["user"], process["noNewPrivileges"]) == ({"uid": 65532, "gid": 65532}, True)
    assert set(process["capabilities"]) >= {"bounding", "effective", "permitted", "ambient"}
    assert all(kept == [] for kept in process["capabilities"].values())
    assert found["root"] == {"path": "/root-of-image", "readonly": True}
    assert process["cwd"] == "/tmp"


@pytest.mark.parametrize(
    ("user", "security", "what"),
    [
        ("", {}, "'root'"),
        ("0", {}, "'0'"),
        ("finetune", {}, "'finetune'"),
        ("65532", {"runAsUser": 0}, "'0'"),
        ("65532", {"capabilities": {}}, "capabilities"),
        ("65532", {"capabilities": {"drop": ["NET_RAW"]}}, "capabilities"),
    ],
)
def test_what_a_kubelet_or_the_restricted_level_refuses(
    made: Callable[..., dict[str, Any]], user: str, security: dict[str, Any], what: str
) -> None:
    image = Image("acme", {**IMAGE.config, "User": user}, ())
    with pytest.raises(ImageError, match=what):
        made(pod(securityContext={**SECURITY, **security}), image)


def test_root_is_taken_from_an_image_where_the_pod_does_not_mind(made: Callable[..., dict[str, Any]]) -> None:
    image = Image("acme", {**IMAGE.config, "User": ""}, ())
    found = made(pod(securityContext={**SECURITY, "runAsNonRoot": False}), image)
    assert found["process"]["user"] == {"uid": 0, "gid": 0}


@pytest.mark.parametrize(
    ("container", "arguments"),
    [
        ({}, ["run", "--all"]),
        ({"args": ["--one"]}, ["run", "--one"]),
        ({"command": ["sh", "-c"], "args": ["x"]}, ["sh", "-c", "x"]),
        ({"command": ["sh"]}, ["sh"]),
    ],
)
def test_the_command(made: Callable[..., dict[str, Any]], container: dict[str, Any], arguments: list[str]) -> None:
    assert made(pod(**container))["process"]["args"] == arguments


def test_variables_come_from_the_image_then_the_cluster_then_the_pod(made: Callable[..., dict[str, Any]]) -> None:
    env = [
        {"name": "A", "value": "pod"},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "key"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "no", "optional": True}}},
    ]
    assert made(pod(env=env))["process"]["env"] == [
        "PATH=/bin",
        "A=pod",
        "KUBERNETES_SERVICE_HOST=127.0.0.1",
        "NAME=pod-0",
        "KEY=planted",
    ]
    with pytest.raises(ImageError, match="no key no in the Secret s3"):
        made(pod(env=[{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "no"}}}]))


def test_volumes(made: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "claim").mkdir()
    projected = [
        {"serviceAccountToken": {"audience": "x", "path": "token"}},
        {"configMap": {"name": "settings", "items": [{"key": "ca.crt", "path": "ca"}]}},
    ]
    volumes = [
        {"name": "work", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "config", "configMap": {"name": "settings"}},
        {"name": "both", "projected": {"sources": projected}},
        {"name": "claim", "persistentVolumeClaim": {"claimName": "models"}},
    ]
    mounts = [
        {"name": one["name"], "mountPath": f"/{one['name']}", "readOnly": one["name"] != "work"} for one in volumes
    ]
    around = Surroundings(config_maps=AROUND.config_maps, token=AROUND.token, claims={"models": tmp_path / "claim"})
    found = made(pod(volumes=volumes, volumeMounts=mounts), around=around)
    work = Path(mount(found, "/work")["source"])
    assert (work.stat().st_mode & 0o777, mount(found, "/work")["options"]) == (0o777, ["rbind", "rw"])
    assert mount(found, "/memory")["type"] == "tmpfs"
    assert mount(found, "/config")["options"] == ["rbind", "ro"]
    assert sorted(path.name for path in Path(mount(found, "/config")["source"]).iterdir()) == ["ca.crt", "config.json"]
    both = Path(mount(found, "/both")["source"])
    assert {path.name: path.read_text() for path in both.iterdir()} == {"token": "token for x", "ca": "authority"}
    assert mount(found, "/claim")["source"] == str(tmp_path / "claim")


def test_names_of_services_are_in_the_hosts_file(made: Callable[..., dict[str, Any]]) -> None:
    text = Path(mount(made(pod()), "/etc/hosts")["source"]).read_text()
    assert "127.0.0.1\tserver.svc\n" in text and "127.0.0.1\tlocalhost\n" in text


def test_the_pods_of_the_project_are_understood(
    made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    fields = {"metadata.namespace": "a", "metadata.name": "b", "status.podIP": "10.0.0.1"}
    operator = made(operator_pod(), around=Surroundings(fields=fields))
    assert "FINETUNE_ADDRESS=10.0.0.1" in operator["process"]["env"]
    spec = trainer_pod()
    names = {one["configMap"]["name"] for one in spec["volumes"] if "configMap" in one}
    trainer = made(spec, around=Surroundings(config_maps={name: {"config.json": "{}"} for name in names}))
    assert trainer["root"]["readonly"] is True
    assert mount(trainer, "/var/lib/finetune")["options"] == ["rbind", "rw"]
