"""Reads a model's `config.json` from where this machine has it: a folder, a mirror of the hub, a claim, a bucket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import ModelConfigUnavailable
from finetune_operator.local.buckets import Location
from finetune_operator.local.prepare import local_path
from finetune_operator.observed import JobRef
from finetune_operator.planning import ModelConfigReader

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONFIG = "config.json"
_MAX_BYTES = 4 * 2**20


class LocalConfigReader:
    """Implements `planning.ModelConfigReader`."""

    def __init__(
        self,
        elsewhere: ModelConfigReader,
        *,
        mirror: Path | None = None,
        claims: Path | None = None,
        s3: Callable[[], S3Client] | None = None,
    ) -> None:
        """
        Args:
            elsewhere: asked for models that this machine does not have.
            mirror: folder with `<organisation>/<name>` folders for hf:// models.
            claims: folder with one folder for each PersistentVolumeClaim.
            s3: makes a client for the job's object store.
        """
        self._elsewhere = elsewhere
        self._mirror = mirror
        self._claims = claims
        self._s3 = s3

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        """The content of `config.json`. Raises ModelConfigUnavailable when it cannot be read from here."""
        uri = spec.model.uri
        folder = self._folder(uri)
        if folder is not None:
            return await asyncio.to_thread(_from_folder, uri, folder)
        if uri.startswith("s3://") and self._s3 is not None:
            return await asyncio.to_thread(self._from_bucket, uri)
        return await self._elsewhere(ref, spec)

    def _folder(self, uri: str) -> Path | None:
        """The model's folder on this machine; None when it is not here."""
        scheme, _, rest = uri.partition("://")
        if uri.startswith("file:"):
            return local_path(uri)
        if scheme == "pvc" and self._claims is not None:
            return self._claims / rest
        mirrored = self._mirror / rest if scheme == "hf" and self._mirror is not None else None
        return mirrored if mirrored is not None and mirrored.is_dir() else None

    def _from_bucket(self, uri: str) -> Mapping[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError

        assert self._s3 is not None
        location = Location.parse(uri)
        client = self._s3()
        try:
            answer = client.get_object(Bucket=location.bucket, Key=location.file(CONFIG))
            return _parsed(f"{uri}/{CONFIG}", answer["Body"].read(_MAX_BYTES))
        except (BotoCoreError, ClientError) as error:
            raise ModelConfigUnavailable(f"spec.model.uri: {uri}/{CONFIG}: {error}") from error
        finally:
            client.close()


def _from_folder(uri: str, folder: Path) -> Mapping[str, Any]:
    try:
        with (folder / CONFIG).open("rb") as stream:
            return _parsed(str(folder / CONFIG), stream.read(_MAX_BYTES))
    except OSError as error:
        raise ModelConfigUnavailable(f"spec.model.uri: {uri}: {folder / CONFIG}: {error.strerror}") from error


def _parsed(where: str, text: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelConfigUnavailable(f"spec.model.uri: {where} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelConfigUnavailable(f"spec.model.uri: {where} is not a JSON object")
    return document
