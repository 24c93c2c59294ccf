"""What changes, goes or fails while a job is being reconciled."""

from __future__ import annotations

import copy
from typing import Any

from finetune_operator import constants as c
from finetune_operator.errors import ClusterError
from tests.builders import REF
from tests.unit.core.fake_cluster import Fault
from tests.unit.core.world import Bench, Outcome

NEVER_ENDS = Outcome()


async def test_a_job_that_changes_meanwhile_is_looked_at_again_soon() -> None:
    bench = Bench([NEVER_ENDS])
    real = bench.cluster._patch

    def changed_meanwhile(*args: Any) -> None:
        bench.cluster.annotate("somebody", "else")
        real(*args)

    bench.cluster._patch = changed_meanwhile  # type: ignore[assignment,method-assign]
    assert await bench.reconciler.reconcile(REF) == 1.0
    assert bench.status == {}


async def test_a_job_whose_watch_stands_still_is_read_anew() -> None:
    bench = Bench([NEVER_ENDS])
    bench.cluster.stale_job = copy.deepcopy(bench.cluster.job())
    bench.cluster.annotate("somebody", "else")
    assert await bench.reconciler.reconcile(REF) == 1.0
    assert bench.status == {}
    await bench.reconciler.reconcile(REF)
    assert bench.status["attempts"]["current"] == 1


async def test_what_is_gone_is_not_deleted_again_and_again() -> None:
    """The store has a PyTorchJob whose deletion it was never told of."""
    bench = Bench([NEVER_ENDS], spec={"runPolicy": {"activeDeadlineSeconds": 60}})
    await bench.run(seconds=50)
    await bench.cluster.refresh(REF)
    bench.cluster.lags = True
    bench.cluster.remove(c.PYTORCHJOB_KIND, "qa-1")
    bench.cluster.remove("Pod", "qa-1-master-0")
    bench.clock.now += 60
    await bench.run(seconds=300)
    assert bench.phase == "Failed"
    assert bench.cluster.calls.count("delete PyTorchJob qa-1") == 1


async def test_a_job_that_goes_meanwhile_is_done() -> None:
    bench = Bench([NEVER_ENDS])
    real = bench.cluster._patch

    def gone_meanwhile(*args: Any) -> None:
        bench.cluster.remove(c.KIND, REF.name)
        real(*args)

    bench.cluster._patch = gone_meanwhile  # type: ignore[assignment,method-assign]
    assert await bench.reconciler.reconcile(REF) is None


async def test_nothing_is_created_from_a_spec_that_changed_while_it_was_prepared() -> None:
    bench = Bench()
    real = bench.reconciler._preparer.prepare

    async def slow(*args: Any) -> Any:
        prepared = await real(*args)
        bench.cluster.change_spec(suspend=True)
        return prepared

    bench.reconciler._preparer.prepare = slow  # type: ignore[assignment,method-assign]
    await bench.reconciler.reconcile(REF)
    assert bench.cluster.created == []


async def test_a_lost_event_is_no_error() -> None:
    bench = Bench([NEVER_ENDS])
    bench.cluster.faults = [Fault(3, ClusterError("no events today"), applied=False)]
    assert await bench.reconciler.reconcile(REF) is not None
    assert bench.cluster.calls == ["create ConfigMap qa-1", "create PyTorchJob qa-1", "patch", "emit"]
