"""Names of objects, and what each error of an S3 server means."""

from __future__ import annotations

from typing import Any

import pytest
from botocore import exceptions as b
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.errors import (
    InputMissing,
    InternalError,
    PermissionDenied,
    TrainerError,
    Unavailable,
    UsageError,
)
from finetune_trainer.storage import S3Uri
from finetune_trainer.storage.failures import Purpose, explain

URI = S3Uri("models", "team/run")
ENDPOINT = "https://s3.example.org"


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://models/team/run", "models", "team/run"),
        ("s3://models/team/run/", "models", "team/run"),
        ("s3://models", "models", ""),
        ("s3://models/", "models", ""),
        ("s3://my.bucket-1/ä b.json", "my.bucket-1", "ä b.json"),
    ],
)
def test_parse(text: str, bucket: str, key: str) -> None:
    assert S3Uri.parse(text) == S3Uri(bucket, key)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not an S3 address"),
        ("models/run", "not an S3 address"),
        ("https://models/run", "not an S3 address"),
        ("s3:models/run", "not an S3 address"),
        ("s3://", "no bucket name"),
        ("s3://Models/run", "no bucket name"),
        ("s3://ab/run", "no bucket name"),
        ("s3://models\n/run", "no bucket name"),
        ("s3://models/a/../b", "'..'"),
        ("s3://models/a//b", "empty"),
        ("s3://models/" + "x" * 1025, "longer than 1024"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        S3Uri.parse(text)
    assert says in caught.value.message
    assert repr(text) in caught.value.message


@given(st.lists(st.text("abc-_.0", min_size=1, max_size=5).filter(lambda t: t.strip(".")), max_size=4))
def test_an_address_reads_back(parts: list[str]) -> None:
    uri = S3Uri("bucket", "/".join(parts))
    assert S3Uri.parse(str(uri)) == uri
    assert uri.relative(uri.child("x", "y/z")) == "x/y/z"


def refused(code: str, status: int, message: str = "what the server says") -> b.ClientError:
    response: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return b.ClientError(response, "PutObject")


@pytest.mark.parametrize(
    ("error", "purpose", "kind", "reason"),
    [
        (refused("NoSuchBucket", 404), "write", UsageError, "BucketMissing"),
        (refused("NoSuchBucket", 404), "read", InputMissing, "BucketMissing"),
        (refused("NoSuchKey", 404), "read", InputMissing, "ObjectMissing"),
        (refused("404", 404), "read", InputMissing, "ObjectMissing"),
        (refused("InvalidAccessKeyId", 403), "write", PermissionDenied, "CredentialsRefused"),
        (refused("SignatureDoesNotMatch", 403), "write", PermissionDenied, "CredentialsRefused"),
        (refused("ExpiredToken", 400), "write", PermissionDenied, "CredentialsRefused"),
        (refused("RequestTimeTooSkewed", 403), "write", PermissionDenied, "ClockSkew"),
        (refused("AccessDenied", 403), "write", PermissionDenied, "AccessDenied"),
        (refused("403", 403), "read", PermissionDenied, "AccessDenied"),
        (refused("PermanentRedirect", 301), "read", UsageError, "InvalidURI"),
        (refused("SlowDown", 503), "write", Unavailable, "ObjectStoreUnavailable"),
        (refused("InternalError", 500), "write", Unavailable, "ObjectStoreUnavailable"),
        (refused("TooManyRequests", 429), "write", Unavailable, "ObjectStoreUnavailable"),
        (refused("PreconditionFailed", 412), "read", Unavailable, "ObjectChanged"),
        (refused("InvalidArgument", 400), "write", InternalError, "ObjectStoreError"),
        (b.NoCredentialsError(), "write", PermissionDenied, "NoCredentials"),
        (b.PartialCredentialsError(provider="env", cred_var="x"), "write", PermissionDenied, "NoCredentials"),
        (
            b.SSLError(endpoint_url=ENDPOINT, error=ValueError("self-signed")),
            "write",
            Unavailable,
            "ObjectStoreUntrusted",
        ),
        (b.EndpointConnectionError(endpoint_url=ENDPOINT), "write", Unavailable, "ObjectStoreUnavailable"),
        (b.ConnectTimeoutError(endpoint_url=ENDPOINT), "write", Unavailable, "ObjectStoreUnavailable"),
        (b.ReadTimeoutError(endpoint_url=ENDPOINT), "read", Unavailable, "ObjectStoreUnavailable"),
        (ConnectionResetError("reset"), "read", Unavailable, "ObjectStoreUnavailable"),
        (b.ParamValidationError(report="bucket"), "write", UsageError, "InvalidURI"),
    ],
)
def test_every_error_has_one_meaning(error: Exception, purpose: Purpose, kind: type[TrainerError], reason: str) -> None:
    found = explain(error, URI, ENDPOINT, purpose)
    assert type(found) is kind
    assert found.reason == reason
    assert ENDPOINT in found.message


def test_what_a_server_says_of_credentials_is_not_repeated() -> None:
    for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"):
        found = explain(refused(code, 403, "key AKIASECRET was refused"), URI, ENDPOINT, "write")
        assert "AKIASECRET" not in found.message
