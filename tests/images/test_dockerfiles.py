"""What the Dockerfiles say, and that it agrees with what the chart and the operator make of the images."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import constants as c
from finetune_operator.render.pod import COMMAND
from images import locks
from tests.images.dockerfiles import BOTH, OPERATOR, ROOT, TRAINER, Dockerfile

USER = "65532:65532"
HADOLINT = Path(sys.executable).with_name("hadolint")
IN_ANY_IMAGE = {"/tmp", "/dev/shm"}
both = pytest.mark.parametrize("path", BOTH, ids=lambda path: path.suffix[1:])


def golden_pods() -> Iterator[dict[str, Any]]:
    """PodSpecs as the operator renders them, where no user lays anything over them."""
    for path in sorted((ROOT / "tests/golden").glob("*.yaml")):
        if "overlay" in path.stem:
            continue
        for one in yaml.safe_load_all(path.read_text()):
            if one["kind"] == "PyTorchJob":
                yield from (replica["template"]["spec"] for replica in one["spec"]["pytorchReplicaSpecs"].values())


def operator_pod() -> dict[str, Any]:
    """The PodSpec of the chart's Deployment."""
    objects = yaml.safe_load_all((ROOT / "charts/kustomize/base/install.yaml").read_text())
    (found,) = (one for one in objects if one["kind"] == "Deployment")
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


def pods(path: Path) -> list[dict[str, Any]]:
    return [operator_pod()] if path == OPERATOR else list(golden_pods())


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = (one for one in pod["containers"] if one["name"] in ("operator", c.CONTAINER))
    assert isinstance(found, dict)
    return found


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(HADOLINT), "--no-color", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@both
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = lint(path)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_hadolint_would_say_something(tmp_path: Path) -> None:
    worse = tmp_path / "Dockerfile"
    worse.write_text(OPERATOR.read_text().replace("--no-install-recommends ", "").replace("# hadolint", "# "))
    found = set(re.findall(r"DL\d+", lint(worse).stdout))
    assert {"DL3008", "DL3015"} <= found


@both
def test_bases_have_a_version_and_nothing_comes_from_an_address(path: Path) -> None:
    file = Dockerfile(path)
    assert file.bases()
    for base in file.bases():
        name, _, tag = base.partition(":")
        assert name and re.search(r"\d", tag) and "latest" not in tag, base
    assert file.all("ADD") == []
    assert not re.search(r"\b(curl|wget|git)\b|https?://", path.read_text())


@both
def test_every_base_can_be_given_by_digest(path: Path) -> None:
    file = Dockerfile(path)
    stages = {value.split(" AS ")[1] for value in file.all("FROM") if " AS " in value}
    given = [value for value in file.all("FROM") if file.resolved(value.split()[0]) not in stages]
    assert given and all(value.startswith("${") for value in given), given


@both
def test_the_user_is_a_number_other_than_root_and_no_pod_says_another(path: Path) -> None:
    file = Dockerfile(path)
    assert file.last("USER") == USER
    assert f"--uid {USER.partition(':')[0]} " in " ".join(file.all("RUN", stage=file.stages))
    for pod in pods(path):
        contexts = (pod["securityContext"], container(pod)["securityContext"])
        assert contexts[0]["runAsNonRoot"] is True
        assert contexts[1]["readOnlyRootFilesystem"] is True
        for field, own in zip(("runAsUser", "runAsGroup"), USER.split(":"), strict=True):
            assert {str(one[field]) for one in contexts if field in one} <= {own}, field


@both
def test_the_import_check_runs_as_that_user(path: Path) -> None:
    file = Dockerfile(path)
    last = [step for step in file.steps if step.stage == file.stages]
    check = next(i for i, step in enumerate(last) if "imports.py" in step.value)
    user = next(i for i, step in enumerate(last) if step.instruction == "USER")
    assert user < check
    assert not any(step.instruction in ("COPY", "USER") for step in last[check:])


def test_the_entry_points_are_what_pods_are_told_to_run() -> None:
    assert tuple(Dockerfile(TRAINER).entry()) == COMMAND
    assert Dockerfile(OPERATOR).entry() == container(operator_pod())["command"]


@both
def test_the_kubelet_looks_after_health(path: Path) -> None:
    assert Dockerfile(path).all("HEALTHCHECK") == []


