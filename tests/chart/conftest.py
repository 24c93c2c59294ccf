"""Helm, or the reason why the tests that need it are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane import BinariesMissing, find_helm
from tests.apiserver.conftest import apiserver_binaries, binaries
from tests.chart.helm import Helm

__all__ = ["apiserver_binaries", "binaries", "helm"]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Found, not built: a build takes minutes and belongs where its progress is seen."""
    try:
        program: Path = find_helm(may_build=False)
    except BinariesMissing as missing:
        pytest.skip(str(missing))
    return Helm(program, tmp_path_factory.mktemp("helm"))
