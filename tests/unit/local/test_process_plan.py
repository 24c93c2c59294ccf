from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.local.environment import expand
from finetune_operator.local.process_plan import Machine, ProcessPlan, map_paths, plan_process
from finetune_operator.local.sources import CannotRun
from tests.unit.local.objects import Manifest, container, pod

FOLDER = Path("/run/pod")
MACHINE = Machine(
    programs={"python": ("/usr/bin/python3.11",)},
    inherited={"PATH": "/bin", "AWS_PROFILE": "mine"},
    claims=Path("/run/pvc"),
    cores=8,
)


class FakeSources:
    """One ConfigMap `config` and one Secret `secret`."""

    def config_map(self, name: str) -> Mapping[str, bytes] | None:
        return {"config.json": b"{}", "other": b"o"} if name == "config" else None

    def secret(self, name: str) -> Mapping[str, bytes] | None:
        return {"key": b"hidden"} if name == "secret" else None

    def token(self, audience: str) -> str:
        return f"for {audience}"


def plan(one: Manifest, machine: Machine = MACHINE, **spec: Any) -> ProcessPlan:
    manifest = pod(one, **spec)
    manifest["metadata"]["uid"] = "u"
    return plan_process(manifest, one, FOLDER, FakeSources(), machine)


def env(*entries: Manifest, **fields: Any) -> Manifest:
    return container("python", env=list(entries), **fields)


MOUNTS = [("/etc/finetune/more", Path("/b")), ("/etc/finetune", Path("/a"))]


@pytest.mark.parametrize(
    ("text", "mapped"),
    [
        ("/etc/finetune/config.json", "/a/config.json"),
        ("/etc/finetune", "/a"),
        ("/etc/finetune/more/x", "/b/x"),
        ("--config=/etc/finetune/config.json", "--config=/a/config.json"),
        ("file:///etc/finetune/x", "file:///a/x"),
        ("/x:/etc/finetune:/y", "/x:/a:/y"),
        ("cat '/etc/finetune/x'; ls /etc/finetune", "cat '/a/x'; ls /a"),
        ("/etc/finetune2/x", "/etc/finetune2/x"),
        ("/etc/finetune-x", "/etc/finetune-x"),
        ("/srv/etc/finetune/x", "/srv/etc/finetune/x"),
        ("../etc/finetune/x", "../etc/finetune/x"),
        ("s3://etc/finetune/x", "s3://etc/finetune/x"),
        ("", ""),
    ],
)
def test_paths_below_a_mount_are_mapped_and_others_are_not(text: str, mapped: str) -> None:
    assert map_paths(text, MOUNTS) == mapped


def test_command_arguments_and_values_are_mapped() -> None:
    mounts = [
        {"name": "config", "mountPath": "/etc/finetune/"},
        {"name": "disk", "mountPath": "/scratch", "subPath": "a"},
    ]
    found = plan(
        env(
            {"name": "HOME", "value": "/scratch/home"},
            args=["-m", "trainer", "--config", "/etc/finetune/config.json", "$(HOME)/x"],
            volumeMounts=mounts,
            workingDir="/scratch",
        ),
        volumes=[{"name": "config", "configMap": {"name": "config"}}, {"name": "disk", "emptyDir": {}}],
    )
    assert found.argv == (
        "/usr/bin/python3.11",
        "-m",
        "trainer",
        "--config",
        "/run/pod/volumes/config/config.json",
        "/run/pod/volumes/disk/a/home/x",
    )
    assert found.environment["HOME"] == "/run/pod/volumes/disk/a/home"
    assert found.working_directory == Path("/run/pod/volumes/disk/a")
    assert {file.path.name: file.content for file in found.files} == {"config.json": b"{}", "other": b"o"}
    assert {file.mode for file in found.files} == {0o600}


def test_paths_that_every_machine_has_stay() -> None:
    found = plan(
        container("python", "/tmp/x.py", volumeMounts=[{"name": "t", "mountPath": "/tmp"}]),
        volumes=[{"name": "t", "emptyDir": {}}],
    )
    assert found.argv[1] == "/tmp/x.py"
    assert found.environment["TMPDIR"] == "/run/pod/volumes/t"
    assert Path("/run/pod/volumes/t") in found.directories


