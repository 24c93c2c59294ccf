"""Whole lives of jobs, against a cluster in memory."""

from __future__ import annotations

from itertools import pairwise

import pytest

from finetune_operator import constants as c
from finetune_operator.constants import Reason
from finetune_operator.observed import ProgressReport
from finetune_operator.settings import Settings, TrainerDefaults
from tests.builders import REF, UID
from tests.unit.core.world import SUCCESS, Bench, Outcome

NEVER_ENDS = Outcome()
REPORTING = Settings(trainer=TrainerDefaults(progress_url="http://progress"))


async def test_a_job_from_nothing_to_its_result() -> None:
    bench = Bench()
    await bench.run()
    assert bench.phase == "Succeeded"
    assert bench.cluster.created == ["ConfigMap qa-1", "PyTorchJob qa-1"]
    assert bench.status["result"]["manifestSha256"] == "ab" * 32
    assert bench.status["observedGeneration"] == 1
    assert bench.status["plan"]["microBatchSize"] == 8
    assert "completionTime" in bench.status and "startTime" in bench.status
    phases = [one["phase"] for one in bench.cluster.statuses]
    assert phases == ["Pending", "Starting", "Running", "Succeeded"], "one patch for each change of state"
    assert {one["type"]: one["status"] for one in bench.status["conditions"]} == {
        "Accepted": "True",
        "Planned": "True",
        "Running": "False",
        "Succeeded": "True",
        "Failed": "False",
        "Suspended": "False",
        "Reconciling": "False",
        "Stalled": "False",
    }
    assert (bench.planner.asked, bench.failures) == (1, [])


async def test_children_belong_to_the_job_and_to_nobody_else() -> None:
    bench = Bench([NEVER_ENDS])
    await bench.run(seconds=60)
    for kind in ("ConfigMap", c.PYTORCHJOB_KIND):
        meta = bench.cluster.objects[kind, "qa-1"]["metadata"]
        assert meta["ownerReferences"] == [
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTuneJob",
                "name": "qa",
                "uid": UID,
                "controller": True,
                "blockOwnerDeletion": True,
            }
        ]
        assert "app.kubernetes.io/instance" not in meta["labels"]
        assert meta["annotations"]["argocd.argoproj.io/ignore-resource-updates"] == "true"


async def test_a_finished_job_costs_nothing() -> None:
    bench = Bench()
    await bench.run()
    calls, asked = len(bench.cluster.calls), bench.planner.asked
    bench.cluster.job()["spec"] = {"nonsense": True}
    bench.restart()
    assert await bench.reconciler.reconcile(REF) is None
    assert (len(bench.cluster.calls), bench.planner.asked) == (calls, asked)


async def test_events_are_told_once_for_each_phase() -> None:
    bench = Bench([Outcome((70,)), SUCCESS])
    await bench.run()
    told = [(event.type, event.reason) for event in bench.cluster.events]
    assert told.count(("Warning", Reason.INFRASTRUCTURE)) == 1
    assert told.count(("Normal", Reason.TRAINING)) == 2, "once for each attempt"
    assert told[-1] == ("Normal", Reason.SUCCEEDED)


