"""A real S3 server for tests: SeaweedFS, one per test session (and pytest-xdist worker), a new bucket per test.

Import the fixtures that a test folder needs into its `conftest.py`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.contract.config import S3Config
from finetune_trainer.errors import InputMissing
from finetune_trainer.storage import ObjectStore, S3Uri, StoreLimits

QUICK = StoreLimits(attempts=2, connect_seconds=1, read_seconds=2, backoff_seconds=0.01)
"""Limits with which a fault is over within seconds."""


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """The server. `seaweed.endpoint` and `seaweed.credentials_env()` are all that a client needs."""
    server = SeaweedServer(
        tmp_path_factory.mktemp("seaweed"), access_key=secrets.token_hex(10), secret_key=secrets.token_hex(20)
    )
    with server:
        yield server


@pytest.fixture
def s3_environment(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server's credentials, also set in this process's environment."""
    return set_credentials(seaweed, monkeypatch)


@pytest.fixture
def bucket(seaweed: SeaweedServer) -> str:
    """The name of a new, empty bucket."""
    name = f"test-{secrets.token_hex(6)}"
    seaweed.create_bucket(name)
    return name


def connect(seaweed: SeaweedServer, endpoint: str | None = None, limits: StoreLimits = QUICK) -> ObjectStore:
    """A client of the server with its credentials, at another endpoint where there is something in between."""
    with pytest.MonkeyPatch.context() as environment:
        set_credentials(seaweed, environment)
        store = ObjectStore(S3Config(endpoint=endpoint or seaweed.endpoint), limits=limits)
        # The credentials are read from the environment by the first request that is signed.
        with contextlib.suppress(InputMissing):
            store.list(S3Uri("no-such-bucket", ""))
    return store


def set_credentials(seaweed: SeaweedServer, environment: pytest.MonkeyPatch) -> dict[str, str]:
    """Set the server's credentials, and nothing else that boto3 would heed. Returns them."""
    variables = seaweed.credentials_env()
    for name, value in variables.items():
        environment.setenv(name, value)
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        environment.delenv(name, raising=False)
    return variables


@pytest.fixture(scope="session")
def store(seaweed: SeaweedServer) -> ObjectStore:
    """The trainer's client of the server."""
    return connect(seaweed)


@pytest.fixture(scope="session")
def shared_bucket(seaweed: SeaweedServer) -> str:
    """The name of a bucket in which tests keep to folders of their own."""
    seaweed.create_bucket("shared-by-tests")
    return "shared-by-tests"


@pytest.fixture
def folder_uri(shared_bucket: str) -> S3Uri:
    """A new, empty folder."""
    return S3Uri(shared_bucket, f"{secrets.token_hex(6)}/run")
