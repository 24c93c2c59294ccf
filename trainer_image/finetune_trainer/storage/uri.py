"""Names of objects."""

from __future__ import annotations

import re
from dataclasses import dataclass

from finetune_trainer.errors import UsageError

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MAX_KEY_BYTES = 1024


@dataclass(frozen=True, order=True)
class S3Uri:
    """`s3://bucket/key`: an object, or the folder of all objects below `key/`. The key has no slash at its ends."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, text: str) -> S3Uri:
        """Read `s3://bucket/key`. Raises UsageError that says which part is wrong."""
        scheme, separator, rest = text.partition("://")
        if scheme != "s3" or not separator:
            raise UsageError(f"{text!r} is not an S3 address; write it as s3://bucket/path", reason="InvalidURI")
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(
                f"{text!r}: {bucket!r} is no bucket name; it has 3 to 63 lower-case letters, digits, dots and dashes",
                reason="InvalidURI",
            )
        key = key.strip("/")
        if key and any(part in ("", ".", "..") for part in key.split("/")):
            raise UsageError(f"{text!r}: the path may not have empty, '.' or '..' parts", reason="InvalidURI")
        if len(key.encode()) > _MAX_KEY_BYTES:
            raise UsageError(f"{text!r}: the path is longer than {_MAX_KEY_BYTES} bytes", reason="InvalidURI")
        return cls(bucket, key)

    def child(self, *names: str) -> S3Uri:
        """The object or folder below this one."""
        parts = [self.key, *(name.strip("/") for name in names)]
        return S3Uri(self.bucket, "/".join(part for part in parts if part))

    @property
    def prefix(self) -> str:
        """What the keys of all objects in this folder begin with."""
        return f"{self.key}/" if self.key else ""

    def relative(self, other: S3Uri) -> str:
        """The path of an object of this folder, relative to it."""
        return other.key.removeprefix(self.prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}" if self.key else f"s3://{self.bucket}"