def test_claims_outlive_the_pod_and_projections_hold_tokens() -> None:
    found = plan(
        container(
            "python",
            "/mnt/pvc/models/x",
            volumeMounts=[{"name": "m", "mountPath": "/mnt/pvc/models"}, {"name": "p", "mountPath": "/tokens"}],
        ),
        volumes=[
            {"name": "m", "persistentVolumeClaim": {"claimName": "models"}},
            {
                "name": "p",
                "projected": {
                    "sources": [
                        {"serviceAccountToken": {"path": "token", "audience": "a"}},
                        {"secret": {"name": "secret", "items": [{"key": "key", "path": "sub/k"}]}},
                        {"configMap": {"name": "none", "optional": True}},
                    ]
                },
            },
        ],
    )
    assert found.argv[1] == "/run/pvc/models/x"
    assert found.environment["FINETUNE_PVC_ROOT"] == "/run/pvc"
    assert {str(file.path): file.content for file in found.files} == {
        "/run/pod/volumes/p/token": b"for a",
        "/run/pod/volumes/p/sub/k": b"hidden",
    }


def test_environment_comes_from_everywhere_in_order() -> None:
    found = plan(
        env(
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)-$(C)-$$(A)"},
            {"name": "C", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "key"}}},
            {"name": "D", "valueFrom": {"configMapKeyRef": {"name": "config", "key": "other"}}},
            {"name": "E", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k", "optional": True}}},
            {"name": "F", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['finetune.dev/job']"}}},
            {"name": "G", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            envFrom=[{"secretRef": {"name": "secret"}, "prefix": "X_"}, {"configMapRef": {"name": "n", "optional": 1}}],
        )
    ).environment
    assert {name: found.get(name) for name in "ABCDEFG"} == {
        "A": "1",
        "B": "1-$(C)-$(A)",
        "C": "hidden",
        "D": "o",
        "E": None,
        "F": "job",
        "G": "u",
    }
    assert found["X_key"] == "hidden"
    assert found["PATH"] == "/bin"


def test_credentials_of_the_pod_do_not_mix_with_the_users_own() -> None:
    assert "AWS_PROFILE" in plan(env()).environment
    assert "AWS_PROFILE" not in plan(env({"name": "AWS_ACCESS_KEY_ID", "value": "x"})).environment


@pytest.mark.parametrize(("world", "threads"), [(None, "8"), ("3", "2"), ("16", "1"), ("0", "8"), ("auto", "1")])
def test_cores_are_shared_out(world: str | None, threads: str) -> None:
    entries = [] if world is None else [{"name": "WORLD_SIZE", "value": world}]
    assert plan(env(*entries)).environment["OMP_NUM_THREADS"] == threads


def test_the_pods_own_word_on_threads_counts_and_the_machines_counts_more() -> None:
    entry = {"name": "OMP_NUM_THREADS", "value": "5"}
    assert plan(env(entry)).environment["OMP_NUM_THREADS"] == "5"
    machine = replace(MACHINE, overrides={"OMP_NUM_THREADS": "1"})
    assert plan(env(entry), machine).environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("one", "spec", "message"),
    [
        ({"name": "c", "image": "img"}, {}, "entrypoint of image 'img'.*set command"),
        (env({"name": "A", "valueFrom": {"secretKeyRef": {"name": "no", "key": "k"}}}), {}, "Secret 'no' not found"),
        (env({"name": "A", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "z"}}}), {}, "has no key 'z'"),
        (env({"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "x"}}}), {}, "A comes from resourceFieldRef"),
        (env({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.x"}}}), {}, "field 'status.x'"),
        (env(envFrom=[{"configMapRef": {"name": "no"}}]), {}, "ConfigMap 'no' not found"),
        (env(volumeMounts=[{"name": "v", "mountPath": "/v"}]), {}, "mounts volume 'v'"),
        (env(), {"volumes": [{"name": "v", "nfs": {}}]}, "volume 'v' is of kind nfs"),
        (env(), {"volumes": [{"name": "v", "secret": {"secretName": "no"}}]}, "Secret 'no' not found"),
        (
            env(),
            {"volumes": [{"name": "v", "configMap": {"name": "config", "items": [{"key": "z", "path": "z"}]}}]},
            "has no key 'z'",
        ),
        (
            env(),
            {"volumes": [{"name": "v", "secret": {"secretName": "secret", "items": [{"key": "key", "path": "../z"}]}}]},
            "leaves its volume",
        ),
    ],
)
def test_what_a_process_cannot_have_is_named(one: Manifest, spec: Manifest, message: str) -> None:
    with pytest.raises(CannotRun, match=message):
        plan(one, **spec)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [("$(A)", "1"), ("x$(A)y$(B)", "x1y$(B)"), ("$$(A)", "$(A)"), ("$$$(A)", "$1"), ("$A", "$A"), ("$(A", "$(A")],
)
def test_expansion_is_that_of_kubernetes(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1"}) == expanded
