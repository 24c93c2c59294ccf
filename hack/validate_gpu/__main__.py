"""`python -m validate_gpu`: every strategy on two GPUs against one, fast paths against slow ones, and other tasks.

Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.contract.config import S3Config
from finetune_trainer.storage import ObjectStore, S3Uri
from validate_gpu.findings import Finding, examine
from validate_gpu.jobs import RUNS, job, processes_of, twin_of, write_inputs
from validate_gpu.launch import launch

PACKAGES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes", "safetensors", "numpy")


def main() -> int:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("validation"), help="a new folder for everything")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--cpu", action="store_true", help="a rehearsal without GPUs")
    options = parser.parse_args()
    out: Path = options.out.absolute()
    if out.exists():
        parser.error(f"--out {out}: it is there already; name a new folder")
    out.mkdir(parents=True)
    twins = {twin_of(run) for run in options.only}
    # What others are held against comes first.
    runs = sorted(
        (run for run in RUNS if run in options.only or run in twins), key=lambda run: twin_of(run) is not None
    )
    write_inputs(out, cpu=options.cpu)
    findings: dict[str, Finding] = {}
    with _S3Server() as endpoint:
        store = ObjectStore(S3Config(endpoint=endpoint))
        for run in runs:
            config = job(run, out, endpoint, cpu=options.cpu)
            ended = launch(config, processes_of(run), out / run, cpu=options.cpu)
            twin = findings.get(twin_of(run) or "")
            finding = examine(run, ended, S3Uri.parse(config.run_uri), store, out, twin, cpu=options.cpu)
            findings[run] = finding
            sys.stdout.write(finding.row())
            sys.stdout.flush()
    report = {"versions": versions(), "runs": [asdict(finding) for finding in findings.values()]}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report["versions"], indent=2) + "\n")
    failed = [finding for finding in findings.values() if finding.problems]
    for finding in failed:
        sys.stdout.write(f"FAILED {finding.run}: {'; '.join(finding.problems)}\n")
    return 1 if failed else 0


def versions() -> dict[str, str]:
    """Of what was run, and on what."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["gpus"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


class _S3Server:
    """moto's, on a free port of the loopback interface, with one bucket."""

    def __enter__(self) -> str:
        import boto3
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        os.environ |= {"AWS_ACCESS_KEY_ID": "validation", "AWS_SECRET_ACCESS_KEY": "validation"}
        self._server: Any = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, port = self._server.get_host_and_port()
        endpoint = f"http://127.0.0.1:{port}"
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="validation")
        return endpoint

    def __exit__(self, *_: object) -> None:
        self._server.stop()


if __name__ == "__main__":
    sys.exit(main())
