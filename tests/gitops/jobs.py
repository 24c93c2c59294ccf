"""Jobs in every state that a GitOps tool may find them in, as the operator itself brought them there."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

from finetune_operator import constants as c
from finetune_operator.errors import KindUnknown, PlanningError
from finetune_operator.observed import ProgressReport
from finetune_operator.settings import Settings, TrainerDefaults
from finetune_operator.times import rfc3339
from tests.builders import NOW, REF
from tests.unit.core.world import SUCCESS, Bench, Outcome, Planner

REPORTING = Settings(trainer=TrainerDefaults(progress_url="http://progress"))
NEVER_ENDS = Outcome()
UNLUCKY = Outcome((70,))
USER_ERROR = Outcome((65,))

Job = dict[str, Any]


def manifest(bench: Bench) -> Job:
    """The job as the API server has it."""
    return copy.deepcopy(bench.cluster.job())


async def new() -> Bench:
    """Nobody has looked at it yet."""
    return Bench()


async def pending() -> Bench:
    bench = Bench()
    bench.cluster.refusals[c.PYTORCHJOB_KIND] = [KindUnknown("no matches for kind", status=404)] * 9
    await bench.run(seconds=40)
    return bench


async def queued() -> Bench:
    bench = Bench(spec={"scheduling": {"queue": "gpus"}})
    await bench.run(seconds=30)
    return bench


async def starting() -> Bench:
    bench = Bench([NEVER_ENDS])
    await bench.run(seconds=2)
    return bench


async def running() -> Bench:
    bench = Bench([NEVER_ENDS], settings=REPORTING)
    await bench.run(seconds=20)
    metrics = {"step": 40.0, "total_steps": 100.0, "epoch": 0.4, "loss": 1.25, "tokens_per_second": 5120.0}
    bench.cluster.report = ProgressReport(NOW + 20, attempt=1, percent=40, remaining_seconds=30, metrics=metrics)
    bench.cluster.put(bench.cluster.job())
    await bench.run(seconds=20)
    return bench


async def outdated() -> Bench:
    """Its spec was changed a moment ago."""
    bench = await running()
    bench.cluster.change_spec(retries=5)
    return bench


async def deleting() -> Bench:
    bench = await running()
    bench.cluster.job()["metadata"]["deletionTimestamp"] = rfc3339(bench.clock.now)
    return bench


async def restarting() -> Bench:
    bench = Bench([UNLUCKY, SUCCESS])
    await bench.run(seconds=10)
    return bench


async def stopping() -> Bench:
    """Suspended, and its pods still save a checkpoint."""
    bench = await running()
    bench.cluster.change_spec(suspend=True)
    bench.world.step = lambda: False  # type: ignore[method-assign]
    await bench.run(seconds=5)
    return bench


async def suspended() -> Bench:
    bench = await running()
    bench.cluster.change_spec(suspend=True)
    await bench.run(seconds=60)
    return bench


async def created_suspended() -> Bench:
    bench = Bench(spec={"runPolicy": {"suspend": True}})
    await bench.run()
    return bench


async def succeeded() -> Bench:
    bench = Bench()
    await bench.run()
    return bench


async def failed() -> Bench:
    bench = Bench([USER_ERROR, SUCCESS])
    await bench.run()
    return bench


async def retry_asked() -> Bench:
    """Failed, and the operator has yet to see that one more try is wanted."""
    bench = await failed()
    bench.cluster.annotate(c.ANNOTATION_RETRY, bench.status["completionTime"])
    return bench


async def retried() -> Bench:
    """One more try was asked for, and it has yet to be planned."""
    bench = await does_not_fit()
    bench.cluster.annotate(c.ANNOTATION_RETRY, "more GPUs")
    await bench.reconciler.reconcile(REF)
    return bench


async def retries_exhausted() -> Bench:
    bench = Bench([UNLUCKY] * 2, spec={"runPolicy": {"retries": 1}})
    await bench.run()
    return bench


async def no_reports() -> Bench:
    bench = Bench([NEVER_ENDS], settings=REPORTING, spec={"runPolicy": {"stallSeconds": 100}})
    await bench.run(seconds=200)
    return bench


async def stalled() -> Bench:
    bench = Bench([NEVER_ENDS], settings=REPORTING, spec={"runPolicy": {"stallSeconds": 100, "retries": 0}})
    await bench.run(seconds=2)
    bench.cluster.report = ProgressReport(NOW + 2, attempt=1, percent=0)
    await bench.run()
    return bench


async def deadline() -> Bench:
    bench = Bench([NEVER_ENDS], spec={"runPolicy": {"activeDeadlineSeconds": 600}})
    await bench.run()
    return bench


async def refused() -> Bench:
    bench = Bench(spec={"method": "freeze", "layers": {"last": 1}, "lora": {"rank": 8}})
    await bench.run()
    return bench


async def does_not_fit() -> Bench:
    bench = Bench(planner=Planner(PlanningError("needs 90 GiB of 80; 2 GPUs would do")))
    await bench.run()
    return bench


async def not_permitted() -> Bench:
    bench = Bench(spec={"model": {"trustRemoteCode": True}})
    await bench.run()
    return bench


_MAKERS: tuple[Callable[[], Awaitable[Bench]], ...] = (
    new,
    pending,
    queued,
    starting,
    running,
    outdated,
    deleting,
    restarting,
    stopping,
    suspended,
    created_suspended,
    succeeded,
    failed,
    retry_asked,
    retried,
    retries_exhausted,
    no_reports,
    stalled,
    deadline,
    refused,
    does_not_fit,
    not_permitted,
)
JOBS: dict[str, Callable[[], Awaitable[Bench]]] = {make.__name__.replace("_", "-"): make for make in _MAKERS}
"""Each by the name of its file in testdata."""
