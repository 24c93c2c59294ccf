"""Gather what the trainer needs beyond torch and transformers into one archive, for a machine without an index."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

LIMIT = 64 * 2**20
WHEELS = (
    # the trainer
    "accelerate",
    "annotated-types",
    "bitsandbytes",
    "boto3",
    "botocore",
    "ftfy",
    "jmespath",
    "peft",
    "pydantic",
    "pydantic-core",
    "python-dateutil",
    "s3transfer",
    "six",
    "typing-inspection",
    "urllib3",
    "wcwidth",
    # TensorBoard's event files
    "absl-py",
    "protobuf",
    "tensorboard",
    # DeepSpeed
    "einops",
    "hjson",
    "msgpack",
    "ninja",
    "psutil",
    "py-cpuinfo",
    # the S3 server
    "blinker",
    "certifi",
    "cffi",
    "charset-normalizer",
    "click",
    "cryptography",
    "flask",
    "flask-cors",
    "idna",
    "itsdangerous",
    "moto",
    "py-partiql-parser",
    "pycparser",
    "requests",
    "responses",
    "werkzeug",
    "xmltodict",
)
SOURCES = ("deepspeed",)
"""There is no wheel of it. Built without its operators, it is plain Python."""
SERVICES = {"s3", "sts", "partitions.json", "endpoints.json", "sdk-default-configuration.json", "_retry.json"}
"""What is kept of botocore's descriptions of services."""


def main() -> None:
    """Install into a folder, leave out what no run needs, and pack it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--cuda", default="128", help="such as 128, for CUDA 12.8 (%(default)s)")
    options = parser.parse_args()
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    base = ["uv", "pip", "install", "--no-deps", "--target", str(folder)]
    there = ["--python-version", options.python, "--python-platform", "x86_64-manylinux_2_28"]
    subprocess.run([*base, *there, "--only-binary", ":all:", *WHEELS], check=True)
    subprocess.run([*base, *SOURCES], check=True, env=_without_operators())
    slim(folder, options.cuda)
    archive = Path(shutil.make_archive(str(folder), "xztar", folder.parent, folder.name))
    size = archive.stat().st_size
    sys.stdout.write(f"{archive}: {size / 2**20:.1f} MiB\n")
    if size > LIMIT:
        sys.exit("that is more than 64 MiB")


def _without_operators() -> dict[str, str]:
    return {**os.environ, "DS_BUILD_OPS": "0"}


def slim(folder: Path, cuda: str) -> None:
    """Drop kernels of other CUDA versions, descriptions of other services, compiled files and tests."""
    for kernels in (folder / "bitsandbytes").glob("libbitsandbytes_*.so"):
        if kernels.name not in (f"libbitsandbytes_cuda{cuda}.so", "libbitsandbytes_cpu.so"):
            kernels.unlink()
    for described in (folder / "botocore" / "data").iterdir():
        if described.name not in SERVICES:
            shutil.rmtree(described) if described.is_dir() else described.unlink()
    for service in (folder / "moto").iterdir():
        if (service / "resources").is_dir() and service.name != "s3":
            shutil.rmtree(service / "resources")
    for name in ("__pycache__", "tests", "bin"):
        for unneeded in [path for path in folder.rglob(name) if path.is_dir() and path.exists()]:
            shutil.rmtree(unneeded, ignore_errors=True)
    (folder / "tensorboard" / "webfiles.zip").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
