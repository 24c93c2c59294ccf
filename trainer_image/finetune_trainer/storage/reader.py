"""Reading one object as a stream that survives broken connections."""

from __future__ import annotations

import contextlib
import io
import random
import time
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.storage.failures import explain, explained, is_wire_failure
from finetune_trainer.storage.uri import S3Uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef


class ObjectReader(io.RawIOBase):
    """The content of one object, in order. After a failure of the wire it goes on where it was.

    The entity tag of the first answer is asked for again each time, so an object that is replaced meanwhile is an
    error, never a mixture of two.
    """

    def __init__(self, client: S3Client, uri: S3Uri, endpoint: str, *, attempts: int, backoff_seconds: float) -> None:
        super().__init__()
        self._client = client
        self._uri = uri
        self._endpoint = endpoint
        self._attempts = attempts
        self._backoff = backoff_seconds
        self._position = 0
        self._etag: str | None = None
        self._body: Any = None
        self.size = 0
        """Bytes of the whole object."""
        with explained(uri, endpoint, "read"):
            self._resume(failures=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def next(self, size: int) -> bytes:
        """The next bytes, `size` or fewer; none at the end."""
        failures = 0
        while True:
            if self._body is None:
                if self._position >= self.size:
                    return b""
                # botocore has tried this request several times when it fails: that is final.
                with explained(self._uri, self._endpoint, "read"):
                    self._resume(failures)
            try:
                data: bytes = self._body.read(size)
            except (BotoCoreError, Urllib3Error, ConnectionError, TimeoutError) as error:
                self._drop()
                failures += 1
                if failures >= self._attempts or not is_wire_failure(error):
                    raise explain(error, self._uri, self._endpoint, "read") from error
                continue
            self._position += len(data)
            return data

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()

    def _resume(self, failures: int) -> None:
        if failures:
            time.sleep(self._backoff * 2 ** (failures - 1) * random.uniform(0.5, 1.0))  # nosec B311  # no secret
        request: GetObjectRequestTypeDef = {"Bucket": self._uri.bucket, "Key": self._uri.key}
        if self._etag is not None:
            request["IfMatch"] = self._etag
        if self._position:
            request["Range"] = f"bytes={self._position}-"
        answer = self._client.get_object(**request)
        self._body = answer["Body"]
        if self._etag is None:
            self._etag, self.size = answer["ETag"], answer["ContentLength"]

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            # The connection is of no further use: what closing it says does not matter.
            with contextlib.suppress(OSError, Urllib3Error):
                body.close()