async def test_infrastructure_failures_wait_longer_each_time_and_end() -> None:
    bench = Bench([Outcome((70,))] * 4)
    await bench.run()
    assert bench.phase == "Failed"
    assert bench.status["attempts"]["retries"] == 3
    assert bench.condition("Failed")["reason"] == Reason.RETRIES_EXHAUSTED
    assert "3 of 3 retries failed too" in bench.condition("Stalled")["message"]
    assert [one for one in bench.cluster.created if "PyTorchJob" in one] == [f"PyTorchJob qa-{n}" for n in (1, 2, 3, 4)]
    assert [wait // 10 for wait in waits(bench)] == [1, 2, 4]
    assert bench.failures == [*[Reason.INFRASTRUCTURE] * 3, Reason.RETRIES_EXHAUSTED], "each is counted once"


def waits(bench: Bench) -> list[int]:
    """Seconds between the end of one attempt and the next; each runs for less than 10."""
    made = [at for name, at in bench.cluster.created_at.items() if name.startswith(c.PYTORCHJOB_KIND)]
    return [round(after - before) for before, after in pairwise(made)]


async def test_only_the_newest_attempts_are_kept() -> None:
    bench = Bench([Outcome((70,))] * 3 + [SUCCESS])
    await bench.run()
    for kind in (c.PYTORCHJOB_KIND, "ConfigMap"):
        assert [one["metadata"]["name"] for one in bench.cluster.find(kind)] == ["qa-3", "qa-4"]


async def test_preemptions_do_not_count_and_slow_down_without_progress() -> None:
    taken = Outcome((143,), disrupted=True)
    bench = Bench([taken] * 6 + [SUCCESS], spec={"runPolicy": {"retries": 0}})
    await bench.run()
    assert bench.phase == "Succeeded"
    assert bench.status["attempts"]["preemptions"] == 6
    assert bench.status["attempts"].get("retries") == 0
    times = [one["attempts"]["fruitlessPreemptions"] for one in bench.cluster.statuses if "attempts" in one]
    assert max(times) == 6
    assert [wait // 10 for wait in waits(bench)] == [0, 1, 2, 4, 8, 16], "at once, then 10 s, doubled each time"


async def test_other_failures_end_a_row_of_preemptions() -> None:
    bench = Bench([Outcome((75,)), Outcome((75,)), Outcome((70,)), Outcome((75,)), SUCCESS])
    await bench.run()
    assert bench.status["attempts"]["fruitlessPreemptions"] == 1
    assert bench.status["attempts"]["preemptions"] == 3


async def test_preemptions_that_made_progress_are_followed_at_once() -> None:
    bench = Bench([Outcome((75,), step=10 * n) for n in (1, 2, 3, 4)] + [SUCCESS])
    await bench.run()
    assert bench.status["attempts"]["fruitlessPreemptions"] == 0
    assert bench.status["attempts"]["furthestStep"] == 40
    assert max(waits(bench)) < 10


async def test_memory_halves_the_micro_batch_until_there_is_none() -> None:
    bench = Bench([Outcome((71,))] * 4)
    await bench.run()
    assert bench.phase == "Failed"
    assert bench.condition("Failed")["reason"] == Reason.GPU_OUT_OF_MEMORY
    assert "gradientCheckpointing" in bench.condition("Failed")["message"]
    sizes = [one["plan"]["microBatchSize"] for one in bench.cluster.statuses if "plan" in one]
    assert list(dict.fromkeys(sizes)) == [8, 4, 2, 1]
    assert bench.status["attempts"]["memoryRetries"] == 3
    assert bench.status["attempts"]["retries"] == 0


STRATEGIES = [
    ("auto", 1, "take larger GPUs, or several with spec.parallelism.strategy: fsdp"),
    (
        "auto",
        2,
        "set spec.parallelism.strategy: fsdp, which divides the model among the GPUs where the method allows it",
    ),
    ("fsdp", 2, "take more or larger GPUs"),
]


@pytest.mark.parametrize(("strategy", "gpus", "says"), STRATEGIES)
async def test_who_runs_out_of_memory_is_told_of_strategies(strategy: str, gpus: int, says: str) -> None:
    parts = {"resources": {"gpus": gpus}, "parallelism": {"strategy": strategy}, "training": {"microBatchSize": 1}}
    bench = Bench([Outcome((71,) * gpus)] * 4, spec=parts)
    await bench.run()
    assert bench.phase == "Failed"
    assert says in bench.condition("Failed")["message"]


async def test_the_smaller_micro_batch_reaches_the_trainer() -> None:
    bench = Bench([Outcome((71,)), SUCCESS])
    await bench.run()
    configs = [bench.cluster.objects["ConfigMap", f"qa-{n}"]["data"]["config.json"] for n in (1, 2)]
    assert '"microBatchSize":8,"gradientAccumulation":2' in configs[0]
    assert '"microBatchSize":4,"gradientAccumulation":4' in configs[1]


@pytest.mark.parametrize("code", [64, 65, 66, 77, 78])
async def test_user_errors_fail_at_once_in_the_trainers_words(code: int) -> None:
    bench = Bench([Outcome((code,))])
    await bench.run()
    assert bench.phase == "Failed"
    assert bench.condition("Failed")["message"] == f"exit {code} as scripted"
    assert bench.status["attempts"]["last"]["exitCode"] == code
    assert bench.status["attempts"]["last"]["pod"] == "qa-1-master-0"
    assert len([one for one in bench.cluster.created if "PyTorchJob" in one]) == 1


async def test_suspending_stops_the_pods_and_resuming_is_a_new_attempt() -> None:
    bench = Bench(
        [NEVER_ENDS, SUCCESS],
        users=[
            (lambda b: b.phase == "Running", lambda b: b.cluster.change_spec(suspend=True)),
            (lambda b: b.phase == "Suspended", lambda b: b.cluster.change_spec(suspend=False)),
        ],
    )
    await bench.run()
    assert bench.phase == "Succeeded"
    attempts = bench.status["attempts"]
    assert (attempts["current"], attempts["retries"], attempts["preemptions"]) == (2, 0, 0)
    assert "last" not in attempts
    before = next(one for one in bench.cluster.statuses if one["phase"] == "Suspended")
    assert {one["type"]: one["status"] for one in before["conditions"]}["Suspended"] == "True"


async def test_resuming_while_the_pods_still_stop_is_no_failure() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS], spec={"runPolicy": {"retries": 0}})
    await bench.run(seconds=20)
    bench.cluster.change_spec(suspend=True)
    while ("PyTorchJob", "qa-1") in bench.cluster.objects:
        await bench.reconciler.reconcile(REF)
    bench.cluster.change_spec(suspend=False)
    assert bench.cluster.find("Pod"), "they are still there"
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 2)


