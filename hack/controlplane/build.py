"""Builds the control plane's programs from Go modules into a cache outside the tree.

The cache's folder is named after a digest of all that decides what is built, so a tree
finds what another tree of the same versions has built, and a changed go.sum builds anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .components import APISERVER, CONTROLLER_MANAGER, ETCD, HELM, TRAINING_OPERATOR
from .errors import BuildFailed

Progress = Callable[[str], None]

_HERE = Path(__file__).parent
_KUBERNETES = _HERE / "kubernetes"
_OPERATOR = _HERE / "training-operator"
_HELM = _HERE / "helm"
_OPERATOR_MODULE = "github.com/kubeflow/training-operator"
_CRD = "kubeflow.org_pytorchjobs.yaml"
_PROGRESS_SECONDS = 15.0
_BUILD_SECONDS = 3600.0


@dataclass(frozen=True)
class _Target:
    module: Path
    package: str


_TARGETS: Mapping[str, _Target] = {
    ETCD: _Target(_KUBERNETES, "go.etcd.io/etcd/server/v3"),
    APISERVER: _Target(_KUBERNETES, f"k8s.io/kubernetes/cmd/{APISERVER}"),
    CONTROLLER_MANAGER: _Target(_KUBERNETES, f"k8s.io/kubernetes/cmd/{CONTROLLER_MANAGER}"),
    TRAINING_OPERATOR: _Target(_OPERATOR, f"{_OPERATOR_MODULE}/cmd/training-operator.v1"),
    HELM: _Target(_HELM, "helm.sh/helm/v4/cmd/helm"),
}


def cache_root(environment: Mapping[str, str]) -> Path:
    """Where every version's builds lie; safe to delete."""
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "finetune-controlplane"


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where this tree's versions are built into."""
    return cache_root(environment) / _digest(_KUBERNETES, _OPERATOR)


def helm_folder(environment: Mapping[str, str]) -> Path:
    """Where Helm is built into: a folder of its own, so that a new Helm builds no control plane anew."""
    return cache_root(environment) / f"helm-{_digest(_HELM)}"


def _digest(*folders: Path) -> str:
    digest = hashlib.sha256(f"{platform.system()} {platform.machine()}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.name in ("go.mod", "go.sum") or path.suffix == ".go":
                digest.update(f"\0{path.relative_to(_HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def crd_file(cache: Path) -> Path:
    """The PyTorchJob's CustomResourceDefinition, once the training operator is built."""
    return cache / "crds" / _CRD


def kubernetes_version() -> str:
    """The version that is built, as in "v1.36.3"."""
    found = re.search(r"k8s\.io/kubernetes (v\S+)", (_KUBERNETES / "go.mod").read_text("utf-8"))
    if found is None:
        raise BuildFailed(f"{_KUBERNETES / 'go.mod'} does not require k8s.io/kubernetes: add it")
    return found[1]


def build(programs: frozenset[str], cache: Path, environment: Mapping[str, str], progress: Progress) -> None:
    """Build what the cache lacks. One process at a time builds; the others wait for it.

    Raises:
        BuildFailed: with the end of go's output.
    """
    binaries = cache / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    with _lock(cache / ".lock", progress):
        if TRAINING_OPERATOR in programs and not crd_file(cache).exists():
            _copy_crd(cache, environment)
        for name in _TARGETS:
            if name in programs and not (binaries / name).exists():
                _build_one(name, binaries, environment, progress)


def _build_one(name: str, binaries: Path, environment: Mapping[str, str], progress: Progress) -> None:
    target = _TARGETS[name]
    unfinished = binaries / f".{name}.building"
    command = ["go", "build", "-v", "-trimpath", f"-ldflags={_link_flags(target)}"]
    command += ["-o", str(unfinished), target.package]
    if shutil.which("nice"):
        command = ["nice", "-n", "10", *command]
    progress(f"{name}: building from Go modules (the first time takes minutes)")
    began = time.monotonic()
    _run(name, command, target.module, environment, progress)
    unfinished.replace(binaries / name)  # so that what has its name is whole
    progress(f"{name}: built in {time.monotonic() - began:.0f} s")


def _link_flags(target: _Target) -> str:
    """No debug information; and what Kubernetes answers at /version."""
    flags = ["-s", "-w"]
    if target.module == _KUBERNETES:
        version = kubernetes_version()
        major, minor, *_ = version.removeprefix("v").split(".")
        stamps = {
            "gitVersion": version,
            "gitMajor": major,
            "gitMinor": minor,
            "gitCommit": "unknown",
            "gitTreeState": "archive",
        }
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
            flags += [f"-X {package}.{key}={value}" for key, value in stamps.items()]
    return " ".join(flags)


def _go_environment(environment: Mapping[str, str]) -> dict[str, str]:
    # A workspace or flags meant for other modules must not decide what is built here.
    own = {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    return {**environment, **own}


def _run(
    name: str,
    command: list[str],
    folder: Path,
    environment: Mapping[str, str],
    progress: Progress,
) -> None:
    began = reported = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=_go_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # go's own children end with it
    )
    limit = threading.Timer(_BUILD_SECONDS, _end_group, [process])
    limit.start()
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            lines.append(line)
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                progress(f"{name}: {len(lines)} packages, {reported - began:.0f} s")
        code = process.wait()
    finally:
        limit.cancel()
        _end_group(process)
    if code != 0:
        raise BuildFailed(
            f"`go build` of {name} in {folder} failed with exit code {code} after "
            f"{time.monotonic() - began:.0f} s. The end of its output:\n{''.join(lines[-20:])}"
        )


def _end_group(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _copy_crd(cache: Path, environment: Mapping[str, str]) -> None:
    for arguments in (["mod", "download", _OPERATOR_MODULE], ["list", "-m", "-f", "{{.Dir}}"]):
        done = subprocess.run(
            ["go", *arguments, *([_OPERATOR_MODULE] if arguments[0] == "list" else [])],
            cwd=_OPERATOR,
            env=_go_environment(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode != 0:
            raise BuildFailed(f"`go {' '.join(arguments)}` in {_OPERATOR} failed: {done.stderr}")
    target = crd_file(cache)
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_suffix(".copying")
    shutil.copyfile(Path(done.stdout.strip()) / "manifests" / "base" / "crds" / _CRD, unfinished)
    unfinished.replace(target)


@contextlib.contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that builds into {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
