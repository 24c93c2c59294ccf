"""What makes a job train again, and what does not, however often somebody syncs."""

from __future__ import annotations

import copy
import json

from finetune_operator import constants as c
from finetune_operator.constants import Phase
from tests.builders import UID
from tests.gitops.jobs import Job, manifest
from tests.unit.core.world import Bench

OTHER_UID = UID[:-1] + "2"


def made(bench: Bench) -> list[str]:
    return [name for name in bench.cluster.created if name.startswith(c.PYTORCHJOB_KIND)]


def from_git(job: Job, uid: str) -> Job:
    """The same manifest, created once more: no status, another UID."""
    again = copy.deepcopy(job)
    again.pop("status")
    again["metadata"].update(uid=uid, generation=1)
    return again


async def test_a_sync_of_an_unchanged_spec_never_does() -> None:
    bench = Bench()
    await bench.run()
    for _ in range(3):
        # An apply that changes nothing, or labels only, leaves UID, generation and status as they are.
        job = manifest(bench)
        job["metadata"]["labels"]["sync"] = str(bench.cluster.changes)
        bench.cluster.put(job)
        bench.restart()
        await bench.run()
    assert (bench.phase, made(bench)) == (Phase.SUCCEEDED, ["PyTorchJob qa-1"])


async def test_nor_does_one_after_the_children_were_deleted() -> None:
    bench = Bench(spec={"runPolicy": {"ttlSecondsAfterFinished": 60}})
    await bench.run()
    assert bench.cluster.find(c.PYTORCHJOB_KIND) == []
    bench.cluster.put(manifest(bench))
    await bench.run()
    assert (bench.phase, made(bench)) == (Phase.SUCCEEDED, ["PyTorchJob qa-1"])


async def test_nor_does_another_run_policy_of_a_finished_job() -> None:
    bench = Bench()
    await bench.run()
    bench.cluster.change_spec(retries=9, suspend=True)
    await bench.run()
    bench.cluster.change_spec(suspend=False)
    await bench.run()
    assert (bench.phase, bench.status["observedGeneration"], made(bench)) == (Phase.SUCCEEDED, 3, ["PyTorchJob qa-1"])


async def test_a_job_that_is_synced_again_asks_for_the_result_of_its_spec() -> None:
    """The trainer looks for it (tests/local/test_same_spec.py); that is all that a new job of an old spec does."""
    bench = Bench()
    await bench.run()
    job = manifest(bench)
    spec = json.loads(bench.cluster.objects["ConfigMap", "qa-1"]["data"]["config.json"])["job"]["specSha256"]
    for kind, name in list(bench.cluster.objects):
        bench.cluster.remove(kind, name)
    bench.cluster.put(from_git(job, OTHER_UID))
    await bench.run()
    assert (bench.phase, len(made(bench))) == (Phase.SUCCEEDED, 2)
    assert bench.status["attempts"]["current"] == 1
    config = bench.cluster.objects["ConfigMap", "qa-1"]["data"]["config.json"]
    assert json.loads(config)["job"]["specSha256"] == spec
    assert f'"{OTHER_UID}"' in config and UID not in config, "its results lie below runs/<uid>: the first ones stay"
