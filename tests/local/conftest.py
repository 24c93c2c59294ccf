"""Fixtures of the tests that run servers and processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.storage import ObjectStore
from tests.fault_proxy import FaultProxy
from tests.local.pod import Pod
from tests.s3 import bucket, connect, folder_uri, s3_environment, seaweed, shared_bucket, store

__all__ = ["bucket", "folder_uri", "s3_environment", "seaweed", "shared_bucket", "store"]


@pytest.fixture(scope="session")
def session_proxy(seaweed: SeaweedServer) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def session_faulty(seaweed: SeaweedServer, session_proxy: FaultProxy) -> ObjectStore:
    return connect(seaweed, session_proxy.endpoint)


@pytest.fixture
def proxy(session_proxy: FaultProxy) -> FaultProxy:
    """Stands before the server, and breaks nothing yet."""
    session_proxy.reset()
    return session_proxy


@pytest.fixture
def faulty(proxy: FaultProxy, session_faulty: ObjectStore) -> ObjectStore:
    """A client whose requests pass through `proxy`."""
    return session_faulty


@pytest.fixture(scope="session")
def pod(seaweed: SeaweedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """Runs of several processes, with the server's credentials."""
    pod = Pod(tmp_path_factory.mktemp("pod"), seaweed.credentials_env())
    try:
        yield pod
    finally:
        pod.close()