async def test_a_job_created_suspended_creates_nothing() -> None:
    bench = Bench(spec={"runPolicy": {"suspend": True}})
    await bench.run()
    assert (bench.phase, bench.cluster.created) == ("Suspended", [])
    assert bench.condition("Planned")["status"] == "True"
    bench.cluster.change_spec(suspend=False)
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 1)


async def test_the_deadline_is_ours() -> None:
    bench = Bench([NEVER_ENDS], spec={"runPolicy": {"activeDeadlineSeconds": 600}})
    await bench.run()
    assert bench.phase == "Failed"
    assert bench.condition("Failed")["reason"] == Reason.DEADLINE_EXCEEDED
    assert bench.cluster.find(c.PYTORCHJOB_KIND) == []


async def test_a_stall_is_a_counted_failure() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS], settings=REPORTING, spec={"runPolicy": {"stallSeconds": 100}})
    await bench.run()
    assert bench.phase == "Succeeded"
    assert bench.status["attempts"]["last"]["reason"] == Reason.PROGRESS_STALLED
    assert bench.status["attempts"]["retries"] == 1
    assert [one["metadata"]["name"] for one in bench.cluster.find(c.PYTORCHJOB_KIND)] == ["qa-2"]


async def test_nothing_stalls_where_nothing_is_reported() -> None:
    bench = Bench([NEVER_ENDS], spec={"runPolicy": {"stallSeconds": 100}})
    await bench.run(seconds=10_000)
    assert bench.phase == "Running"


async def test_reports_keep_a_job_from_stalling() -> None:
    bench = Bench([NEVER_ENDS], settings=REPORTING, spec={"runPolicy": {"stallSeconds": 100}})
    await bench.run(seconds=60)
    bench.cluster.report = ProgressReport(bench.clock.now, 1, metrics={"step": 3})
    await bench.run(seconds=60)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Running", 1)
    await bench.run(seconds=41)
    assert bench.status["attempts"]["retries"] == 1


async def test_children_go_and_the_job_stays() -> None:
    bench = Bench(spec={"runPolicy": {"ttlSecondsAfterFinished": 300}})
    await bench.run(seconds=200)
    assert bench.cluster.find(c.PYTORCHJOB_KIND)
    await bench.run()
    assert bench.cluster.find(c.PYTORCHJOB_KIND) == bench.cluster.find("ConfigMap") == []
    assert bench.phase == "Succeeded"
    assert bench.status["result"]["sizeBytes"] == 1234


async def test_a_deleted_pytorchjob_is_made_again_under_a_new_number() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS])
    await bench.run(seconds=20)
    bench.cluster.remove(c.PYTORCHJOB_KIND, "qa-1")
    await bench.run()
    assert bench.phase == "Succeeded"
    assert bench.status["attempts"]["last"]["reason"] == Reason.CHILD_DELETED
    assert bench.status["attempts"]["current"] == 2


