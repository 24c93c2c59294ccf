"""Command line: `PYTHONPATH=hack python -m images {prove,sbom,licences}`, from the root of the tree."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from controlplane import ControlPlaneError
from images import bom, engine, licences
from images.errors import ImageError
from images.locks import IMAGES

OPERATOR = "localhost/finetune-operator"
TRAINER = "localhost/finetune-trainer"
_REQUIREMENTS = Path("requirements")


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prove = commands.add_parser("prove", help="build both images with buildah and run them (root, 35 GB of disk)")
    prove.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu", help="kind of the trainer's image")
    prove.add_argument("--models", type=Path, required=True, help="folder with the example model, by its hub name")
    prove.add_argument("--store", type=Path, help="folder that keeps the images and their steps for the next time")
    for name, does in (("sbom", "write what each image is made of"), ("licences", "write the licences of all of it")):
        commands.add_parser(name, help=does).add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        return _COMMANDS[arguments.command](arguments)
    except (ImageError, ControlPlaneError) as error:
        _say(f"error: {error}")
        return 1


def _prove(arguments: argparse.Namespace) -> int:
    # Only here: it starts what the other commands have no use for.
    from images.proof import Proof

    if os.geteuid() != 0:
        raise ImageError("file systems are mounted, and steps run as the images' own users: that needs root")
    kind = arguments.accelerator
    with ExitStack() as stack:
        folder = _temporary(stack)
        store = engine.Engine(arguments.store or folder / "images")
        if arguments.store is None:
            stack.callback(store.remove)
        proof = Proof(store, folder, arguments.models, _say)
        seconds: dict[str, float] = {}
        _timed(seconds, "base", store.make_base)
        operator, trainer = (
            _timed(seconds, name, partial(store.build, file, name, given, log=folder / f"{file}.log"))
            for name, file, given in (
                (OPERATOR, "Dockerfile.operator", {"BASE": engine.BASE}),
                (f"{TRAINER}-{kind}", "Dockerfile.trainer", {"ACCELERATOR": kind, f"{kind.upper()}_BASE": engine.BASE}),
            )
        )
        proof.run(operator, trainer, compiles=kind == "cuda")
    sys.stdout.write(json.dumps({"seconds to build": seconds, **proof.seen}, indent=2) + "\n")
    return 0


def _temporary(stack: ExitStack) -> Path:
    # Images are too large for a /tmp that lies in memory.
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="finetune-images-", dir="/var/tmp")))


def _timed(seconds: dict[str, float], name: str, work: Callable[[], engine.Image]) -> engine.Image:
    _say(f"{name}: building")
    began = time.monotonic()
    made = work()
    seconds[name] = round(time.monotonic() - began, 1)
    return made


def _sbom(arguments: argparse.Namespace) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        path = arguments.output / f"{image}.cdx.json"
        path.write_text(bom.render(image, _REQUIREMENTS), encoding="utf-8")
        sys.stdout.write(f"{path}\n")
    return 0


def _licences(arguments: argparse.Namespace) -> int:
    arguments.output.write_text(licences.report(_REQUIREMENTS), encoding="utf-8")
    sys.stdout.write(f"{arguments.output}\n")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"prove": _prove, "sbom": _sbom, "licences": _licences}

if __name__ == "__main__":
    sys.exit(main())
