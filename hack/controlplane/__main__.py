"""Command line: `PYTHONPATH=hack python -m controlplane {build,up,down}`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from .binaries import find_binaries, find_helm, needed
from .build import cache_root
from .errors import ControlPlaneError, NotRunning, StartFailed
from .plane import ControlPlane
from .processes import tail

_DOWN_SECONDS = 60.0
_INTERRUPTED = 130  # before it was up; afterwards Ctrl-C is how it is meant to end


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _registered(name: str) -> Iterator[Path]:
    """Hold the name, so that `down` finds this process; the lock ends with the process."""
    path = _register_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartFailed(
                f"a control plane named {name!r} is up already ({path}): "
                f"stop it with `down --name {name}`, or choose another --name"
            ) from None
        file.truncate(0)
        json.dump({"pid": os.getpid()}, file)
        file.flush()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


def _register_path(name: str) -> Path:
    return cache_root(os.environ) / "up" / f"{name}.json"


def _build(options: argparse.Namespace) -> int:
    programs = needed(controller_manager=True, training_operator=True)
    found = find_binaries(programs, progress=_say)
    for name, path in sorted(found.programs.items()):
        sys.stdout.write(f"{name} {path}\n")
    sys.stdout.write(f"helm {find_helm(progress=_say)}\n")
    return 0


def _up(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    plane = ControlPlane(
        controller_manager=options.controller_manager,
        training_operator=options.training_operator,
        crds=options.crd,
        progress=_say,
    )
    began = time.monotonic()
    code = _INTERRUPTED
    with _registered(options.name), contextlib.suppress(KeyboardInterrupt), plane:
        _say(f"up after {time.monotonic() - began:.1f} s; Ctrl-C stops it and removes its data")
        path = plane.kubeconfig
        if options.kubeconfig:
            path = Path(shutil.copy(path, options.kubeconfig))
        sys.stdout.write(f"export KUBECONFIG={path}\n")
        sys.stdout.flush()
        code = 0
        code = _follow(plane)
    return code


def _follow(plane: ControlPlane) -> int:
    while True:
        time.sleep(1)
        for name in plane.names:
            code = plane.exit_code(name)
            if code is not None:
                _say(f"{name} ended with code {code}. The end of its log:\n{tail(plane.logs(name))}")
                return 1


def _down(options: argparse.Namespace) -> int:
    path = _register_path(options.name)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # held, so the process that wrote its id lives
            os.kill(json.load(file)["pid"], signal.SIGTERM)
        except FileNotFoundError:
            raise NotRunning(f"no control plane named {options.name!r} is up") from None
        else:
            path.unlink(missing_ok=True)
            raise NotRunning(f"no control plane named {options.name!r} is up any more")
    deadline = time.monotonic() + _DOWN_SECONDS
    while path.exists():
        if time.monotonic() > deadline:
            raise ControlPlaneError(f"{options.name!r} did not stop within {_DOWN_SECONDS:.0f} s")
        time.sleep(0.1)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="controlplane", description=__doc__)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="find the programs, or build them; print their paths")
    build.set_defaults(run=_build)
    up = commands.add_parser("up", help="start, print KUBECONFIG, run until Ctrl-C")
    up.add_argument("--name", default="default", help="by which `down` finds it")
    up.add_argument("--kubeconfig", type=Path, help="write the kubeconfig here as well")
    up.add_argument("--crd", type=Path, action="append", default=[], help="create these too")
    for component in ("controller-manager", "training-operator"):
        up.add_argument(f"--{component}", action=argparse.BooleanOptionalAction, default=True, help="(on)")
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="stop what another terminal's `up` started")
    down.add_argument("--name", default="default")
    down.set_defaults(run=_down)
    return parser


def main() -> int:
    """Run one command."""
    options = _parser().parse_args()
    try:
        code: int = options.run(options)
    except ControlPlaneError as error:
        _say(f"error: {error}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
