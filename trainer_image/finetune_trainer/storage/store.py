"""The object store: one client with bounded retries and time limits, and the operations a run needs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import math
import os
import threading
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from finetune_trainer.contract import FileEntry
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import InternalError, Unavailable, UsageError
from finetune_trainer.storage import parts, tree
from finetune_trainer.storage.endpoint import check_endpoint
from finetune_trainer.storage.failures import CorruptObject, explained
from finetune_trainer.storage.reader import ObjectReader
from finetune_trainer.storage.uri import S3Uri
from finetune_trainer.topology import cores
from finetune_trainer.workspace import explain_full_disk

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DEFAULT_REGION = "us-east-1"
"""What S3 servers other than Amazon's expect where no region is named."""

_BUFFER = 4 * 2**20
_UPLOADED_PART = 16 * 2**20  # bytes
_MAX_PARTS = 9_000  # S3 allows 10,000


@dataclass(frozen=True)
class StoreLimits:
    """How long an operation goes on against a store that does not answer."""

    attempts: int = 5
    """Tries of one request. botocore waits up to 1, 2, 4, ... 20 s between them."""
    connect_seconds: float = 10
    """Per try."""
    read_seconds: float = 60
    """Without a byte, per try."""
    backoff_seconds: float = 1
    """Before the first renewed try of a broken download; doubled each time."""
    connections: int = 4
    """Files that are transferred at the same time."""
    parts: int = field(default_factory=lambda: min(16, max(4, cores())))
    """Of large files, read at the same time: more than processors only take turns."""
    page: int = 1000
    """Objects per request of a listing or a deletion; S3 allows no more."""


