"""What stands in the way of a job: Kueue, the API server, names, plans, and its own spec."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator import constants as c
from finetune_operator.constants import Reason
from finetune_operator.errors import (
    AlreadyExists,
    ClusterError,
    Forbidden,
    KindUnknown,
    ModelConfigUnavailable,
    NotSupported,
    PlanningError,
)
from finetune_operator.settings import Permissions, Settings, TrainerDefaults
from finetune_trainer.contract import SelectionError
from tests.builders import REF, job_manifest
from tests.unit.core.fake_cluster import Crash, Fault
from tests.unit.core.world import SUCCESS, Bench, ConfigReader, Outcome, Planner

NEVER_ENDS = Outcome()


async def test_kueue_admits() -> None:
    bench = Bench(spec={"scheduling": {"queue": "gpus"}})
    await bench.run(seconds=30)
    job = bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert (bench.phase, job["spec"]["runPolicy"]["suspend"]) == ("Queued", True)
    job["spec"]["runPolicy"]["suspend"] = False
    bench.cluster.put(job)
    await bench.run()
    assert bench.phase == "Succeeded"


async def test_kueue_may_take_the_pods_away_again() -> None:
    bench = Bench([NEVER_ENDS], spec={"scheduling": {"queue": "gpus"}})
    job: dict[str, Any] = {}

    async def admit(admitted: bool) -> None:
        job.update(bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"])
        job["spec"]["runPolicy"]["suspend"] = not admitted
        bench.cluster.put(job)
        await bench.run(seconds=30)

    await bench.run(seconds=30)
    await admit(True)
    assert bench.phase == "Running"
    bench.world._end(bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"], Outcome((75,)))
    bench.world._conditions(bench.cluster.objects[c.PYTORCHJOB_KIND, "qa-1"], "Created", "Suspended")
    await admit(False)
    assert (bench.phase, bench.status["attempts"]["preemptions"]) == ("Queued", 0)


async def test_no_training_operator() -> None:
    bench = Bench()
    bench.cluster.refusals["PyTorchJob"] = [KindUnknown("no matches for kind", status=404)] * 3
    await bench.run(seconds=40)
    assert bench.phase == "Pending"
    assert bench.condition("Reconciling")["reason"] == Reason.TRAINING_OPERATOR_MISSING
    assert "install" in bench.condition("Reconciling")["message"]
    assert [event.reason for event in bench.cluster.events].count(Reason.TRAINING_OPERATOR_MISSING) == 1
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 1)


async def test_a_training_operator_that_does_nothing() -> None:
    bench = Bench()
    bench.world._advance = lambda job: None  # type: ignore[method-assign]
    await bench.run(seconds=300)
    assert bench.phase == "Pending"
    assert "training operator does not seem to run" in bench.condition("Running")["message"]


async def test_the_api_server_refuses_for_now() -> None:
    bench = Bench()
    bench.cluster.refusals["PyTorchJob"] = [Forbidden("exceeded quota: gpus", status=403)] * 2
    await bench.run(seconds=20)
    assert bench.condition("Reconciling")["reason"] == Reason.CREATE_REFUSED
    assert "exceeded quota: gpus" in bench.condition("Reconciling")["message"]
    await bench.run()
    assert bench.phase == "Succeeded"


async def test_a_webhook_that_does_not_answer_is_told() -> None:
    bench = Bench()
    said = 'failed calling webhook "validator.pytorchjob.training-operator.kubeflow.org": context deadline exceeded'
    bench.cluster.refusals["PyTorchJob"] = [ClusterError(said, status=500)] * 10
    await bench.run(seconds=5)
    assert (bench.phase, bench.condition("Reconciling")["reason"]) == ("Pending", Reason.CREATE_FAILED)
    message = bench.condition("Reconciling")["message"]
    assert "context deadline exceeded" in message and "training operator's: see whether its pods run" in message
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 1)
    assert [event.reason for event in bench.cluster.events].count(Reason.CREATE_FAILED) == 1


async def test_a_fault_of_the_api_server_is_nobody_elses() -> None:
    bench = Bench()
    bench.cluster.refusals["PyTorchJob"] = [ClusterError("etcdserver: request timed out", status=503)] * 10
    await bench.run(seconds=5)
    assert bench.condition("Reconciling")["message"] == "etcdserver: request timed out; it is tried again"
    await bench.run()
    assert bench.phase == "Succeeded"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            422,
            "pytorchjobs.kubeflow.org \"qa-1\" is forbidden: ValidatingAdmissionPolicy 'deny' with binding 'deny'"
            " denied request: until Monday",
        ),
        (400, 'admission webhook "budget.acme.dev" denied the request: until Monday'),
    ],
)
async def test_a_policy_that_says_no_is_asked_again(status: int, said: str) -> None:
    bench = Bench()
    bench.cluster.refusals["PyTorchJob"] = [ClusterError(said, status=status)] * 3
    await bench.run(seconds=5)
    assert (bench.phase, bench.condition("Reconciling")["reason"]) == ("Pending", Reason.CREATE_REFUSED)
    assert "until Monday" in bench.condition("Reconciling")["message"]
    await bench.run()
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Succeeded", 1)


async def test_the_training_operator_says_that_it_is_wrong() -> None:
    bench = Bench()
    said = 'admission webhook "validator.pytorchjob.training-operator.kubeflow.org" denied the request: spec.foo: wrong'
    bench.cluster.refusals["PyTorchJob"] = [ClusterError(said, status=422)]
    await bench.run()
    assert (bench.phase, bench.condition("Failed")["reason"]) == ("Failed", Reason.REJECTED)


async def test_the_api_server_says_that_it_is_wrong() -> None:
    bench = Bench()
    bench.cluster.refusals["PyTorchJob"] = [ClusterError("spec.template.foo: unknown", status=422)]
    await bench.run()
    assert (bench.phase, bench.condition("Failed")["reason"]) == ("Failed", Reason.REJECTED)
    assert "spec.template.foo" in bench.condition("Stalled")["message"]


@pytest.mark.parametrize("kind", ["ConfigMap", c.PYTORCHJOB_KIND])
async def test_the_leftovers_of_another_job_are_never_adopted(kind: str) -> None:
    bench = Bench()
    owner = {"apiVersion": c.API_VERSION, "kind": c.KIND, "name": "qa", "uid": "an-older-job", "controller": True}
    left = {"kind": kind, "metadata": {"name": "qa-1", "namespace": REF.namespace, "ownerReferences": [owner]}}
    bench.cluster.put({**left, "spec": {"runPolicy": {"suspend": True}}})
    await bench.run(seconds=35)
    assert (bench.phase, bench.condition("Reconciling")["reason"]) == ("Pending", Reason.NAME_TAKEN)
    assert bench.cluster.objects[kind, "qa-1"]["metadata"]["ownerReferences"][0]["uid"] == "an-older-job"
    bench.cluster.remove(kind, "qa-1")
    await bench.run()
    assert bench.phase == "Succeeded"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PlanningError("needs 90 GiB of 80; 2 GPUs would do"), Reason.DOES_NOT_FIT),
        (SelectionError("spec.layers.ids", "40 outside the model"), Reason.INVALID_SELECTION),
        (NotSupported("method prefix"), Reason.NOT_SUPPORTED),
    ],
)
async def test_a_job_that_cannot_be_planned_creates_nothing(error: Exception, reason: str) -> None:
    bench = Bench(planner=Planner(error))
    await bench.run()
    assert (bench.phase, bench.cluster.created) == ("Failed", [])
    for name, expected in (("Accepted", "True"), ("Planned", "False"), ("Failed", "True"), ("Stalled", "True")):
        assert bench.condition(name)["status"] == expected
    assert bench.condition("Planned")["reason"] == reason
    assert str(error) in bench.condition("Failed")["message"]
    bench.planner.error = None
    bench.cluster.annotate(c.ANNOTATION_RETRY, "now it fits")
    await bench.run()
    assert (bench.phase, bench.condition("Planned")["status"]) == ("Succeeded", "True")


async def test_a_model_that_cannot_be_read_from_here_is_no_obstacle() -> None:
    bench = Bench(reader=ConfigReader(ModelConfigUnavailable("hf://acme/small: no access")))
    await bench.run()
    assert bench.phase == "Succeeded"
    planned = bench.condition("Planned")
    assert (planned["status"], planned["reason"]) == ("Unknown", Reason.MODEL_UNKNOWN)
    assert bench.status["plan"]["microBatchSize"] == 1
    assert "fits" not in bench.status["plan"]


REFUSED = [
    ({"lora": {"rank": 8}, "method": "freeze", "layers": {"last": 1}}, Reason.INVALID_SPEC, "spec.lora"),
    ({"unknown": 1}, Reason.INVALID_SPEC, "spec.unknown"),
    ({"runPolicy": {"retries": "many"}}, Reason.INVALID_SPEC, "spec.runPolicy.retries"),
    ({"model": {"trustRemoteCode": True}}, Reason.NOT_PERMITTED, "trustRemoteCode"),
    ({"model": {"uri": "file:models/x"}}, Reason.NOT_PERMITTED, "spec.model.uri"),
    ({"dataset": {"validation": {"uri": "file:///x"}}}, Reason.NOT_PERMITTED, "spec.dataset.validation.uri"),
    ({"trainer": {"podTemplate": {"spec": {"hostNetwork": True}}}}, Reason.NOT_PERMITTED, "hostNetwork"),
    ({"trainer": {"podTemplate": {"spec": {"containers": {"a": 1}}}}}, Reason.INVALID_SPEC, "containers"),
]


@pytest.mark.parametrize(("changes", "reason", "blamed"), REFUSED, ids=lambda value: str(value)[:40])
async def test_a_spec_that_got_past_the_schema(changes: dict[str, Any], reason: str, blamed: str) -> None:
    bench = Bench(spec=changes)
    await bench.run()
    assert (bench.phase, bench.cluster.created) == ("Failed", [])
    accepted = bench.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", reason)
    assert blamed in accepted["message"]
    assert bench.condition("Stalled")["status"] == "True"


async def test_what_the_administrator_allows() -> None:
    allowed = Permissions(remote_code=True, privileged_pod_template=True, local_files=True)
    spec = {
        "model": {"uri": "file:models/x", "trustRemoteCode": True},
        "trainer": {"podTemplate": {"spec": {"hostNetwork": True}}},
    }
    bench = Bench(spec=spec, settings=Settings(permissions=allowed))
    await bench.run()
    assert bench.phase == "Succeeded"


async def test_another_job_of_the_same_name_starts_from_its_own_beginning() -> None:
    bench = Bench()
    await bench.run()
    bench.cluster.put(job_manifest(uid="0c7d2f9e-0000-4000-8000-000000000002"))
    await bench.run(seconds=60)
    assert (bench.phase, bench.status["attempts"]["current"]) == ("Pending", 0)
    assert bench.condition("Reconciling")["reason"] == Reason.NAME_TAKEN


async def test_the_owner_of_an_existing_child_is_read_anew() -> None:
    bench = Bench()
    bench.cluster.lags = True
    real = bench.cluster._create

    def answer_is_lost(manifest: dict[str, Any]) -> None:
        first = f"{manifest['kind']} {manifest['metadata']['name']}" not in bench.cluster.created
        real(manifest)
        if first:
            raise ClusterError("the API server did not answer")

    bench.cluster._create = answer_is_lost  # type: ignore[method-assign]
    await bench.run(seconds=30)
    assert bench.cluster.created == ["ConfigMap qa-1", "PyTorchJob qa-1"]
    assert bench.status["attempts"]["current"] == 1


async def test_what_was_there_and_is_gone_again_is_tried_once_more() -> None:
    bench = Bench()
    bench.cluster.refusals["ConfigMap"] = [AlreadyExists("it was there")]
    await bench.run()
    assert bench.phase == "Succeeded"


async def killed_before_the_status(bench: Bench) -> None:
    """One turn whose creations are carried out and whose status patch is not."""
    bench.cluster.faults = [Fault(2, Crash(), applied=False)]
    with pytest.raises(Crash):
        await bench.reconciler.reconcile(REF)
    assert bench.cluster.calls == ["create ConfigMap qa-1", "create PyTorchJob qa-1", "patch"]


async def test_the_plan_of_an_attempt_is_the_one_it_was_made_by() -> None:
    bench = Bench([NEVER_ENDS])
    await killed_before_the_status(bench)
    bench.planner.error = PlanningError("an upgrade that counts otherwise")
    bench.restart()
    await bench.run(seconds=60)
    assert (bench.phase, bench.status["plan"]["microBatchSize"]) == ("Running", 8)
    assert bench.status["attempts"]["current"] == 1


async def test_half_the_micro_batch_of_an_attempt_that_no_status_told_of() -> None:
    bench = Bench([Outcome((71,)), SUCCESS])
    await killed_before_the_status(bench)
    while bench.world.step():
        pass
    bench.restart()
    await bench.run()
    assert (bench.phase, bench.status["plan"]["microBatchSize"]) == ("Succeeded", 4)


async def test_a_config_map_of_other_settings_is_made_anew() -> None:
    bench = Bench()
    bench.cluster.faults = [Fault(1, Crash(), applied=False)]
    with pytest.raises(Crash):
        await bench.reconciler.reconcile(REF)
    before = bench.cluster.objects["ConfigMap", "qa-1"]["data"]["config.json"]
    bench.settings = Settings(trainer=TrainerDefaults(s3_endpoint="https://repaired"))
    bench.restart()
    await bench.run()
    after = bench.cluster.objects["ConfigMap", "qa-1"]["data"]["config.json"]
    assert "https://repaired" in after and "https://repaired" not in before
    assert bench.phase == "Succeeded"


async def test_a_config_map_is_left_alone_once_its_attempt_exists() -> None:
    bench = Bench([NEVER_ENDS])
    await killed_before_the_status(bench)
    made = bench.cluster.objects["ConfigMap", "qa-1"]
    bench.cluster.lags = True
    bench.settings = Settings(trainer=TrainerDefaults(s3_endpoint="https://repaired"))
    bench.restart()
    await bench.run(seconds=60)
    assert bench.cluster.objects["ConfigMap", "qa-1"] is made
    assert bench.cluster.created == ["ConfigMap qa-1", "PyTorchJob qa-1"]
    assert bench.status["attempts"]["current"] == 1
