"""A container of an image, run by crun with a pod's own settings: its user, no capabilities, a read-only root."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from images.engine import Image, run
from images.errors import ImageError
from images.runtime import TERMINATION_MESSAGE, Surroundings, configuration

# crun serves no machine on which both kinds of control groups are mounted. In a mount namespace of its own it sees one.
_ALONE = (
    'while umount --recursive /sys/fs/cgroup 2>/dev/null; do :; done; mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
)


class Container:
    """One container. Its files lie in `folder`, its output in `folder/log`."""

    def __init__(self, image: Image, root: Path, pod: Mapping[str, Any], around: Surroundings, folder: Path) -> None:
        """Nothing is started yet. `pod`: see `runtime.configuration`."""
        folder.mkdir(parents=True)
        self.folder = folder
        self._id = f"finetune-{uuid.uuid4().hex[:12]}"
        self._crun = ("crun", "--root", str(folder / "state"), "--cgroup-manager=disabled")
        found = configuration(image, root, pod, around, folder)
        (folder / "config.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and do not wait."""
        command = [*self._crun, "run", "--bundle", str(self.folder), self._id]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _ALONE, "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises ImageError where it does not end in time."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise ImageError(f"a container did not end within {seconds:g} s:\n{self.log()[-2000:]}") from error

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM to its process 1, as a kubelet does it. Returns the exit code."""
        self.signal("TERM")
        return self.wait(seconds)

    def signal(self, name: str) -> None:
        """Send a signal to its process 1."""
        run(*self._crun, "kill", self._id, name)

    def log(self) -> str:
        """All that it has written so far."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    def message(self) -> str:
        """Its termination message."""
        return (self.folder / TERMINATION_MESSAGE).read_text(encoding="utf-8")


@contextmanager
def running(container: Container) -> Iterator[Container]:
    """Start a container; at the end it is gone, however it is left."""
    container.start()
    try:
        yield container
    finally:
        if container.exit_code is None:
            container.signal("KILL")
            container.wait(30)


def output(image: Image, root: Path, pod: Mapping[str, Any], folder: Path, *command: str) -> str:
    """What a command prints that takes the place of the pod's own. Raises ImageError where it fails."""
    (container,) = pod["containers"]
    changed = {**pod, "containers": [{**container, "command": list(command), "args": [], "env": []}]}
    around = Surroundings(claims=_no_claims(pod, folder), config_maps=_Empty(), secrets=_Empty())
    with running(Container(image, root, changed, around, folder)) as one:
        code = one.wait(300)
    if code:
        raise ImageError(f"{image.name}: {' '.join(command)[:100]} ended with {code}:\n{one.log()[-3000:]}")
    return one.log()


def _no_claims(pod: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod.get("volumes") or [] if "persistentVolumeClaim" in v]
    for claim in claims:
        (folder.parent / "no-claims" / claim).mkdir(parents=True, exist_ok=True)
    return {claim: folder.parent / "no-claims" / claim for claim in claims}


class _Empty(dict[str, Mapping[str, str]]):
    """Of any name, one without data."""

    def __missing__(self, name: str) -> Mapping[str, str]:
        return {}


def until(condition: Callable[[], Any], *, seconds: float, what: str, container: Container | None = None) -> Any:
    """What `condition()` returns, once that is true. Raises ImageError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if container is not None and container.exit_code is not None:
            raise ImageError(f"{what}: the container has ended with {container.exit_code}:\n{container.log()[-3000:]}")
        if time.monotonic() > deadline:
            raise ImageError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
    return found
