"""Command line: `PYTHONPATH=hack python -m demo_cluster`, or `make demo-cluster`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from controlplane import ControlPlaneError
from finetune_operator.api.parse import load_manifests
from finetune_operator.cli.inputs import model_mirror
from finetune_operator.errors import FinetuneError
from finetune_operator.local.buckets import named_buckets
from finetune_operator.local.seaweed import SeaweedError

from .cluster import GPU_RESOURCE, DemoCluster, DemoError, Options

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXAMPLE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_INTERRUPTED = 130  # before it was up; afterwards Ctrl-C is how it is meant to end


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the cluster, say how to use it, run until Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    code = _INTERRUPTED
    try:
        with contextlib.suppress(KeyboardInterrupt), DemoCluster(_options(options)) as cluster:
            _say("up; Ctrl-C stops it and removes everything")
            sys.stdout.write("\n".join(_instructions(cluster)) + "\n")
            sys.stdout.flush()
            code = 0
            _wait(cluster)
    except (ControlPlaneError, SeaweedError, FinetuneError) as error:
        _say(f"error: {error}")
        return 1
    return code


def _options(options: argparse.Namespace) -> Options:
    mirror = model_mirror(options.model_mirror)
    if options.model_mirror is None and not (mirror and (mirror / EXAMPLE_MODEL / "config.json").is_file()):
        raise DemoError(
            f"the examples' model {EXAMPLE_MODEL} is not on this machine: run `make model` first, or name a folder of "
            "models with --model-mirror"
        )
    jobs = [job for path in sorted(EXAMPLES.glob("*.yaml")) for job in load_manifests(path)]
    return Options(
        crd=next((ROOT / "crds").glob("*.yaml")),
        mirror=mirror,
        data=EXAMPLES / "buckets",
        buckets=tuple(dict.fromkeys(bucket for job in jobs for bucket in named_buckets(job))),
        gpus=options.gpus,
        cpu=options.cpu,
        progress=_say,
    )


def _instructions(cluster: DemoCluster) -> list[str]:
    """What to type in another terminal."""
    lines = [f"export KUBECONFIG={cluster.plane.kubeconfig}"]
    beside = Path(sys.executable).with_name("kubectl")
    if shutil.which("kubectl") is None and beside.exists():
        lines.append(f"export PATH={beside.parent}:$PATH")
    example = EXAMPLES / "lora.yaml"
    here = example.relative_to(Path.cwd()) if example.is_relative_to(Path.cwd()) else example
    return [
        *lines,
        f"kubectl apply -f {here}",
        "kubectl get ftj -w",
        "kubectl logs -f -l finetune.dev/job=NAME",
        f"# the operator's log: {cluster.folder / 'operator.log'}",
    ]


def _wait(cluster: DemoCluster) -> None:
    while True:
        time.sleep(1)
        if failure := cluster.failure():
            raise DemoError(failure)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo_cluster", description=__doc__)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help=f"{GPU_RESOURCE} that the node says it has",
    )
    parser.add_argument("--cpu", default="", metavar="N", help="CPUs that the node says it has (this machine's)")
    parser.add_argument(
        "--model-mirror",
        type=Path,
        metavar="FOLDER",
        help="folder with models that hf:// URIs name (that of `make model`)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
