"""An operator that asks for a restart gets one; one that ends otherwise is a failure of the demo."""

from __future__ import annotations

from functools import partial
from typing import cast

import pytest

from controlplane import StartFailed
from demo_cluster import deployment
from demo_cluster.deployment import OperatorDeployment
from demo_cluster.operator_process import OperatorProcess
from tests import waiting


class Process:
    """Ends with the next of some codes at each start; runs where there is none left."""

    def __init__(self, *codes: int) -> None:
        self._codes = iter(codes)
        self.exit_code: int | None = 0
        self.starts = 0
        self.stopped = 0

    def start(self) -> None:
        self.launch()
        if self.exit_code == 2:
            raise StartFailed("wrong settings")

    def launch(self) -> None:
        self.starts += 1
        self.exit_code = next(self._codes, None)

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(deployment, "_PAUSE_SECONDS", 0.01)


def keeping(process: Process) -> OperatorDeployment:
    return OperatorDeployment(cast(OperatorProcess, process))


eventually = partial(waiting.eventually, seconds=30.0)


def test_it_is_started_anew_where_it_asks_for_that() -> None:
    process = Process(1, 1)
    kept = keeping(process)
    kept.start()
    eventually(lambda: kept.restarts == 2 and process.exit_code is None)
    assert kept.failure is None
    kept.stop()
    assert (process.starts, process.stopped) == (3, 1)


@pytest.mark.parametrize("code", [0, 2, -11])
def test_any_other_end_is_a_failure(code: int) -> None:
    process = Process(1, code)
    kept = keeping(process)
    kept.start()
    eventually(lambda: kept.failure == code)
    assert process.starts == 2
    kept.stop()


def test_one_that_never_became_ready_is_told_at_once() -> None:
    process = Process(2)
    kept = keeping(process)
    with pytest.raises(StartFailed, match="wrong settings"):
        kept.start()
    kept.stop()
    assert process.starts == 1