@both
def test_every_mount_point_is_there(path: Path) -> None:
    """A runtime that may not write to the image's file system cannot make them."""
    runs = " ".join(Dockerfile(path).all("RUN", stage=Dockerfile(path).stages))
    made = set(re.findall(r"(?<=\s)/[\w./-]+", runs)) | IN_ANY_IMAGE
    wanted = {one["mountPath"] for pod in pods(path) for one in container(pod)["volumeMounts"]}
    if path == OPERATOR:
        # With a certificate of somebody else's there is one more than by default.
        template = (ROOT / "charts/finetune-operator/templates/deployment.yaml").read_text()
        wanted |= set(re.findall(r"mountPath: (\S+)", template))
        assert len(wanted) > 1
    # Claims are mounted below their folder, by name.
    wanted = {c.PVC_DIRECTORY if one.startswith(f"{c.PVC_DIRECTORY}/") else one for one in wanted}
    assert wanted <= made


def test_libraries_write_to_volumes_only() -> None:
    """By the image's own settings, and by those of the pods that come over them."""
    image = Dockerfile(TRAINER).environment()
    folders = {name: value for name, value in image.items() if value.startswith("/") and name != "PATH"}
    assert {"HF_HOME", "HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FINETUNE_WORKDIR"} == set(folders)
    for pod in golden_pods():
        found = container(pod)
        writable = [one["mountPath"] for one in found["volumeMounts"] if not one.get("readOnly")]
        variables = {one["name"]: one["value"] for one in found["env"] if "value" in one}
        for name, folder in {**folders, **{name: variables.get(name, folders[name]) for name in folders}}.items():
            assert any(Path(folder).is_relative_to(one) for one in writable), f"{name}={folder}"
        for name in ("HOME", "USER", "HF_HOME", "FINETUNE_WORKDIR"):
            assert variables[name] == image[name]


def test_the_operator_writes_to_its_volume_only() -> None:
    image = Dockerfile(OPERATOR).environment()
    writable = {one["mountPath"] for one in container(operator_pod())["volumeMounts"] if not one.get("readOnly")}
    assert image["HOME"] in writable
    assert image["PYTHONDONTWRITEBYTECODE"] == "1"


@both
def test_nothing_is_installed_without_its_hash(path: Path) -> None:
    installs = re.findall(
        r"bin/pip (?:--python \S+ )?(?:install|wheel) .*?(?= && |$)", " ".join(Dockerfile(path).all("RUN"))
    )
    assert len(installs) >= 4
    for one in installs:
        assert "--no-deps" in one and ("--require-hashes" in one or "--no-index" in one or "${TORCH}" in one), one
        assert " wheel " not in one or "--no-build-isolation" in one, one
    for name in re.findall(r"requirements/([\w-]+\.lock)", path.read_text()):
        assert locks.read(ROOT / "requirements" / name)


def test_torch_comes_with_hashes_unless_it_is_asked_for_otherwise() -> None:
    default = Dockerfile(TRAINER).arguments()["TORCH"]
    torch = {one.name: one for one in locks.read(ROOT / "requirements" / default)}["torch"]
    assert torch.hashes
    assert (ROOT / "requirements/torch.txt").read_text() == f"torch=={torch.version}\n"
    assert (ROOT / "requirements/torch-cpu.txt").read_text() == f"torch=={torch.version}+cpu\n"


def copied(path: Path) -> set[str]:
    """What of the tree a Dockerfile uses."""
    values = [value for value in Dockerfile(path).all("COPY") if not value.startswith("--from")]
    sources = {source for value in values for source in value.split()[:-1]}
    return sources | set(re.findall(r"--mount=type=bind,source=([^,]+)", path.read_text()))


def test_what_is_copied_is_there_and_nothing_else_reaches_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert "*" in lines
    assert let_in == copied(OPERATOR) | copied(TRAINER)
    assert all((ROOT / source).exists() for source in let_in)
    assert len(let_in) > 5


@both
def test_labels_say_what_it_is(path: Path) -> None:
    file = Dockerfile(path)
    text = file.last("LABEL")
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((ROOT / "charts/finetune-operator/Chart.yaml").read_text())
    assert file.arguments()["VERSION"] == project["version"] == chart["appVersion"]
    assert f'licenses="{project["license"]}"' in text


def test_a_compiler_is_in_the_image_for_gpus_only() -> None:
    file = Dockerfile(TRAINER)
    stages = {value.split(" AS ")[1]: i for i, value in enumerate(file.all("FROM"), 1) if " AS " in value}
    words = {name: set(" ".join(file.all("RUN", stage=stage)).split()) for name, stage in stages.items()}
    assert {"gcc", "libc6-dev", "libpython3-dev"} <= words["python-cuda"]
    for name in words.keys() - {"python-cuda"}:
        assert not {"gcc", "g++", "build-essential", "cmake"} & words[name]
    assert "gcc" not in " ".join(Dockerfile(OPERATOR).all("RUN"))