async def test_a_watch_that_lags_is_no_deletion() -> None:
    bench = Bench([NEVER_ENDS])
    bench.cluster.lags = True
    await bench.run(seconds=30)
    assert bench.cluster.created == ["ConfigMap qa-1", "PyTorchJob qa-1"]
    assert "last" not in bench.status["attempts"]


async def test_a_retry_is_asked_for_once() -> None:
    bench = Bench([Outcome((65,)), Outcome((65,)), SUCCESS])
    bench.cluster.annotate(c.ANNOTATION_RETRY, "0")
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Failed", 1), "it was there before the failure"
    bench.cluster.annotate(c.ANNOTATION_RETRY, "1")
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Failed", 2)
    bench.cluster.annotate(c.ANNOTATION_RETRY, "2")
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 3)
    bench.cluster.annotate(c.ANNOTATION_RETRY, "3")
    await bench.run()
    assert bench.status["attempts"]["current"] == 3, "a success is final"


async def test_a_retry_after_the_deadline_has_its_own_time() -> None:
    bench = Bench([NEVER_ENDS, SUCCESS], spec={"runPolicy": {"activeDeadlineSeconds": 600}})
    await bench.run()
    bench.cluster.annotate(c.ANNOTATION_RETRY, "again")
    await bench.run()
    assert bench.phase == "Succeeded"


async def test_a_terminal_job_ignores_suspend_and_notes_the_generation() -> None:
    bench = Bench()
    await bench.run()
    bench.cluster.change_spec(suspend=True)
    await bench.run()
    assert (bench.phase, bench.status["observedGeneration"]) == ("Succeeded", 2)
    assert {one["observedGeneration"] for one in bench.status["conditions"]} == {2}


async def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    bench = Bench()
    bench.cluster.job()["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    assert await bench.reconciler.reconcile(REF) is None
    assert bench.cluster.calls == []


async def test_a_wiped_status_is_written_anew() -> None:
    bench = Bench([Outcome((70,)), NEVER_ENDS])
    await bench.run(seconds=60)
    assert bench.status["attempts"]["current"] == 2
    job = bench.cluster.job()
    job["status"] = {}
    bench.cluster.put(job)
    await bench.run(seconds=60)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Running", 2)
    assert bench.status["plan"]["microBatchSize"] == 8
    assert bench.condition("Accepted")["status"] == "True"
    assert len(bench.cluster.find(c.PYTORCHJOB_KIND)) == 2


async def test_progress_is_written_now_and_then() -> None:
    bench = Bench([NEVER_ENDS])
    await bench.run(seconds=10)
    writes = len(bench.cluster.statuses)
    for step in range(50):
        bench.cluster.report = ProgressReport(bench.clock.now, 1, 2 * step, 50 - step, {"step": step, "loss": 1 / 3})
        bench.cluster.changes += 1
        await bench.run(seconds=1)
    await bench.run(seconds=20)
    assert 5 <= len(bench.cluster.statuses) - writes <= 7
    progress = bench.status["progress"]
    assert (progress["step"], progress["percent"], progress["loss"]) == (49, 98, 0.333333)


async def test_reports_of_an_older_attempt_are_not_shown() -> None:
    bench = Bench([Outcome((70,)), NEVER_ENDS])
    await bench.run(seconds=60)
    bench.cluster.report = ProgressReport(bench.clock.now, 1, 99, metrics={"step": 99})
    bench.cluster.changes += 1
    await bench.run(seconds=60)
    assert "progress" not in bench.status


async def test_a_success_whose_message_is_lost() -> None:
    bench = Bench([NEVER_ENDS])
    await bench.run(seconds=20)
    bench.world._conditions(bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"], "Succeeded")
    bench.cluster.remove("Pod", "qa-1-master-0")
    await bench.run()
    assert bench.phase == "Succeeded"
    assert bench.status["result"] == {"uri": f"s3://models/qa/runs/{UID}"}
    assert "manifest.json" in bench.condition("Succeeded")["message"]
    assert "refresh" in bench.cluster.calls, "it was looked for"
