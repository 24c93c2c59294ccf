"""The rest of the world for tests of the core: a training operator and a node that follow a script, and a loop that
calls the reconciler when something happened or its time has come, and never otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_operator import constants as c
from finetune_operator.api.v1alpha1 import FineTuneJobSpec, PlanStatus
from finetune_operator.clock import WallClock
from finetune_operator.errors import ClusterError
from finetune_operator.observed import JobRef
from finetune_operator.planning import Preparer
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.shape import unplanned
from finetune_operator.times import rfc3339
from tests.builders import REF, job_manifest, run_result, said
from tests.unit.core.fake_cluster import Clock, Crash, FakeCluster

STEP_SECONDS = 2.0


@dataclass(frozen=True)
class Planned:
    plan: PlanStatus
    notes: tuple[str, ...] = ()


class Planner:
    """Plans 8 rows at a time, and counts how often it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked = 0

    def __call__(
        self, spec: FineTuneJobSpec, config: Mapping[str, Any], *, gpu_memory: int, micro_batch_size: int | None
    ) -> Planned:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Planned(unplanned(spec, micro_batch_size or 8).model_copy(update={"fits": True}))


class ConfigReader:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def __call__(self, ref: JobRef, spec: FineTuneJobSpec) -> Mapping[str, Any]:
        if self.error is not None:
            raise self.error
        return {"model_type": "llama"}


@dataclass(frozen=True)
class Outcome:
    """How an attempt goes. Exit codes by pod, the master first; an empty tuple never ends."""

    codes: tuple[int, ...] = ()
    disrupted: bool = False
    step: int | None = None


SUCCESS = Outcome((0,))


@dataclass
class World:
    """Moves PyTorchJobs from created over running to their scripted end, one transition a step."""

    cluster: FakeCluster
    script: list[Outcome]

    def step(self) -> bool:
        """Make one transition of every PyTorchJob that has one left; says whether anything changed."""
        before = self.cluster.changes
        names = {one["metadata"]["name"] for one in self.cluster.find(c.PYTORCHJOB_KIND)}
        for pod in self.cluster.find("Pod"):
            if pod["metadata"]["labels"][c.LABEL_PYTORCHJOB] not in names:
                self.cluster.remove("Pod", pod["metadata"]["name"])
        for job in self.cluster.find(c.PYTORCHJOB_KIND):
            self._advance(job)
        return self.cluster.changes != before

    def _advance(self, job: dict[str, Any]) -> None:
        held = {one["type"] for one in job.get("status", {}).get("conditions", ())}
        if job["spec"]["runPolicy"].get("suspend") or held & {"Succeeded", "Failed"}:
            return
        number = int(job["metadata"]["labels"][c.LABEL_ATTEMPT])
        outcome = self.script[number - 1]
        if "Created" not in held:
            self._pods(job, "Pending", {"waiting": {"reason": "ContainerCreating"}})
            self._conditions(job, "Created")
        elif "Running" not in held:
            self._pods(job, "Running", {"running": {"startedAt": rfc3339(self.cluster.clock())}})
            self._conditions(job, "Created", "Running")
        elif outcome.codes:
            self._end(job, outcome)

    def _end(self, job: dict[str, Any], outcome: Outcome) -> None:
        for index, code in enumerate(outcome.codes):
            result = run_result() if code == 0 else None
            ended = {
                "exitCode": code,
                "finishedAt": rfc3339(self.cluster.clock()),
                "message": said(code, "Scripted", f"exit {code} as scripted", step=outcome.step, result=result),
            }
            self._pod(job, index, "Failed" if code else "Succeeded", {"terminated": ended}, outcome.disrupted)
        self._conditions(job, "Created", "Failed" if any(outcome.codes) else "Succeeded")

    def _pods(self, job: dict[str, Any], phase: str, state: dict[str, Any]) -> None:
        replicas = job["spec"]["pytorchReplicaSpecs"]
        for index in range(sum(one["replicas"] for one in replicas.values())):
            self._pod(job, index, phase, state, False)

    def _pod(self, job: dict[str, Any], index: int, phase: str, state: dict[str, Any], disrupted: bool) -> None:
        role = "master" if index == 0 else "worker"
        name = f"{job['metadata']['name']}-{role}-{max(0, index - 1)}"
        labels = {
            **job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]["labels"],
            c.LABEL_PYTORCHJOB: job["metadata"]["name"],
            c.LABEL_REPLICA_TYPE: role,
        }
        conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        self.cluster.put(
            {
                "kind": "Pod",
                "metadata": {"name": name, "namespace": REF.namespace, "uid": name, "labels": labels},
                "status": {
                    "phase": phase,
                    "conditions": conditions if disrupted else [],
                    "containerStatuses": [{"name": c.CONTAINER, "state": state}],
                },
            }
        )

    def _conditions(self, job: dict[str, Any], *held: str) -> None:
        job["status"] = {"conditions": [{"type": name, "status": "True"} for name in held]}
        self.cluster.put(job)


@dataclass
class Bench:
    """A cluster, its world and an operator, run as discrete events."""

    script: list[Outcome] = field(default_factory=lambda: [SUCCESS])
    spec: dict[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    planner: Planner = field(default_factory=Planner)
    reader: ConfigReader = field(default_factory=ConfigReader)
    users: list[tuple[Callable[[Bench], bool], Callable[[Bench], None]]] = field(default_factory=list)
    """What users do: when the first is true for the first time, the second."""

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster(self.clock)
        self.cluster.put(job_manifest(**self.spec))
        self.world = World(self.cluster, self.script)
        self.pending = list(self.users)
        self.turns = 0
        self.failures: list[str] = []
        """What was counted."""
        self.restart()

    def restart(self) -> None:
        """A new operator process: it knows nothing but what is in the cluster."""
        preparer = Preparer(self.settings, self.reader, self.planner)
        clock = WallClock(self.clock, self.clock.steady)
        self.reconciler = Reconciler(
            self.cluster, preparer, self.settings, clock, on_failure=lambda reason: self.failures.append(reason)
        )

    @property
    def status(self) -> dict[str, Any]:
        """The job's status on the wire."""
        found: dict[str, Any] = self.cluster.job().get("status") or {}
        return found

    @property
    def phase(self) -> str:
        return str(self.status.get("phase", ""))

    def condition(self, name: str) -> dict[str, Any]:
        return next(one for one in self.status["conditions"] if one["type"] == name)

    async def run(self, *, seconds: float = 100_000.0, turns: int = 400) -> None:
        """Until nothing is left to happen, or so many seconds have passed."""
        # As the queue does it: appointments are kept by a clock that nobody sets.
        end = self.clock.steady() + seconds
        seen, due = -1, None
        while self.turns < turns:
            now = self.clock.steady()
            if self.cluster.changes != seen or (due is not None and due <= now):
                seen = self.cluster.changes
                after = await self._turn()
                due = None if after is None else now + after
                self._users()
                continue
            if now + STEP_SECONDS <= end and self.world.step():
                self.clock.now += STEP_SECONDS
                continue
            if due is None or due > end:
                self.clock.now += end - now
                return
            self.clock.now += due - now
        raise AssertionError(f"{turns} turns did not bring the job to rest: {self.status}")

    async def _turn(self) -> float | None:
        self.turns += 1
        try:
            return await self.reconciler.reconcile(REF)
        except ClusterError:
            return 1.0
        except Crash:
            self.restart()
            return 0.0

    def _users(self) -> None:
        for entry in list(self.pending):
            when, act = entry
            if when(self):
                self.pending.remove(entry)
                act(self)
