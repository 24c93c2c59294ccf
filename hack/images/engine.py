"""buildah without a daemon and without containers: it parses the real Dockerfile and runs its steps in a chroot.

Needs root, and Debian's packages buildah and debootstrap.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from images.errors import ImageError

BASE = "localhost/finetune-base"
_SUITE = "bookworm"
_LONGEST_BUILD = 5400.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATES = Path("/usr/local/share/ca-certificates")
_APT = Path("/etc/apt/apt.conf.d")
_CLEAN = """\
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
"""
_SLIM = ("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt/lists")
"""Left out of Debian's own slim images, too."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a step added."""

    step: str
    size: int
    """Bytes, as a tar archive that is not compressed."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image in the local store."""

    name: str
    config: Mapping[str, Any]
    """`config` of the OCI image: User, Env, Entrypoint, Cmd, WorkingDir, Labels."""
    layers: tuple[Layer, ...]

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.layers)


def run(*command: str, seconds: float = 60, log: Path | None = None) -> str:
    """Run a program; what it printed. Raises ImageError with the end of it where it fails."""
    if shutil.which(command[0]) is None:
        raise ImageError(f"{command[0]} is not installed; on Debian: apt-get install buildah crun debootstrap")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if log else subprocess.PIPE,
            text=True,
            timeout=seconds,
            env={**os.environ, "BUILDAH_ISOLATION": "chroot"},
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"{_named(command)} took longer than {seconds:g} s") from error
    if log:
        log.write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        end = "\n".join((done.stdout + (done.stderr or "")).splitlines()[-20:])
        raise ImageError(f"{_named(command)} ended with {done.returncode}:\n{end}")
    return done.stdout


def _named(command: Sequence[str]) -> str:
    words = [word for word in command if not word.startswith(("-", "/"))]
    return " ".join(words[:3])


class Engine:
    """A store of images, apart from any other on this machine."""

    def __init__(self, folder: Path) -> None:
        """folder: where it is; made where it is missing."""
        self._store = folder / "store"
        self._buildah = ("buildah", "--root", str(self._store), "--runroot", str(folder / "run"))
        folder.mkdir(parents=True, exist_ok=True)

    def make_base(self) -> Image:
        """Debian from its own archive by debootstrap, as near to its slim image as that gets."""
        with tempfile.TemporaryDirectory(prefix="finetune-base-") as folder:
            root = Path(folder, "root")
            run("debootstrap", "--variant=minbase", "--include=ca-certificates", _SUITE, str(root), seconds=1800)
            _like_the_slim_image(root)
            _reach_archives_as_this_machine(root)
            container = self._run("from", "scratch").strip()
            try:
                mounted = self._run("mount", container).strip()
                run("cp", "--archive", f"{root}/.", mounted, seconds=300)
                self._run("config", "--env", f"PATH={_PATH}", "--created-by", f"debootstrap {_SUITE}", container)
                self._run("commit", "--quiet", container, BASE, seconds=600)
            finally:
                self._run("rm", container)
        return self.inspect(BASE)

    def build(self, dockerfile: str, name: str, arguments: Mapping[str, str], *, log: Path) -> Image:
        """Build a Dockerfile of the tree. Steps that were run before with the same files are not run again."""
        given = [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
        options = ("--layers", "--network", "host", "--format", "oci", "--file", dockerfile)
        self._run("build", *options, *given, "--tag", name, ".", seconds=_LONGEST_BUILD, log=log)
        return self.inspect(name)

    def inspect(self, name: str) -> Image:
        """An image that is there. Raises ImageError where it is not."""
        found = json.loads(self._run("inspect", "--type", "image", name))["OCIv1"]
        driver = json.loads(self._run("info"))["store"]["GraphDriverName"]
        stored = json.loads((self._store / f"{driver}-layers" / "layers.json").read_text(encoding="utf-8"))
        sizes = {one["diff-digest"]: one["diff-size"] for one in stored if "diff-digest" in one}
        steps = [one.get("created_by", "") for one in found["history"] if not one.get("empty_layer")]
        layers = zip(steps, found["rootfs"]["diff_ids"], strict=True)
        return Image(name, found["config"], tuple(Layer(_short(step), sizes[digest]) for step, digest in layers))

    @contextmanager
    def mounted(self, name: str) -> Iterator[Path]:
        """The root file system of a new container of an image."""
        container = self._run("from", name).strip()
        try:
            yield Path(self._run("mount", container).strip())
        finally:
            self._run("rm", container)

    def remove(self) -> None:
        """Take every image away, and what was kept of their steps."""
        self._run("rm", "--all")
        self._run("rmi", "--all", "--force", seconds=300)

    def _run(self, *arguments: str, seconds: float = 120, log: Path | None = None) -> str:
        return run(*self._buildah, *arguments, seconds=seconds, log=log)


def _like_the_slim_image(root: Path) -> None:
    for name in _SLIM:
        for path in (root / name).iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(_CLEAN, encoding="utf-8")


def _reach_archives_as_this_machine(root: Path) -> None:
    """Its additional certificates and its settings of apt about dates and proxies: nothing of the images themselves."""
    for path in _APT.glob("99*"):
        shutil.copy(path, root / "etc/apt/apt.conf.d" / path.name)
    own = sorted(_CERTIFICATES.glob("*.crt"))
    for path in own:
        shutil.copy(path, root / "usr/local/share/ca-certificates" / path.name)
    if own:
        run("chroot", str(root), "update-ca-certificates")


def _short(step: str) -> str:
    text = " ".join(step.removeprefix("/bin/sh -c ").removeprefix("#(nop) ").split())
    return text if len(text) <= 80 else f"{text[:77]}..."
