"""The programs of a control plane, or the reason why the tests of this folder are skipped."""

from __future__ import annotations

import pytest

from controlplane import APISERVER, ETCD, Binaries, BinariesMissing, find_binaries, needed


def find_or_skip(programs: frozenset[str]) -> Binaries:
    """Found, not built: a build takes minutes and belongs where its progress is seen."""
    try:
        return find_binaries(programs, may_build=False)
    except BinariesMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def apiserver_binaries() -> Binaries:
    """etcd and the API server."""
    return find_or_skip(frozenset({ETCD, APISERVER}))


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """These, the controller manager and the training operator."""
    return find_or_skip(needed(controller_manager=True, training_operator=True))
