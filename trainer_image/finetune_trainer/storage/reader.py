"""Reading one object as a stream that survives broken connections."""

from __future__ import annotations

import contextlib
import io
import random
import time
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.errors import Unavailable
from finetune_trainer.storage.failures import explain, explained, is_wire_failure, replaced
from finetune_trainer.storage.uri import S3Uri

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef


class RangesIgnored(Unavailable):
    """A store that answers a request for a part of an object with the whole of it."""

    default_reason = "ObjectStoreUnavailable"


class ObjectReader(io.RawIOBase):
    """The content of one object, or of a part of it, in order. After a failure of the wire it goes on where it was.

    The entity tag of the first answer is asked for again each time, so an object that is replaced meanwhile is an
    error, never a mixture of two.
    """

    def __init__(
        self,
        client: S3Client,
        uri: S3Uri,
        endpoint: str,
        *,
        attempts: int,
        backoff_seconds: float,
        part: tuple[int, int, str] | None = None,
    ) -> None:
        """
        Args:
            part: where it begins and ends, and the object's entity tag; None: the whole object.
        """
        super().__init__()
        self._client = client
        self._uri = uri
        self._endpoint = endpoint
        self._attempts = attempts
        self._backoff = backoff_seconds
        self._etag: str | None
        self._position, self._end, self._etag = part or (0, 0, None)
        self._is_part = part is not None
        self._body: Any = None
        self.crc32: str | None = None
        """Of the whole object, in base 64, where the store has told it."""
        with explained(uri, endpoint, "read"):
            self._resume(failures=0)

    @property
    def size(self) -> int:
        """Bytes of the whole object."""
        assert not self._is_part, "a part does not know"
        return self._end

    def pause(self) -> None:
        """Give the connection up; the next bytes come by another one."""
        self._drop()

    def part(self, start: int, end: int) -> ObjectReader:
        """Bytes `start` to `end` (excluded) of the object, by a connection of their own."""
        assert self._etag is not None, "the first answer has one"
        return ObjectReader(
            self._client,
            self._uri,
            self._endpoint,
            attempts=self._attempts,
            backoff_seconds=self._backoff,
            part=(start, end, self._etag),
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def next(self, size: int) -> bytes:
        """The next bytes, `size` or fewer; none at the end."""
        failures = 0
        while self._position < self._end:
            if self._body is None:
                # botocore has tried this request several times when it fails: that is final.
                with explained(self._uri, self._endpoint, "read"):
                    self._resume(failures)
            try:
                data: bytes = self._body.read(min(size, self._end - self._position))
                if not data:
                    raise ConnectionError(f"the answer ended at byte {self._position} of {self._end}")
                if self._position + len(data) == self._end:
                    # botocore compares sums where it is asked for more than there is.
                    self._body.read(1)
            except (BotoCoreError, Urllib3Error, ConnectionError, TimeoutError) as error:
                self._drop()
                failures += 1
                if failures >= self._attempts or not is_wire_failure(error):
                    raise explain(error, self._uri, self._endpoint, "read") from error
                continue
            self._position += len(data)
            return data
        return b""

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
        if self._position or self._is_part:
            request["Range"] = f"bytes={self._position}-{self._end - 1}"
        answer = self._client.get_object(**request)
        self._body = answer["Body"]
        if self._etag is None:
            self._etag, self._end = answer["ETag"], answer["ContentLength"]
            self.crc32 = answer.get("ChecksumCRC32")
        else:
            self._check("Range" in request, answer)

    def _check(self, ranged: bool, answer: Any) -> None:
        """Whether a later answer goes on with the first: not every store heeds what it is asked for."""
        if answer.get("ETag", self._etag) != self._etag:
            self._drop()
            raise replaced(self._uri, self._endpoint)
        if ranged and not answer.get("ContentRange", "").startswith(f"bytes {self._position}-"):
            self._drop()
            raise RangesIgnored(
                f"{self._endpoint} answers a request for a part of {self._uri} with something else"
                f" ({answer.get('ContentRange') or 'the whole object'}); use an object store that reads ranges"
            )

    def _drop(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            # The connection is of no further use: what closing it says does not matter.
            with contextlib.suppress(OSError, Urllib3Error):
                body.close()
