"""The one place that maps botocore's errors to the trainer's.

Messages name the endpoint, the bucket and the remedy. What the server said is repeated only where it cannot hold a
credential.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from boto3.exceptions import Boto3Error
from botocore import exceptions as b
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.errors import InputMissing, InternalError, PermissionDenied, TrainerError, Unavailable, UsageError
from finetune_trainer.storage.uri import S3Uri

Purpose = Literal["read", "write"]

_CREDENTIALS = (
    "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (in a cluster: the Secret that output.s3.secretRef names)"
)
_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId": "the access key is not known there",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "AuthorizationQueryParametersError": "the signature was refused",
    "InvalidToken": "the session token was refused",
    "InvalidSecurity": "the credentials were refused",
    "ExpiredToken": "the session token has expired",
    "ExpiredTokenException": "the session token has expired",
    "TokenRefreshRequired": "the session token has expired",
}
_BAD_REQUEST = frozenset(
    {"InvalidBucketName", "KeyTooLongError", "PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidURI"}
)
_BUSY = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestTimeout", "BadDigest", "IncompleteBody"})
_NO_CREDENTIALS = (
    b.NoCredentialsError,
    b.PartialCredentialsError,
    b.CredentialRetrievalError,
    b.ProfileNotFound,
    b.SSOError,
    b.TokenRetrievalError,
    b.NoAuthTokenError,
    b.LoginError,
)
# Failures of the wire: botocore has retried them by the time they come here.
_WIRE = (
    b.ConnectionError,
    b.HTTPClientError,
    b.IncompleteReadError,
    b.ChecksumError,
    b.FlexibleChecksumError,
    ResponseParserError,
    Urllib3Error,
    ConnectionError,
    TimeoutError,
)


BUCKET_MISSING = "BucketMissing"
"""Reason of the error that a whole bucket is not there."""


class CorruptObject(Unavailable):
    """An object's content is not what its manifest says."""

    default_reason = "CorruptObject"


@contextmanager
def explained(uri: S3Uri, endpoint: str, purpose: Purpose) -> Iterator[None]:
    """Raise every error of the object store as one of the trainer's."""
    try:
        yield
    except (
        b.BotoCoreError,
        b.ClientError,
        ResponseParserError,
        Boto3Error,
        Urllib3Error,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise explain(error, uri, endpoint, purpose) from error


def is_wire_failure(error: BaseException) -> bool:
    """Whether an error says that a transfer broke off, so that going on where it stopped may help."""
    return isinstance(error, _WIRE) and not isinstance(error, (b.ChecksumError, b.FlexibleChecksumError))


def explain(error: Exception, uri: S3Uri, endpoint: str, purpose: Purpose) -> TrainerError:
    """The trainer's form of an error that an operation on `uri` raised."""
    if isinstance(error, b.ClientError):
        return _refused(error, uri, endpoint, purpose)
    if isinstance(error, _NO_CREDENTIALS):
        return PermissionDenied(
            f"no usable credentials for {uri} at {endpoint}; {_CREDENTIALS}", reason="NoCredentials"
        )
    if isinstance(error, b.SSLError):
        return Unavailable(
            f"no trusted connection to the object store {endpoint} for {uri}: {error}; name the CA that signed its"
            " certificate in AWS_CA_BUNDLE",
            reason="ObjectStoreUntrusted",
        )
    if isinstance(error, _WIRE):
        return Unavailable(
            f"the object store {endpoint} did not serve {uri}, after several tries: {type(error).__name__}: {error};"
            " check that the endpoint is right and reachable from here",
            reason="ObjectStoreUnavailable",
        )
    if isinstance(error, (b.ParamValidationError, b.ValidationError, b.BaseEndpointResolverError)):
        return UsageError(f"{uri} cannot be used at {endpoint}: {error}", reason="InvalidURI")
    return InternalError(f"{uri} at {endpoint}: {type(error).__name__}: {error}", reason="ObjectStoreError")


def replaced(uri: S3Uri, endpoint: str) -> Unavailable:
    """The error that an object is another one than it was."""
    return Unavailable(f"{uri} at {endpoint} was replaced while it was read; run again", reason="ObjectChanged")


def _refused(error: b.ClientError, uri: S3Uri, endpoint: str, purpose: Purpose) -> TrainerError:
    answer = error.response.get("Error", {})
    code = str(answer.get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        kind = UsageError if purpose == "write" else InputMissing
        return kind(
            f"bucket {uri.bucket!r} does not exist at {endpoint} (needed for {uri}); create it, or correct the name or"
            " the endpoint",
            reason=BUCKET_MISSING,
        )
    if code in _WRONG_CREDENTIALS:
        return PermissionDenied(
            f"{endpoint} refused the credentials for {uri}: {_WRONG_CREDENTIALS[code]} ({code}); {_CREDENTIALS}",
            reason="CredentialsRefused",
        )
    if code == "RequestTimeTooSkewed":
        return PermissionDenied(f"{endpoint} refused {uri}: this machine's clock is wrong", reason="ClockSkew")
    if code in _BAD_REQUEST or status in (301, 307):
        return UsageError(
            f"{endpoint} refused {uri} ({code}): {answer.get('Message', '')}; check the bucket's name and"
            " output.s3.region",
            reason="InvalidURI",
        )
    if status in (401, 403):
        return PermissionDenied(
            f"the credentials may not {purpose} {uri} at {endpoint} ({code}); grant them the right to list, read,"
            " write and delete there",
            reason="AccessDenied",
        )
    if status == 404:
        return InputMissing(f"{uri} does not exist at {endpoint}; check its name", reason="ObjectMissing")
    if status >= 500 or status == 429 or code in _BUSY:
        return Unavailable(
            f"the object store {endpoint} failed on {uri}, after several tries: {code} (HTTP {status})",
            reason="ObjectStoreUnavailable",
        )
    if status == 412:
        return replaced(uri, endpoint)
    return InternalError(
        f"{endpoint} refused {error.operation_name} of {uri}: {code} (HTTP {status}): {answer.get('Message', '')}",
        reason="ObjectStoreError",
    )