class ObjectStore:
    """An S3 server. Every error it raises is one of `finetune_trainer.errors`. Safe to use from several threads."""

    def __init__(self, config: S3Config, *, limits: StoreLimits | None = None) -> None:
        self.limits = limits or StoreLimits()
        endpoint = config.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            check_endpoint(endpoint)
        session = boto3.session.Session()
        try:
            self._client: S3Client = session.client(
                "s3",
                endpoint_url=endpoint,
                region_name=config.region or session.region_name or DEFAULT_REGION,
                config=Config(
                    connect_timeout=self.limits.connect_seconds,
                    read_timeout=self.limits.read_seconds,
                    retries={"mode": "standard", "total_max_attempts": self.limits.attempts},
                    max_pool_connections=self.limits.connections * 3 + self.limits.parts,
                    request_checksum_calculation="when_supported",
                    response_checksum_validation="when_supported",
                    s3={"addressing_style": "path"} if endpoint else {},
                ),
            )
        except (ValueError, BotoCoreError) as error:
            raise UsageError(
                f"the object store {endpoint!r} cannot be used: {error}; write output.s3.endpoint as"
                " https://host[:port]",
                reason="InvalidEndpoint",
            ) from error
        self.endpoint: str = self._client.meta.endpoint_url
        """For messages."""
        self._client.meta.events.register("before-sign.s3.GetObject", _without_checksum_of_part)
        self._session = session
        self._slots = threading.Semaphore(self.limits.parts)

    def seal(self, content: bytes) -> bytes | None:
        """What only a holder of the same secret key can make of some content (HMAC-SHA256, 32 bytes): more than the
        right to write to a bucket. None where the credentials are temporary, so that each run has others, or none."""
        held = self._session.get_credentials()
        known = held.get_frozen_credentials() if held is not None else None
        if known is None or known.token or not known.secret_key:
            return None
        return hmac.digest(f"finetune seal {known.secret_key}".encode(), content, "sha256")

    def put_bytes(self, uri: S3Uri, data: bytes) -> None:
        """Write a small object."""
        with explained(uri, self.endpoint, "write"):
            self._client.put_object(Bucket=uri.bucket, Key=uri.key, Body=data)

    def put_file(self, uri: S3Uri, path: Path, *, name: str | None = None) -> FileEntry:
        """Write a file, in parts where it is large.

        Its SHA-256 is computed from the bytes that were sent. `name` is the entry's path, by default the file's name.
        """
        part = max(_UPLOADED_PART, math.ceil(path.stat().st_size / _MAX_PARTS))
        config = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_concurrency=2)
        config.max_in_memory_upload_chunks = 3  # of s3transfer, whose default of 10 would hold 160 MiB of each file
        with path.open("rb") as file, explained(uri, self.endpoint, "write"):
            reader = _Hashing(file)
            # Not seekable as far as boto3 knows, so it reads each byte once and in order, and retries from memory.
            self._client.upload_fileobj(cast("BinaryIO", reader), uri.bucket, uri.key, Config=config)
        return FileEntry(path=name or path.name, size_bytes=reader.size, sha256=reader.sha256.hexdigest())

    def get_bytes(self, uri: S3Uri, *, limit: int = 16 * 2**20) -> bytes:
        """Read an object of at most `limit` bytes. Raises UsageError where it is larger, InputMissing without it."""
        with self.open_stream(uri) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise UsageError(f"{uri} is larger than {limit} bytes; it cannot be what this job needs", reason="TooLarge")
        return data

    def get_file(self, uri: S3Uri, path: Path, expect: FileEntry | None = None) -> None:
        """Read an object into a file, which appears only when it is complete.

        Raises CorruptObject where size or SHA-256 are not those of `expect`, DiskFull where there is no room.
        """
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with explain_full_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("w+b") as file:
                    self._consume(uri, file, expect)
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def check(self, uri: S3Uri, expect: FileEntry) -> None:
        """Read an object and compare it with its entry. Raises CorruptObject, or InputMissing."""
        self._consume(uri, None, expect)

    def open_stream(self, uri: S3Uri) -> io.BufferedReader:
        """The content of an object as a binary stream (iterate for lines). It survives broken connections."""
        return io.BufferedReader(self._reader(uri), buffer_size=_BUFFER)

    def list(self, uri: S3Uri) -> list[tuple[S3Uri, int]]:
        """All objects of a folder, at any depth, with their sizes in bytes, sorted by key. Empty where there are none.

        `s3://b/step-1` never lists `s3://b/step-10/...`.
        """
        with explained(uri, self.endpoint, "read"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=uri.bucket, Prefix=uri.prefix, PaginationConfig={"PageSize": self.limits.page}
            )
            found = [
                (S3Uri(uri.bucket, item["Key"]), item["Size"]) for page in pages for item in page.get("Contents", [])
            ]
        return sorted(pair for pair in found if not pair[0].key.endswith("/"))

    def exists(self, uri: S3Uri) -> bool:
        """Whether there is an object of exactly this name. A missing bucket is an error (InputMissing)."""
        with explained(uri, self.endpoint, "read"):
            # A listing tells a missing bucket from a missing object; HEAD answers 404 without a body for both.
            answer = self._client.list_objects_v2(Bucket=uri.bucket, Prefix=uri.key, MaxKeys=1)
        return any(item["Key"] == uri.key for item in answer.get("Contents", []))

    def delete(self, uri: S3Uri) -> None:
        """Delete one object; nothing happens where there is none."""
        with explained(uri, self.endpoint, "write"):
            self._client.delete_object(Bucket=uri.bucket, Key=uri.key)

    def delete_prefix(self, uri: S3Uri) -> int:
        """Delete a folder with all its objects. Returns their number. Refuses a whole bucket (InternalError)."""
        if not uri.key:
            raise InternalError(f"refusing to empty the whole bucket {uri.bucket!r}")
        keys = [child.key for child, _ in self.list(uri)]
        for start in range(0, len(keys), self.limits.page):
            batch = keys[start : start + self.limits.page]
            with explained(uri, self.endpoint, "write"):
                answer = self._client.delete_objects(
                    Bucket=uri.bucket, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
            if errors := answer.get("Errors"):
                raise Unavailable(
                    f"{len(errors)} objects of {uri} could not be deleted at {self.endpoint}; the first is"
                    f" {errors[0].get('Key')!r} ({errors[0].get('Code')})",
                    reason="ObjectStoreUnavailable",
                )
        return len(keys)

    def probe_write(self, uri: S3Uri) -> None:
        """Write, read and delete a small object below `uri`, so that a wrong set-up is found before hours of work."""
        probe = uri.child(f".probe-{uuid.uuid4().hex}")
        content = b"finetune"
        self.put_bytes(probe, content)
        try:
            if self.get_bytes(probe) != content:
                raise CorruptObject(f"{probe} does not read back at {self.endpoint} as it was written")
        finally:
            self.delete(probe)

    def put_tree(
        self, folder: Path, uri: S3Uri, manifest: Callable[[tuple[FileEntry, ...]], bytes], *, read_back: bool = False
    ) -> tree.UploadedTree:
        """Upload a folder, and last the `manifest.json` that makes it complete; see `tree.put_tree`."""
        return tree.put_tree(self, folder, uri, manifest, read_back=read_back)

    def put_files(self, folder: Path, uri: S3Uri) -> tuple[FileEntry, ...]:
        """Upload a folder without claiming that it is complete; see `tree.put_files`."""
        return tree.put_files(self, folder, uri)

    def put_manifest(self, uri: S3Uri, files: tuple[FileEntry, ...], data: bytes) -> str:
        """Complete a folder, once all its files are there; see `tree.put_manifest`."""
        return tree.put_manifest(self, uri, files, data)

    def get_tree(self, uri: S3Uri, files: tuple[FileEntry, ...], folder: Path) -> None:
        """Download and verify the files of a manifest; see `tree.get_tree`."""
        tree.get_tree(self, uri, files, folder)

    def read_back(self, uri: S3Uri, files: tuple[FileEntry, ...]) -> None:
        """Read all files of a manifest and compare their SHA-256; see `tree.read_back`."""
        tree.read_back(self, uri, files)

    def _reader(self, uri: S3Uri) -> ObjectReader:
        return ObjectReader(
            self._client,
            uri,
            self.endpoint,
            attempts=self.limits.attempts,
            backoff_seconds=self.limits.backoff_seconds,
        )

    def _consume(self, uri: S3Uri, file: BinaryIO | None, expect: FileEntry | None) -> None:
        """Read an object whole. Where nobody knows its SHA-256, as of somebody's model, none is computed: large files
        take a third longer with it. A CRC that the store has of such an object as a whole is compared by botocore, and
        here where it comes in parts."""
        digest, crc = hashlib.sha256(), None
        with self._reader(uri) as reader:
            if expect is not None and reader.size != expect.size_bytes:
                raise CorruptObject(f"{uri} has {reader.size} bytes, not the {expect.size_bytes} of its manifest")
            seen: parts.Seen | None = digest.update if expect is not None else None
            if file is not None and reader.size > parts.PART:
                # Of parts that were uploaded one by one it is a sum of sums, with their number behind.
                if seen is None and reader.crc32 is not None and "-" not in reader.crc32:
                    crc = _Crc32()
                    seen = crc.update
                parts.read_into(reader, file, parts=self.limits.parts, slots=self._slots, seen=seen)
            else:
                while chunk := reader.next(parts.CHUNK):
                    if seen is not None:
                        seen(chunk)
                    if file is not None:
                        file.write(chunk)
            if crc is not None and crc.text != reader.crc32:
                raise CorruptObject(f"{uri} at {self.endpoint} did not come as it is there: its CRC-32 is another")
        if expect is None:
            return
        if digest.hexdigest() != expect.sha256:
            raise CorruptObject(f"{uri} has SHA-256 {digest.hexdigest()}, not {expect.sha256} as its manifest says")


def _without_checksum_of_part(request: Any, **_: Any) -> None:
    # Some servers answer a range with the sum of the whole object, which botocore then finds wrong.
    if "Range" in request.headers and "x-amz-checksum-mode" in request.headers:
        del request.headers["x-amz-checksum-mode"]


class _Crc32:
    """As S3 tells it."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    @property
    def text(self) -> str:
        return base64.b64encode(self._value.to_bytes(4, "big")).decode()


class _Hashing:
    """A file that can only be read forwards, and hashes what is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha256.update(data)
        self.size += len(data)
        return data
