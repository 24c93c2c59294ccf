"""An S3 server without a server: what `ObjectStore` asks of boto3's client, answered from a dictionary.

For tests of what is built on the store. The store itself is tested against a real server, and so are the tests in
`tests/unit/checkpoint` a second time, in `tests/local`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from copy import copy
from functools import cache
from typing import Any

from botocore.exceptions import ClientError

from finetune_trainer.contract.config import S3Config
from finetune_trainer.storage import ObjectStore, StoreLimits

BUCKET = "shared-by-tests"


class MemoryClient:
    """One bucket. `before` is called with each request's operation and key, and may raise."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.before: Callable[[str, str], object] = lambda operation, key: None

    def put_object(self, Bucket: str, Key: str, Body: bytes) -> None:
        self._begin("PutObject", Bucket, Key)
        self.objects[Key] = bytes(Body)

    def upload_fileobj(self, file: Any, bucket: str, key: str, Config: object) -> None:
        self._begin("PutObject", bucket, key)
        self.objects[key] = file.read()

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        self._begin("GetObject", Bucket, Key)
        if Key not in self.objects:
            raise failure("GetObject", "NoSuchKey", 404)
        content = self.objects[Key]
        return {"Body": io.BytesIO(content), "ETag": str(hash(content)), "ContentLength": len(content)}

    def list_objects_v2(self, Bucket: str, Prefix: str, MaxKeys: int | None = None) -> dict[str, Any]:
        self._begin("ListObjectsV2", Bucket, Prefix)
        keys = sorted(key for key in self.objects if key.startswith(Prefix))[:MaxKeys]
        return {"Contents": [{"Key": key, "Size": len(self.objects[key])} for key in keys]}

    def get_paginator(self, operation: str) -> MemoryClient:
        assert operation == "list_objects_v2"
        return self

    def paginate(self, Bucket: str, Prefix: str, PaginationConfig: object) -> Iterator[dict[str, Any]]:
        yield self.list_objects_v2(Bucket, Prefix)

    def delete_object(self, Bucket: str, Key: str) -> None:
        self._begin("DeleteObject", Bucket, Key)
        self.objects.pop(Key, None)

    def delete_objects(self, Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:
        for one in Delete["Objects"]:
            self.delete_object(Bucket, one["Key"])
        return {}

    def _begin(self, operation: str, bucket: str, key: str) -> None:
        self.before(operation, key)
        if bucket != BUCKET:
            raise failure(operation, "NoSuchBucket", 404)


def failure(operation: str, code: str, status: int) -> ClientError:
    """As boto3 raises it for an answer of the server."""
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, operation)


@cache
def _store() -> ObjectStore:
    """Making boto3's own client takes half a second, so it is made once."""
    return ObjectStore(S3Config(endpoint="http://127.0.0.1:9"), limits=StoreLimits(backoff_seconds=0))


def memory_store() -> tuple[ObjectStore, MemoryClient]:
    """A store of one empty bucket, `BUCKET`, and the client that holds its objects."""
    store, client = copy(_store()), MemoryClient()
    store._client = client  # type: ignore[assignment]
    return store, client
