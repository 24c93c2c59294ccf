"""Objects in and out: local folders into buckets before a run, the verified result out of them after it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finetune_operator.api.v1alpha1 import FineTuneJob
from finetune_operator.errors import FinetuneError, RunError
from finetune_trainer.contract import FileEntry, ResultManifest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MANIFEST = "manifest.json"
_DIGEST = "sha256"
_MAX_MANIFEST_BYTES = 64 * 2**20
_CHUNK = 2**20


class StoreError(RunError):
    """The object store refused, did not answer, or holds something else than it should."""


@dataclass(frozen=True, slots=True)
class Seeding:
    """What was copied into buckets."""

    copied: int
    kept: int
    """Objects that were there already, with the same content."""
    size_bytes: int
    """Bytes copied."""


@dataclass(frozen=True, slots=True)
class Location:
    """`s3://bucket/key`."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Location:
        """The location that an s3:// URI names."""
        parts = urlsplit(uri)
        return cls(parts.netloc, parts.path.strip("/"))

    def file(self, path: str) -> str:
        """The key of a file below this prefix."""
        return f"{self.key}/{path}" if self.key else path


def named_buckets(job: FineTuneJob) -> tuple[str, ...]:
    """The buckets that a job reads from or writes to, each once."""
    sets = [job.spec.dataset, *(one.dataset for one in job.spec.adapters or () if one.dataset)]
    uris: list[str | None] = [job.spec.model.uri]
    for data in sets:
        uris += [data.uri, *(source.uri for source in data.sources or ())]
        uris.append(data.validation.uri if data.validation else None)
    uris.append(job.spec.output.uri)
    return tuple(dict.fromkeys(Location.parse(uri).bucket for uri in uris if uri and uri.startswith("s3://")))


def s3_client(endpoint: str | None, region: str | None, credentials: Mapping[str, str]) -> S3Client:
    """A client for an object store.

    Args:
        endpoint: its URL; AWS where there is none.
        region: its region.
        credentials: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN; this user's own where it is empty.

    Raises FinetuneError where boto3 is not installed.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise FinetuneError("boto3 is not installed; run: pip install 'finetune-operator[trainer,local]'") from error
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"max_attempts": 4, "mode": "standard"},
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id=credentials.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=credentials.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=credentials.get("AWS_SESSION_TOKEN"),
        config=config,
    )
    return client


def seed(client: S3Client, folder: Path, buckets: tuple[str, ...]) -> Seeding:
    """Copy `<folder>/<bucket>/...` into each of `buckets`; an object of the same content is left alone.
    Links are followed, also those to folders.

    Raises StoreError that names the object, FinetuneError for a link that leads back to a folder that it is in.
    """
    copied = kept = size = 0
    for bucket in buckets:
        for path, key in _files(folder / bucket):
            digest = _sha256(path)
            if _same(client, bucket, key, path.stat().st_size, digest):
                kept += 1
                continue
            with _explained(f"s3://{bucket}/{key}"):
                client.upload_file(str(path), bucket, key, ExtraArgs={"Metadata": {_DIGEST: digest}})
            copied += 1
            size += path.stat().st_size
    return Seeding(copied, kept, size)


def download_result(client: S3Client, uri: str, manifest_sha256: str | None, target: Path) -> ResultManifest:
    """Download a run's manifest and every file that it lists; `target` appears when all of them are verified.

    Args:
        client: of the store that `uri` is in.
        uri: where `manifest.json` lies.
        manifest_sha256: what the job's status says of it.
        target: folder; one of an earlier download is replaced.

    Raises StoreError for a file that is missing or is not what the manifest says, or that cannot be written here.
    """
    location = Location.parse(uri)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _explained(f"{uri}/{MANIFEST}"):
        answer = client.get_object(Bucket=location.bucket, Key=location.file(MANIFEST))
        text = answer["Body"].read(_MAX_MANIFEST_BYTES)
    found = hashlib.sha256(text).hexdigest()
    if manifest_sha256 is not None and found != manifest_sha256:
        raise StoreError(f"{uri}/{MANIFEST} has SHA-256 {found}, but the job's status says {manifest_sha256}")
    try:
        manifest = ResultManifest.model_validate_json(text)
    except ValueError as error:
        raise StoreError(f"{uri}/{MANIFEST} is no result manifest: {error}") from error
    with _writing(partial):
        for entry in manifest.files:
            _download(client, location, entry, partial / entry.path)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).write_bytes(text)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    return manifest


def _download(client: S3Client, location: Location, entry: FileEntry, path: Path) -> None:
    uri = f"s3://{location.bucket}/{location.file(entry.path)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _explained(uri):
        client.download_file(location.bucket, location.file(entry.path), str(path))
    size, digest = path.stat().st_size, _sha256(path)
    if (size, digest) != (entry.size_bytes, entry.sha256):
        raise StoreError(
            f"{uri} has {size} bytes and SHA-256 {digest}, but its manifest says {entry.size_bytes} and {entry.sha256}"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what this machine's disk refuses into StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; free the disk and run again: what is "
            "in S3 stays"
        ) from error


class _explained:
    """Turn what boto3 raises about one object into StoreError."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, BotoCoreError | ClientError | Boto3Error):
            raise StoreError(f"{self._uri}: {error}") from error
        if isinstance(error, OSError):
            raise StoreError(f"{self._uri}: {error.strerror or error}") from error


def _same(client: S3Client, bucket: str, key: str, size: int, digest: str) -> bool:
    from botocore.exceptions import ClientError

    with _explained(f"s3://{bucket}/{key}"):
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return False
            raise
    return head["ContentLength"] == size and head["Metadata"].get(_DIGEST) == digest


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, key) for every file below a folder, by key; links are followed."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        for name in folders:
            _refuse_circle(Path(parent, name))
        found += [path for name in names if (path := Path(parent, name)).is_file()]
    for path in sorted(found):
        yield path, path.relative_to(folder).as_posix()


def _refuse_circle(folder: Path) -> None:
    """Raise FinetuneError for a link to a folder that the link itself is in: following it would never end."""
    if folder.is_symlink() and any(folder.samefile(parent) for parent in folder.absolute().parents):
        raise FinetuneError(
            f"{folder}: this link to {folder.readlink()} leads back to a folder that it is in; remove the link"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
